// Sums over blocks of 65536 elements in a fixed order: in tiles of 2048, 64 lanes add every 64th element; the lanes of
// the tiles are added in order, the lanes of the block in a fixed tree (rounding errors of 32 + 32 + 6 additions).
// Blocks start at multiples of 65536 of a tensor, so neither threads nor the pieces a caller feeds change a bit.
#pragma once
#include <algorithm>

#include "block.h"

namespace fastmerge {

constexpr std::int64_t kSumBlock = 65536;  // fastmerge/ops/fw_products.py:BLOCK
constexpr int kLanes = 64;

namespace detail {
FM_INLINE float widened(float x) { return x; }
FM_INLINE float widened(bf16 x) { return to_float(x); }
FM_INLINE float widened(f16 x) { return to_float(x); }
FM_INLINE double widened(double x) { return x; }

// A few lines of what comes next, into L2: a hardware prefetcher restarts at every change of stream, and lines on their
// way from memory to L1 would keep its few miss registers from the loads of this tile. `ahead` may point past the end:
// a prefetch never faults. Where there is nothing to fetch it is x itself (an address without a page costs a page
// walk).
FM_INLINE void prefetch_lines(const void* ahead, std::int64_t at, std::int64_t bytes) {
  for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(ahead) + at + b, 0, 2);
}

// One tile: n <= kBlock, a multiple of kLanes.
template <class C, class T>
FM_INLINE void accumulate(const C* g, const T* x, std::int64_t n, const void* ahead, C* dot, C* square) {
  C d[kLanes] = {}, s[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    prefetch_lines(ahead, i * sizeof(T), kLanes * sizeof(T));
    for (int l = 0; l < kLanes; ++l) {
      const C v = widened(x[i + l]);
      d[l] += g[i + l] * v;
      s[l] += v * v;
    }
  }
  for (int l = 0; l < kLanes; ++l) dot[l] += d[l];
  for (int l = 0; l < kLanes; ++l) square[l] += s[l];
}
template <class C, class T>
FM_INLINE void accumulate(const C* g, const T* x, std::int64_t n, const void* ahead, C* dot) {
  C d[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    prefetch_lines(ahead, i * sizeof(T), kLanes * sizeof(T));
    for (int l = 0; l < kLanes; ++l) d[l] += g[i + l] * widened(x[i + l]);
  }
  for (int l = 0; l < kLanes; ++l) dot[l] += d[l];
}
}  // namespace detail

// dot += g·x and square += x·x, lane by lane.
FM_SIMD inline void add_products(const float* g, const float* x, std::int64_t n, const void* ahead, float* d,
                                 float* s) {
  detail::accumulate(g, x, n, ahead, d, s);
}
FM_SIMD inline void add_products(const float* g, const bf16* x, std::int64_t n, const void* ahead, float* d, float* s) {
  detail::accumulate(g, x, n, ahead, d, s);
}
FM_SIMD inline void add_products(const float* g, const f16* x, std::int64_t n, const void* ahead, float* d, float* s) {
  detail::accumulate(g, x, n, ahead, d, s);
}
FM_SIMD inline void add_products(const double* g, const double* x, std::int64_t n, const void* ahead, double* d,
                                 double* s) {
  detail::accumulate(g, x, n, ahead, d, s);
}
FM_SIMD inline void add_products(const float* g, const float* x, std::int64_t n, const void* ahead, float* d) {
  detail::accumulate(g, x, n, ahead, d);
}
FM_SIMD inline void add_products(const float* g, const bf16* x, std::int64_t n, const void* ahead, float* d) {
  detail::accumulate(g, x, n, ahead, d);
}
FM_SIMD inline void add_products(const float* g, const f16* x, std::int64_t n, const void* ahead, float* d) {
  detail::accumulate(g, x, n, ahead, d);
}
FM_SIMD inline void add_products(const double* g, const double* x, std::int64_t n, const void* ahead, double* d) {
  detail::accumulate(g, x, n, ahead, d);
}

template <class C>
C add_lanes(const C* lanes) {
  C x[kLanes];
  std::copy(lanes, lanes + kLanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) x[l] += x[l + width];
  return x[0];
}

inline std::int64_t ceil_to_lanes(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// n elements in a buffer padded with zeros to a multiple of the lanes.
template <class C>
const C* padded(const C* x, std::int64_t n, C* buffer) {
  if (n % kLanes == 0) return x;
  if (x != buffer) std::copy(x, x + n, buffer);
  std::fill(buffer + n, buffer + ceil_to_lanes(n), C(0));
  return buffer;
}

}  // namespace fastmerge
