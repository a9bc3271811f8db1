// fw_products on a GPU: <g, s_k>, |s_k|^2 and |g|^2 for K candidates, every byte read once.
//
// A block owns one sum block (65536 elements). A tile of the gradient waits in registers while each candidate's tile
// streams past it; the thread's partial sums live in its own column of shared memory, so that K is a run-time number.
// Order is fixed: elements of a thread in index order, then lanes and warps in a tree: no float atomics. The totals
// kernel adds the blocks' float32 sums to float64 totals in index order, continuing from the totals of the pieces
// before.
#pragma once
#include "../common/block_sum.cuh"

struct ProductsTask {
  u64 g, s;  // s: addresses of the K candidates
  u64 sums;  // float [blocks][2K + 1]: dots, squares, |g|^2
  i64 n, candidates;
  i64 flags;  // FM_NORMS: squares too; FM_ALIGNED: all addresses are aligned for packs
};
#define FM_NORMS 1

// N elements per access: 16 bytes of the narrower type, at most 16 of the wider.
template <class G, class S, int N>
__device__ __forceinline__ void fw_products(const ProductsTask* tasks, const u32* first_block, u32 count) {
  const int PACKS = FM_ELEMENTS / N;
  FM_DYNAMIC_SHARED(float, partial);  // [2K + 1][256]
  FM_SHARED ProductsTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const u32 candidates = (u32)t.candidates, width = 2 * candidates + 1;
  const bool aligned = (t.flags & FM_ALIGNED) != 0, norms = (t.flags & FM_NORMS) != 0;
  const i64 begin = (i64)block * FM_SUM_BLOCK;
  const u32 length = t.n - begin < FM_SUM_BLOCK ? (u32)(t.n - begin) : FM_SUM_BLOCK;
  const G* gradient = (const G*)t.g + begin;
  for (u32 k = 0; k < width; ++k) partial[k * FM_THREADS + threadIdx.x] = 0.0f;
  float square = 0.0f;
  for (u32 tile = threadIdx.x * N; tile < length; tile += FM_THREADS * FM_ELEMENTS) {
    float g[PACKS][N];
#pragma unroll
    for (int p = 0; p < PACKS; ++p) load_floats<G, N>(gradient, tile + p * FM_THREADS * N, length, aligned, g[p]);
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
      for (int e = 0; e < N; ++e) square += g[p][e] * g[p][e];
    for (u32 k = 0; k < candidates; ++k) {
      const S* s = (const S*)load((const u64*)t.s + k) + begin;
      float dot = 0.0f, own = 0.0f;
#pragma unroll
      for (int p = 0; p < PACKS; ++p) {
        float x[N];
        load_floats<S, N>(s, tile + p * FM_THREADS * N, length, aligned, x);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          dot += g[p][e] * x[e];
          own += x[e] * x[e];
        }
      }
      partial[k * FM_THREADS + threadIdx.x] += dot;
      if (norms) partial[(candidates + k) * FM_THREADS + threadIdx.x] += own;
    }
  }
  partial[2 * candidates * FM_THREADS + threadIdx.x] = square;
  __syncthreads();
  for (u32 k = threadIdx.x / 32; k < width; k += FM_THREADS / 32) {
    const float sum = add_column(partial + k * FM_THREADS, threadIdx.x % 32);
    if (threadIdx.x % 32 == 0) store((float*)t.sums + (i64)block * width + k, sum);
  }
}

struct TotalsTask {
  u64 sums;    // float [blocks][width]
  u64 totals;  // double [width], added to
  i64 blocks, width;
};

__device__ __forceinline__ void fw_totals(const TotalsTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED TotalsTask t;
  fetch_task(tasks, first_block, count, &t);
  for (i64 k = threadIdx.x; k < t.width; k += FM_THREADS) {
    double total = load((const double*)t.totals + k);
#pragma unroll 8
    for (i64 b = 0; b < t.blocks; ++b) total += (double)load((const float*)t.sums + b * t.width + k);
    store((double*)t.totals + k, total);
  }
}

#define FM_PRODUCTS(X)                                                        \
  X(fw_products_kernel_f32_f32, ProductsTask, (fw_products<float, float, 4>)) \
  X(fw_products_kernel_f32_bf16, ProductsTask, (fw_products<float, bf16, 4>)) \
  X(fw_products_kernel_f32_f16, ProductsTask, (fw_products<float, f16, 4>))   \
  X(fw_products_kernel_bf16_bf16, ProductsTask, (fw_products<bf16, bf16, 8>)) \
  X(fw_products_kernel_f16_f16, ProductsTask, (fw_products<f16, f16, 8>))     \
  X(fw_totals_kernel, TotalsTask, fw_totals)
FM_PRODUCTS(FM_KERNEL)
