// The tiles of block_sum.h with AVX-512: the same sums in the same order, so the same bits, with the conversions of
// wide.h. Up to eight arrays pass a tile together: their streams advance side by side, more lines are on their way from
// memory at once, and one load of the gradient serves all of them.
#pragma once
#include "block_sum.h"
#include "wide.h"

namespace fastmerge {

constexpr int kTogether = 8;         // arrays; their sums are 32 registers, so a few live in L1: it does not show
constexpr int kTogetherSquares = 4;  // arrays of which squares are taken too: as many sums

#ifdef FASTMERGE_AVX512
// Bytes, into L2: 8 to 32 KB take the same time, 2 up to 5 % more, 1 more still; into L1 all do.
constexpr std::int64_t kFetchAhead = 8192;

namespace detail {
// Sums of four registers added to 64 lanes.
FM_WIDE void add_to_lanes(float* lanes, const __m512* sum) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) _mm512_storeu_ps(lanes + 16 * j, _mm512_add_ps(_mm512_loadu_ps(lanes + 16 * j), sum[j]));
}

// g·x (and x·x) of the tiles at + [0, n) of K arrays; n is a multiple of the lanes. lanes: [K][2][64].
template <class T, int K, bool kSquares>
FM_AVX512 void products_avx512(const float* g, const std::uintptr_t* address, std::int64_t at, std::int64_t n,
                               float* lanes) {
  __m512 dot[K][4], square[K][4];
  const T* x[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    x[k] = reinterpret_cast<const T*>(address[k]) + at;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) dot[k][j] = square[k][j] = _mm512_setzero_ps();
  }
  for (std::int64_t i = 0; i < n; i += kLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) prefetch_lines(x[k] + i, kFetchAhead, kLanes * sizeof(T));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 a = _mm512_loadu_ps(g + i + 16 * j);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const __m512 v = load16(x[k] + i + 16 * j);
        dot[k][j] = _mm512_add_ps(dot[k][j], _mm512_mul_ps(a, v));
        if (kSquares) square[k][j] = _mm512_add_ps(square[k][j], _mm512_mul_ps(v, v));
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    add_to_lanes(lanes + 2 * k * kLanes, dot[k]);
    if (kSquares) add_to_lanes(lanes + (2 * k + 1) * kLanes, square[k]);
  }
}

template <class T>
void products_wide(const float* g, const std::uintptr_t* x, std::size_t count, bool squares, std::int64_t at,
                   std::int64_t n, float* lanes) {
  using F = void (*)(const float*, const std::uintptr_t*, std::int64_t, std::int64_t, float*);
  static constexpr F dots[] = {products_avx512<T, 1, false>, products_avx512<T, 2, false>, products_avx512<T, 3, false>,
                               products_avx512<T, 4, false>, products_avx512<T, 5, false>, products_avx512<T, 6, false>,
                               products_avx512<T, 7, false>, products_avx512<T, 8, false>};
  static constexpr F both[] = {products_avx512<T, 1, true>, products_avx512<T, 2, true>, products_avx512<T, 3, true>,
                               products_avx512<T, 4, true>};
  (squares ? both : dots)[count - 1](g, x, at, n, lanes);
}

template <class T>
FM_AVX512 void widen_avx512(const T* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 16) {
    if (i % kLanes == 0) prefetch_lines(x + i, kFetchAhead, kLanes * sizeof(T));
    _mm512_storeu_ps(y + i, load16(x + i));
  }
}
}  // namespace detail

// load_block of whole lanes.
inline const float* load_wide(Dtype t, std::uintptr_t address, std::int64_t at, std::int64_t n, float* buffer) {
  if (t == Dtype::bf16) detail::widen_avx512(reinterpret_cast<const bf16*>(address) + at, buffer, n);
  else if (t == Dtype::f16) detail::widen_avx512(reinterpret_cast<const f16*>(address) + at, buffer, n);
  else return load_block(t, address, at, n, buffer);
  return buffer;
}

// Arrays of one dtype, not float64; at most kTogether of them, kTogetherSquares with squares. lanes: [count][2][64].
inline void add_products_wide(const float* g, Dtype t, const std::uintptr_t* x, std::size_t count, bool squares,
                              std::int64_t at, std::int64_t n, float* lanes) {
  dispatch(t, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) detail::products_wide<T>(g, x, count, squares, at, n, lanes);
  });
}

#endif
}  // namespace fastmerge
