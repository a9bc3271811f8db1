// What every CUDA kernel starts from. One source, three compilers: nvcc (in the wheel), NVRTC (through CuPy; no headers
// there, so none are included), and g++ with the emulator of tests/kernels, which defines the CUDA words itself.
//
// All kernels have one signature, kernel(tasks, first_block, count): `tasks` describes `count` tensors, and tensor i
// owns the blocks [first_block[i], first_block[i + 1]) of the grid. One launch serves a whole list of tensors, and one
// launcher serves every kernel.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FM_THREADS 256

#ifndef FM_EMULATOR
#define FM_SHARED __shared__
#define FM_DYNAMIC_SHARED(T, name)     \
  extern __shared__ uint4 fm_shared[]; \
  T* name = (T*)fm_shared
// An entry point: three arguments of 8, 8 and 4 bytes, whatever the kernel.
#define FM_BOUNDED_KERNEL(bounds, name, Task, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__ bounds name(const Task* tasks, const u32* first_block, u32 count) { \
    __VA_ARGS__(tasks, first_block, count);                                                                        \
  }
#define FM_KERNEL(...) FM_BOUNDED_KERNEL((FM_THREADS), __VA_ARGS__)
// One that leaves room for four blocks on a multiprocessor: at most 64 registers.
#define FM_KERNEL_OF_FOUR(...) FM_BOUNDED_KERNEL((FM_THREADS, 4), __VA_ARGS__)
#else
#define FM_KERNEL_OF_FOUR(...) FM_KERNEL(__VA_ARGS__)
#endif

// Global memory goes through these two, so that the emulator can count bytes and sectors. (Addresses come out of a
// table, so from sm_100 on the compiler emits generic accesses; assuming __isGlobal would avoid them, but crashes
// NVRTC 13.0.)
#ifndef FM_EMULATOR
template <class T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, T v) {
  *p = v;
}
#endif

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const u32 magnitude = x.bits & 0x7fffu, sign = (u32)(x.bits & 0x8000u) << 16;
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // moves the exponent bias, exact for subnormals
  const u32 special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? 0x00400000u : 0u);
  return __uint_as_float((magnitude >= 0x7c00u ? special : __float_as_uint(scaled)) | sign);
#endif
}

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  const u32 u = __float_as_uint(x);
  const u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  bf16 y;
  y.bits = (u16)((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
  return y;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  f16 y;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const u32 u = __float_as_uint(x), a = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const u32 normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  const u32 tiny = __float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000u;  // the FPU rounds to the subnormal grid
  u32 h = a < 0x38800000u ? tiny : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x1ffu)) : h;
  y.bits = (u16)(h | sign);
#endif
  return y;
}

// BYTES of memory in one access.
template <int BYTES>
struct Words;
template <>
struct Words<16> {
  typedef uint4 type;
};
template <>
struct Words<8> {
  typedef uint2 type;
};
template <>
struct Words<4> {
  typedef u32 type;
};
template <>
struct Words<2> {
  typedef u16 type;
};

// N elements of T that are loaded and stored together.
template <class T, int N>
struct Pack {
  typedef typename Words<N * sizeof(T)>::type Word;
  union {
    Word word;
    T item[N];
  };
  __device__ __forceinline__ Pack() {}
};
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  Pack<T, N> x;
  x.word = load((const typename Pack<T, N>::Word*)p);
  return x;
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& x) {
  store((typename Pack<T, N>::Word*)p, x.word);
}

// Finds the task that owns this block (the last i with first_block[i] <= blockIdx.x), puts its descriptor in shared
// memory once for all threads, and returns the block's number within the task.
template <class Task>
__device__ __forceinline__ u32 fetch_task(const Task* tasks, const u32* first_block, u32 count, Task* task) {
  FM_SHARED u32 found[2];
  if (threadIdx.x == 0) {
    u32 low = 0, high = count;
    while (high - low > 1) {
      const u32 middle = (low + high) / 2;
      if (load(first_block + middle) <= blockIdx.x) low = middle;
      else high = middle;
    }
    found[0] = low;
    found[1] = blockIdx.x - load(first_block + low);
  }
  __syncthreads();
  if (threadIdx.x < sizeof(Task) / 8) ((u64*)task)[threadIdx.x] = load((const u64*)(tasks + found[0]) + threadIdx.x);
  __syncthreads();
  return found[1];
}
