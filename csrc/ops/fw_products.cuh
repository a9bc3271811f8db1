// fw_products on a GPU: <g, s_k>, |s_k|^2 and |g|^2 for K candidates, every byte read once.
//
// A block owns a part of a sum block (65536 elements): small enough that every multiprocessor is full. The part of the
// gradient waits in registers while the candidates' parts stream past it, two at a time so that both are in flight; a
// thread's sums lie in its own column of shared memory, so that K is a run-time number.
// Order is fixed: elements of a thread in index order, then lanes and warps in a tree: no float atomics. The totals
// kernel adds the parts of each sum block in float32, and the sum blocks to float64 totals in index order, continuing
// from the totals of the pieces before.
#pragma once
#include "../common/block_sum.cuh"

#define FM_TOGETHER 12  // candidates of one launch
#define FM_TOTALS 1024  // sum blocks that wait in shared memory to be added to a total
#define FM_NORMS 1

struct ProductsTask {
  u64 g, sums;         // sums: float [2K + 1][parts]: dots, squares (with FM_NORMS), |g|^2
  u64 s[FM_TOGETHER];  // the K candidates
  i64 n, candidates;
  i64 flags;  // FM_NORMS: squares too; FM_ALIGNED: all addresses are aligned for packs
};

// This thread's packs of a part of `length` elements, zeros beyond its end; `whole`: it is full and aligned.
template <class T, int N, int PACKS>
__device__ __forceinline__ void load_part(const T* part, u32 length, bool whole, Pack<T, N>* x) {
  if (whole) {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) x[p] = load_pack<T, N>(part + (p * FM_THREADS + threadIdx.x) * N);
  } else {
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const u32 at = (p * FM_THREADS + threadIdx.x) * N + e;
        x[p].item[e] = at < length ? load(part + at) : T();
      }
  }
}

// N elements per access: 16 bytes of the narrower type, at most 16 of the wider.
template <class G, class S, int N>
__device__ __forceinline__ void fw_products(const ProductsTask* tasks, const u32* first_block, u32 count) {
  const u32 LENGTH = FM_THREADS * FM_ELEMENTS;      // of a part
  const int PACKS = FM_ELEMENTS / N, TOGETHER = 2;  // three would take more than 64 registers
  FM_DYNAMIC_SHARED(float, partial);                // [2K + 1][256]
  FM_SHARED ProductsTask t;
  const u32 part = fetch_task(tasks, first_block, count, &t);
  const u32 candidates = (u32)t.candidates, width = 2 * candidates + 1;
  const bool norms = (t.flags & FM_NORMS) != 0;
  const i64 begin = (i64)part * LENGTH, parts = (t.n + (LENGTH - 1)) / LENGTH;
  const u32 length = t.n - begin < LENGTH ? (u32)(t.n - begin) : LENGTH;
  const bool whole = (t.flags & FM_ALIGNED) != 0 && length == LENGTH;
  float* column = partial + threadIdx.x;
  Pack<G, N> g[PACKS];
  load_part<G, N, PACKS>((const G*)t.g + begin, length, whole, g);
  for (u32 k = 0; k < candidates; k += TOGETHER) {
    Pack<S, N> x[TOGETHER][PACKS];
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j)
      if (k + j < candidates) load_part<S, N, PACKS>((const S*)t.s[k + j] + begin, length, whole, x[j]);
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) {
      if (k + j >= candidates) continue;
      float dot = 0.0f, own = 0.0f;
#pragma unroll
      for (int p = 0; p < PACKS; ++p)
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const float y = to_float(x[j][p].item[e]);
          dot += to_float(g[p].item[e]) * y;
          own += y * y;
        }
      column[(k + j) * FM_THREADS] = dot;
      if (norms) column[(candidates + k + j) * FM_THREADS] = own;
    }
  }
  float square = 0.0f;
#pragma unroll
  for (int p = 0; p < PACKS; ++p)
#pragma unroll
    for (int e = 0; e < N; ++e) square += to_float(g[p].item[e]) * to_float(g[p].item[e]);
  column[2 * candidates * FM_THREADS] = square;
  __syncthreads();
  for (u32 k = threadIdx.x / 32; k < width; k += FM_THREADS / 32) {
    if (!norms && k >= candidates && k < 2 * candidates) continue;
    const float sum = add_column(partial + k * FM_THREADS, threadIdx.x % 32);
    if (threadIdx.x % 32 == 0) store((float*)t.sums + k * parts + part, sum);
  }
}

struct TotalsTask {
  u64 sums;                     // float [columns][parts]
  u64 at[2 * FM_TOGETHER + 1];  // double: the columns' totals, added to; 0 for a column that is not wanted
  i64 parts, of_block;          // parts of each sum block (the last may have fewer)
};

// A block adds up one column.
__device__ __forceinline__ void fw_totals(const TotalsTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED TotalsTask t;
  FM_SHARED double waiting[FM_TOTALS];
  const u32 column = fetch_task(tasks, first_block, count, &t);
  double* at = (double*)t.at[column];
  if (!at) return;
  const float* sums = (const float*)t.sums + column * t.parts;
  const u32 of_block = (u32)t.of_block;
  double total = threadIdx.x == 0 ? load((const double*)at) : 0.0;
  for (i64 first = 0; first < t.parts; first += (i64)FM_TOTALS * of_block) {
    const i64 left = t.parts - first;
    const u32 here = left < (i64)FM_TOTALS * of_block ? (u32)left : FM_TOTALS * of_block;
    for (u32 b = threadIdx.x; b * of_block < here; b += FM_THREADS) {
      const u32 begin = b * of_block, end = begin + of_block < here ? begin + of_block : here;
      float sum = load(sums + first + begin);
#pragma unroll 8
      for (u32 i = begin + 1; i < end; ++i) sum += load(sums + first + i);
      waiting[b] = (double)sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 8
      for (u32 b = 0; b < (here + of_block - 1) / of_block; ++b) total += waiting[b];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) store(at, total);
}

#define FM_PRODUCTS(X)                                                        \
  X(fw_products_kernel_f32_f32, ProductsTask, (fw_products<float, float, 4>)) \
  X(fw_products_kernel_f32_bf16, ProductsTask, (fw_products<float, bf16, 4>)) \
  X(fw_products_kernel_f32_f16, ProductsTask, (fw_products<float, f16, 4>))   \
  X(fw_products_kernel_bf16_bf16, ProductsTask, (fw_products<bf16, bf16, 8>)) \
  X(fw_products_kernel_f16_f16, ProductsTask, (fw_products<f16, f16, 8>))     \
  X(fw_totals_kernel, TotalsTask, fw_totals)
FM_PRODUCTS(FM_KERNEL_OF_FOUR)
