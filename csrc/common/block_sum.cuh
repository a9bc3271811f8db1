// What fw_products and fw_step share: guarded loads as floats, and sums of a block's 256 partial sums in a fixed order.
#pragma once
#include "cuda.cuh"

// Sums are taken over blocks of 65536 elements; a CUDA block owns a part of one: 256 threads, 16 elements each.
#define FM_ELEMENTS 16
#define FM_ALIGNED 2  // a task's flag: all its addresses are aligned for packs

// N elements from index `at` of an array of n, zeros beyond its end, as floats.
template <class T, int N>
__device__ __forceinline__ void load_floats(const T* p, u32 at, u32 n, bool aligned, float* y) {
  if (aligned && at + N <= n) {
    const Pack<T, N> x = load_pack<T, N>(p + at);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = to_float(x.item[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = at + i < n ? to_float(load(p + at + i)) : 0.0f;
  }
}

// Adds the 256 partial sums of `column`, by one warp; every lane gets the result.
__device__ __forceinline__ float add_column(const float* column, u32 lane) {
  float x = column[lane];
#pragma unroll
  for (int i = 1; i < FM_THREADS / 32; ++i) x += column[lane + 32 * i];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
