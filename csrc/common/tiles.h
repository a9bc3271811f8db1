// Permuted columns, several rows at a time: the rows are transposed into a scratch that stays in L2, where a column is
// one 32-byte vector; a permuted block is then those vectors in another order, transposed back. About half an
// instruction per element instead of the three (index, element, store) that picking elements one by one takes.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTMERGE_NO_CLONES)
#define FASTMERGE_TILES 1
#include <immintrin.h>
#define FM_AVX2 __attribute__((target("avx2")))

namespace fastmerge {

inline bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2");
  return yes;
}

namespace detail {
FM_AVX2 inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FM_AVX2 inline void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Eight rows of 16 words to columns k and 8 + k of them, one in each half of out[k].
FM_AVX2 inline void transpose_halves(const std::uint16_t* const* row, __m256i* out) {
  __m256i b[8], c[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i x = load32(row[2 * i]), y = load32(row[2 * i + 1]);
    b[2 * i] = _mm256_unpacklo_epi16(x, y);
    b[2 * i + 1] = _mm256_unpackhi_epi16(x, y);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    c[4 * i + 0] = _mm256_unpacklo_epi32(b[i], b[i + 2]);
    c[4 * i + 1] = _mm256_unpackhi_epi32(b[i], b[i + 2]);
    c[4 * i + 2] = _mm256_unpacklo_epi32(b[i + 4], b[i + 6]);
    c[4 * i + 3] = _mm256_unpackhi_epi32(b[i + 4], b[i + 6]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int at = i / 2 * 4 + i % 2;
    out[2 * i] = _mm256_unpacklo_epi64(c[at], c[at + 2]);
    out[2 * i + 1] = _mm256_unpackhi_epi64(c[at], c[at + 2]);
  }
}

// to[k * stride + i] = row[i][k] for a square tile of 32-byte rows.
FM_AVX2 inline void transpose_tile(const std::uint16_t* const* row, std::uint16_t* to, std::int64_t stride) {
  __m256i top[8], bottom[8];
  transpose_halves(row, top);
  transpose_halves(row + 8, bottom);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    store32(to + k * stride, _mm256_permute2x128_si256(top[k], bottom[k], 0x20));
    store32(to + (8 + k) * stride, _mm256_permute2x128_si256(top[k], bottom[k], 0x31));
  }
}

FM_AVX2 inline void transpose_tile(const std::uint32_t* const* row, std::uint32_t* to, std::int64_t stride) {
  __m256i b[8], c[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i x = load32(row[2 * i]), y = load32(row[2 * i + 1]);
    b[2 * i] = _mm256_unpacklo_epi32(x, y);
    b[2 * i + 1] = _mm256_unpackhi_epi32(x, y);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    c[4 * i + 0] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    c[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    c[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    c[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    store32(to + k * stride, _mm256_permute2x128_si256(c[k], c[k + 4], 0x20));
    store32(to + (4 + k) * stride, _mm256_permute2x128_si256(c[k], c[k + 4], 0x31));
  }
}
}  // namespace detail

template <class Word>
constexpr std::int64_t kTileRows = 32 / static_cast<std::int64_t>(sizeof(Word));

// scratch[c * R + i] = row[i][c] for R rows of `width`.
template <class Word>
FM_AVX2 void spread_rows(const Word* const* row, std::int64_t width, Word* scratch) {
  constexpr std::int64_t R = kTileRows<Word>;
  const Word* from[R];
  std::int64_t c = 0;
  for (; c + R <= width; c += R) {
    for (std::int64_t i = 0; i < R; ++i) from[i] = row[i] + c;
    detail::transpose_tile(from, scratch + c * R, R);
  }
  for (; c < width; ++c)
    for (std::int64_t i = 0; i < R; ++i) scratch[c * R + i] = row[i][c];
}

// to[i * stride + k] = column columns[k] of row i, k in [0, n), from what spread_rows made.
template <class Word>
FM_AVX2 void collect_columns(const Word* scratch, const std::int32_t* columns, std::int64_t n, Word* to,
                             std::int64_t stride) {
  constexpr std::int64_t R = kTileRows<Word>;
  const Word* from[R];
  std::int64_t k = 0;
  for (; k + R <= n; k += R) {
    for (std::int64_t i = 0; i < R; ++i) from[i] = scratch + columns[k + i] * R;
    detail::transpose_tile(from, to + k, stride);
  }
  for (; k < n; ++k)
    for (std::int64_t i = 0; i < R; ++i) to[i * stride + k] = scratch[columns[k] * R + i];
}

}  // namespace fastmerge
#endif
