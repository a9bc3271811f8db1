// permute and permute_merge on a GPU.
//
// Three kernels. `rows`: the result is rows of contiguous elements, each with its own source row; a row is moved with
// 16-byte accesses, whatever it is made of. `columns`: the elements of a row are permuted too; source rows are staged
// in shared memory with full-width loads, picked from there in the order of the result and written with full-width
// stores, so that device memory sees only whole sectors; the column table is read once for the several rows of a block.
// `cycles`: rows in place; a cycle is cut into segments whose first rows were saved before, so that all segments run at
// once. Merging differs from copying only in what is stored: wb * base + wx * x, rounded once.
#pragma once
#include "../common/cuda.cuh"

struct PermuteTask {
  u64 out, in, base;       // addresses; base is 0 when copying
  u64 index[4];            // of each leading dimension: int32 addresses, 0 = in order
  i64 size[4], stride[4];  // leading dimensions, outermost first; strides in elements of the source
  u64 columns;             // uint16 or int32 source column of each column, 0 = in order
  i64 rows, width;         // the result
  i64 lanes;               // rows: threads along a row; columns: rows per block
  i64 segments;            // rows: blocks along a row
  i64 flags;               // FM_NARROW: columns are uint16; FM_WIDE: rows may be accessed 16 bytes at a time
  float wb, wx;
};
#define FM_NARROW 1
#define FM_WIDE 2
#define FM_STAGED 4
#define FM_UNROLL 4

__device__ __forceinline__ i64 source_row(const PermuteTask& t, u32 row) {
  i64 at = 0;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const u32 size = (u32)t.size[d];
    if (size == 1) continue;
    const u32 above = row / size, i = row - above * size;
    at += (t.index[d] ? (i64)load((const int*)t.index[d] + i) : (i64)i) * t.stride[d];
    row = above;
  }
  return at;
}

// What is stored for source elements x: themselves (T is then just a size), or their mean with the base's.
template <class T, int N, bool MERGE>
struct Combine {
  static __device__ __forceinline__ Pack<T, N> run(const PermuteTask&, i64, const Pack<T, N>& x) { return x; }
};
template <class T, int N>
struct Combine<T, N, true> {
  static __device__ __forceinline__ Pack<T, N> run(const PermuteTask& t, i64 at, Pack<T, N> x) {
    const Pack<T, N> b = load_pack<T, N>((const T*)t.base + at);
#pragma unroll
    for (int i = 0; i < N; ++i) x.item[i] = from_float<T>(to_float(b.item[i]) * t.wb + to_float(x.item[i]) * t.wx);
    return x;
  }
};

template <class T, int N, bool MERGE>
__device__ __forceinline__ void permute_rows(const PermuteTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED PermuteTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const u32 lanes = (u32)t.lanes, segments = (u32)t.segments;
  const u32 tile = block / segments, segment = block - tile * segments;
  const u32 row = tile * (FM_THREADS / lanes) + threadIdx.x / lanes;
  if (row >= (u32)t.rows) return;
  const i64 packs = t.width / N, first = (i64)segment * lanes * FM_UNROLL + threadIdx.x % lanes;
  const T* in = (const T*)t.in + source_row(t, row);
  const i64 at = (i64)row * t.width;
  Pack<T, N> x[FM_UNROLL];
#pragma unroll
  for (int u = 0; u < FM_UNROLL; ++u)
    if (first + u * lanes < packs) x[u] = load_pack<T, N>(in + (first + u * lanes) * N);
#pragma unroll
  for (int u = 0; u < FM_UNROLL; ++u) {
    const i64 p = first + u * lanes;
    if (p < packs) store_pack<T, N>((T*)t.out + at + p * N, Combine<T, N, MERGE>::run(t, at + p * N, x[u]));
  }
}

