// fw_step on a GPU: theta += gamma * (s - theta) for all tensors of a model in one launch, optionally with the products
// <g, s - theta> and |s - theta|^2 of the step (the next decision's numbers) from the same pass.
#pragma once
#include "../common/block_sum.cuh"

struct StepTask {
  u64 theta, s, g;  // s = 0: the zero vertex; g = 0: no products
  u64 sums;         // float [2][parts]
  i64 n, flags;     // FM_ALIGNED
  float gamma;
  int unused;
};

template <class T, class S, int N, bool PRODUCTS>
__device__ __forceinline__ void fw_step(const StepTask* tasks, const u32* first_block, u32 count) {
  FM_DYNAMIC_SHARED(float, partial);  // [2][256], with products
  FM_SHARED StepTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const bool aligned = (t.flags & FM_ALIGNED) != 0;
  const u32 most = FM_THREADS * FM_ELEMENTS;  // with products: a part of a sum block, as in fw_products
  const i64 begin = (i64)block * most;
  const u32 length = t.n - begin < most ? (u32)(t.n - begin) : most;
  T* theta = (T*)t.theta + begin;
  const S* s = t.s ? (const S*)t.s + begin : nullptr;
  float dot = 0.0f, square = 0.0f;
  for (u32 at = threadIdx.x * N; at < length; at += FM_THREADS * N) {
    float old[N], x[N];
    load_floats<T, N>(theta, at, length, aligned, old);
    if (s) load_floats<S, N>(s, at, length, aligned, x);
    Pack<T, N> y;
    float d[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      d[e] = (s ? x[e] : 0.0f) - old[e];
      y.item[e] = from_float<T>(old[e] + d[e] * t.gamma);
    }
    if (aligned && at + N <= length) store_pack<T, N>(theta + at, y);
    else
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (at + e < length) store(theta + at + e, y.item[e]);
    if constexpr (PRODUCTS) {
      float g[N];
      load_floats<float, N>((const float*)t.g + begin, at, length, aligned, g);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (at + e >= length) continue;
        dot += g[e] * d[e];
        square += d[e] * d[e];
      }
    }
  }
  if constexpr (PRODUCTS) {
    partial[threadIdx.x] = dot;
    partial[FM_THREADS + threadIdx.x] = square;
    __syncthreads();
    const u32 k = threadIdx.x / 32;
    if (k < 2) {
      const float sum = add_column(partial + k * FM_THREADS, threadIdx.x % 32);
      if (threadIdx.x % 32 == 0) store((float*)t.sums + k * ((t.n + (most - 1)) / most) + block, sum);
    }
  }
}

#define FM_STEP(X)                                                               \
  X(fw_step_kernel_f32_f32, StepTask, (fw_step<float, float, 4, false>))         \
  X(fw_step_kernel_f32_bf16, StepTask, (fw_step<float, bf16, 4, false>))         \
  X(fw_step_kernel_f32_f16, StepTask, (fw_step<float, f16, 4, false>))           \
  X(fw_step_kernel_bf16_bf16, StepTask, (fw_step<bf16, bf16, 8, false>))         \
  X(fw_step_kernel_f16_f16, StepTask, (fw_step<f16, f16, 8, false>))             \
  X(fw_step_products_kernel_f32_f32, StepTask, (fw_step<float, float, 4, true>)) \
  X(fw_step_products_kernel_f32_bf16, StepTask, (fw_step<float, bf16, 4, true>)) \
  X(fw_step_products_kernel_f32_f16, StepTask, (fw_step<float, f16, 4, true>))
FM_STEP(FM_KERNEL)
