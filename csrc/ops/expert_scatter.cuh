// expert_scatter on a GPU: x[index] += scale * value, or = scale * value, keeping the overwritten elements.
//
// A touched element costs one 32-byte sector read and written; positions, values and saved elements are read and
// written in order, one element per lane, 8 per thread, so that 8 random accesses are in flight. Positions are
// distinct: no atomics.
#pragma once
#include "../common/cuda.cuh"

struct ScatterTask {
  u64 x, index, value, saved;
  i64 n, size, flags;
  float scale;
  int unused;
};
#define FM_ADD 1
#define FM_COPY 2  // the value's bits, unscaled
#define FM_ITEMS 8

template <class T, class V>
struct Cast {
  static __device__ __forceinline__ T run(V v) { return from_float<T>(to_float(v)); }
};
template <class T>
struct Cast<T, T> {
  static __device__ __forceinline__ T run(T v) { return v; }
};

template <class T, class V, class Index>
__device__ __forceinline__ void expert_scatter(const ScatterTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED ScatterTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const i64 first = (i64)block * FM_THREADS * FM_ITEMS + threadIdx.x;
  T* x = (T*)t.x;
  Index at[FM_ITEMS];
  T old[FM_ITEMS];
#pragma unroll
  for (int u = 0; u < FM_ITEMS; ++u)
    if (first + u * FM_THREADS < t.n) at[u] = load((const Index*)t.index + first + u * FM_THREADS);
#pragma unroll
  for (int u = 0; u < FM_ITEMS; ++u)
    if (first + u * FM_THREADS < t.n) old[u] = load(x + at[u]);
#pragma unroll
  for (int u = 0; u < FM_ITEMS; ++u) {
    const i64 k = first + u * FM_THREADS;
    if (k >= t.n) break;
    const V v = load((const V*)t.value + k);
    const float term = to_float(v) * t.scale;
    store((T*)t.saved + k, old[u]);
    store(x + at[u],
          t.flags & FM_COPY ? Cast<T, V>::run(v) : from_float<T>(t.flags & FM_ADD ? to_float(old[u]) + term : term));
  }
}

struct PositionsTask {
  u64 index, wrong;  // wrong: int32, set to 1
  i64 n, size;
};

// Whether positions are strictly increasing within [0, size).
template <class Index>
__device__ __forceinline__ void check_positions(const PositionsTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED PositionsTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const i64 k = (i64)block * FM_THREADS + threadIdx.x;
  if (k >= t.n) return;
  const Index* index = (const Index*)t.index;
  const i64 v = (i64)load(index + k);
  if (v < 0 || v >= t.size || (k > 0 && (i64)load(index + k - 1) >= v)) atomicOr((u32*)t.wrong, 1u);
}

#define FM_SCATTER_OF(X, name, T, V)                                              \
  X(expert_scatter_kernel_##name##_i32, ScatterTask, (expert_scatter<T, V, int>)) \
  X(expert_scatter_kernel_##name##_i64, ScatterTask, (expert_scatter<T, V, i64>))
#define FM_SCATTER(X)                                                  \
  FM_SCATTER_OF(X, f32_f32, float, float)                              \
  FM_SCATTER_OF(X, bf16_bf16, bf16, bf16)                              \
  FM_SCATTER_OF(X, bf16_f32, bf16, float)                              \
  FM_SCATTER_OF(X, f16_f16, f16, f16)                                  \
  FM_SCATTER_OF(X, f16_f32, f16, float)                                \
  X(check_positions_kernel_i32, PositionsTask, (check_positions<int>)) \
  X(check_positions_kernel_i64, PositionsTask, (check_positions<i64>))
FM_SCATTER(FM_KERNEL)
