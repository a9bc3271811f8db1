// Kernels with a planted bug each: the harness must see them.
#pragma once
#include "common/cuda.cuh"

struct PlantedTask { u64 in, out; i64 n; };

// Reverses a block of 256 floats through shared memory. Correct.
__device__ inline void reverse_ok(const PlantedTask* tasks, const u32*, u32) {
  FM_DYNAMIC_SHARED(float, stage);
  stage[threadIdx.x] = load((const float*)tasks->in + threadIdx.x);
  __syncthreads();
  store((float*)tasks->out + threadIdx.x, stage[255 - threadIdx.x]);
}
// The barrier is missing.
__device__ inline void reverse_race(const PlantedTask* tasks, const u32*, u32) {
  FM_DYNAMIC_SHARED(float, stage);
  stage[threadIdx.x] = load((const float*)tasks->in + threadIdx.x);
  store((float*)tasks->out + threadIdx.x, stage[255 - threadIdx.x]);
}
// One element past the end.
__device__ inline void copy_overrun(const PlantedTask* tasks, const u32*, u32) {
  for (i64 i = threadIdx.x; i <= tasks->n; i += 256) store((float*)tasks->out + i, load((const float*)tasks->in + i));
}
// Shared memory, past what the launch asked for.
__device__ inline void shared_overrun(const PlantedTask* tasks, const u32*, u32) {
  FM_DYNAMIC_SHARED(float, stage);
  stage[threadIdx.x + 1] = load((const float*)tasks->in + threadIdx.x);
  __syncthreads();
  store((float*)tasks->out + threadIdx.x, stage[threadIdx.x]);
}
// Half the threads skip the barrier.
__device__ inline void barrier_skipped(const PlantedTask*, const u32*, u32) {
  if (threadIdx.x < 128) __syncthreads();
}
// A 16-byte access at an address that is a multiple of 4.
__device__ inline void misaligned(const PlantedTask* tasks, const u32*, u32) {
  store((uint4*)tasks->out, load((const uint4*)((const float*)tasks->in + 1)));
}
// Signed overflow.
__device__ inline void overflow(const PlantedTask* tasks, const u32*, u32) {
  int x = 2147483647 - 100 + (int)tasks->n;
  x += (int)threadIdx.x;
  store((int*)tasks->out + threadIdx.x, x);
}
// Strided access: every sector is fetched for one float.
__device__ inline void strided_copy(const PlantedTask* tasks, const u32*, u32) {
  store((float*)tasks->out + threadIdx.x * 8, load((const float*)tasks->in + threadIdx.x * 8));
}
FM_KERNEL(reverse_ok_kernel, PlantedTask, reverse_ok)
FM_KERNEL(reverse_race_kernel, PlantedTask, reverse_race)
FM_KERNEL(copy_overrun_kernel, PlantedTask, copy_overrun)
FM_KERNEL(shared_overrun_kernel, PlantedTask, shared_overrun)
FM_KERNEL(barrier_skipped_kernel, PlantedTask, barrier_skipped)
FM_KERNEL(misaligned_kernel, PlantedTask, misaligned)
FM_KERNEL(overflow_kernel, PlantedTask, overflow)
FM_KERNEL(strided_copy_kernel, PlantedTask, strided_copy)