// Stages up to t.lanes rows and writes them with their columns permuted; rows too long for shared memory are picked
// from device memory.
template <class T, bool MERGE>
__device__ __forceinline__ void permute_columns(const PermuteTask* tasks, const u32* first_block, u32 count) {
  const int N = 16 / sizeof(T);
  FM_DYNAMIC_SHARED(T, stage);
  FM_SHARED PermuteTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const u32 first = block * (u32)t.lanes;
  const u32 rows = (u32)t.rows - first < (u32)t.lanes ? (u32)t.rows - first : (u32)t.lanes;
  const u32 width = (u32)t.width;
  const bool wide = (t.flags & FM_WIDE) != 0, narrow = (t.flags & FM_NARROW) != 0, staged = (t.flags & FM_STAGED) != 0;
  if (staged) {
    for (u32 r = 0; r < rows; ++r) {
      const T* in = (const T*)t.in + source_row(t, first + r);
      T* row = stage + (i64)r * width;
      if (wide)
        for (u32 c = threadIdx.x * N; c < width; c += FM_THREADS * N) *(uint4*)(row + c) = load((const uint4*)(in + c));
      else
        for (u32 c = threadIdx.x; c < width; c += FM_THREADS) row[c] = load(in + c);
    }
    __syncthreads();
  }
  const u16* narrow_columns = (const u16*)t.columns;
  const int* columns = (const int*)t.columns;
  if (wide) {
    for (u32 c = threadIdx.x * N; c < width; c += FM_THREADS * N) {
      u32 from[N];
      if (narrow) {
        const Pack<u16, N> p = load_pack<u16, N>(narrow_columns + c);
#pragma unroll
        for (int k = 0; k < N; ++k) from[k] = p.item[k];
      } else {
#pragma unroll
        for (int k = 0; k < N; k += 2) {
          const Pack<int, 2> p = load_pack<int, 2>(columns + c + k);
          from[k] = p.item[0];
          from[k + 1] = p.item[1];
        }
      }
      for (u32 r = 0; r < rows; ++r) {
        const T* row = staged ? stage + (i64)r * width : (const T*)t.in + source_row(t, first + r);
        Pack<T, N> x;
#pragma unroll
        for (int k = 0; k < N; ++k) x.item[k] = staged ? row[from[k]] : load(row + from[k]);
        const i64 at = (i64)(first + r) * width + c;
        store_pack<T, N>((T*)t.out + at, Combine<T, N, MERGE>::run(t, at, x));
      }
    }
    return;
  }
  for (u32 c = threadIdx.x; c < width; c += FM_THREADS) {
    const u32 from = narrow ? (u32)load(narrow_columns + c) : (u32)load(columns + c);
    for (u32 r = 0; r < rows; ++r) {
      Pack<T, 1> x;
      x.item[0] = staged ? stage[(i64)r * width + from] : load((const T*)t.in + source_row(t, first + r) + from);
      const i64 at = (i64)(first + r) * width + c;
      store_pack<T, 1>((T*)t.out + at, Combine<T, 1, MERGE>::run(t, at, x));
    }
  }
}

struct CycleTask {
  u64 x, saved;            // the tensor [outer][n][width]; the segments' first rows [outer][segments][width]
  u64 order;               // int32: the rows of the segments, one after the other, each in the order of its cycle
  u64 bounds;              // int32 [segments + 1]: where each segment's rows start in `order`
  u64 next;                // int32 [segments]: which saved row a segment's last row takes
  i64 n, width, segments;  // width counts words
  i64 lanes, tiles;        // threads along a row; blocks along a row
};

// Every segment's row k takes row k + 1; its last row takes the first row of the next segment, as it was.
template <class Word>
__device__ __forceinline__ void permute_cycles(const CycleTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED CycleTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const u32 lanes = (u32)t.lanes, tiles = (u32)t.tiles, groups = FM_THREADS / lanes;
  const u32 tile = block % tiles;
  const u32 slots = ((u32)t.segments + groups - 1) / groups, outer = block / tiles / slots;
  const u32 segment = block / tiles % slots * groups + threadIdx.x / lanes;
  const i64 column = (i64)tile * lanes + threadIdx.x % lanes;
  if (segment >= (u32)t.segments || column >= t.width) return;
  Word* x = (Word*)t.x + (i64)outer * t.n * t.width + column;
  const int* order = (const int*)t.order;
  const int end = load((const int*)t.bounds + segment + 1);
  int k = load((const int*)t.bounds + segment);
  for (; k + FM_UNROLL < end; k += FM_UNROLL) {  // several rows in flight: they are distinct, so reading ahead is safe
    Word ahead[FM_UNROLL];
#pragma unroll
    for (int u = 0; u < FM_UNROLL; ++u) ahead[u] = load(x + load(order + k + u + 1) * t.width);
#pragma unroll
    for (int u = 0; u < FM_UNROLL; ++u) store(x + load(order + k + u) * t.width, ahead[u]);
  }
  for (; k + 1 < end; ++k) store(x + load(order + k) * t.width, load(x + load(order + k + 1) * t.width));
  const Word* saved =
      (const Word*)t.saved + ((i64)outer * t.segments + load((const int*)t.next + segment)) * t.width + column;
  store(x + load(order + k) * t.width, load(saved));
}

struct CheckTask {
  u64 index;  // int32
  u64 seen;   // one zeroed bit per entry
  u64 wrong;  // int32, set to 1
  i64 n;
};

// Whether an index holds each of 0 ... n - 1 once.
__device__ __forceinline__ void check_permutation(const CheckTask* tasks, const u32* first_block, u32 count) {
  FM_SHARED CheckTask t;
  const u32 block = fetch_task(tasks, first_block, count, &t);
  const i64 at = (i64)block * FM_THREADS + threadIdx.x;
  if (at >= t.n) return;
  const int v = load((const int*)t.index + at);
  if (v < 0 || v >= t.n) {
    atomicOr((u32*)t.wrong, 1u);
    return;
  }
  const u32 bit = 1u << (v & 31);
  if (atomicOr((u32*)t.seen + (v >> 5), bit) & bit) atomicOr((u32*)t.wrong, 1u);
}

#define FM_PERMUTE(X)                                                              \
  X(permute_rows_kernel_16, PermuteTask, (permute_rows<u16, 8, false>))            \
  X(permute_rows_kernel_8, PermuteTask, (permute_rows<u16, 4, false>))             \
  X(permute_rows_kernel_4, PermuteTask, (permute_rows<u16, 2, false>))             \
  X(permute_rows_kernel_2, PermuteTask, (permute_rows<u16, 1, false>))             \
  X(permute_columns_kernel_4, PermuteTask, (permute_columns<u32, false>))          \
  X(permute_columns_kernel_2, PermuteTask, (permute_columns<u16, false>))          \
  X(permute_merge_rows_kernel_f32, PermuteTask, (permute_rows<float, 4, true>))    \
  X(permute_merge_rows_kernel_f32_1, PermuteTask, (permute_rows<float, 1, true>))  \
  X(permute_merge_rows_kernel_bf16, PermuteTask, (permute_rows<bf16, 8, true>))    \
  X(permute_merge_rows_kernel_bf16_1, PermuteTask, (permute_rows<bf16, 1, true>))  \
  X(permute_merge_rows_kernel_f16, PermuteTask, (permute_rows<f16, 8, true>))      \
  X(permute_merge_rows_kernel_f16_1, PermuteTask, (permute_rows<f16, 1, true>))    \
  X(permute_merge_columns_kernel_f32, PermuteTask, (permute_columns<float, true>)) \
  X(permute_merge_columns_kernel_bf16, PermuteTask, (permute_columns<bf16, true>)) \
  X(permute_merge_columns_kernel_f16, PermuteTask, (permute_columns<f16, true>))   \
  X(permute_cycles_kernel_16, CycleTask, (permute_cycles<uint4>))                  \
  X(permute_cycles_kernel_2, CycleTask, (permute_cycles<u16>))                     \
  X(check_permutation_kernel, CheckTask, check_permutation)
FM_PERMUTE(FM_KERNEL)
