// Counting and collecting keys against a bracket: the inner loops of selection.
//
// Story: a selection knows from a sample that its key lies in [lo, hi]. One pass counts the keys above hi and writes out the
// few inside with their positions; which ones, a sort of those few decides later. AVX-512 writes a vector's hits with one
// compress; elsewhere a vectorised count tells which groups of 64 hold any, and only those are walked.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTMERGE_NO_CLONES)
#define FASTMERGE_COMPRESS 1
#include <immintrin.h>
#endif

namespace fastmerge {

// Collects keys with first <= key < first + count (unsigned); counts those above `hi`, and equal to `hi` and `lo`.
template <class K>
struct Bracket {
  K lo, hi, first, count;
  bool tied;  // lo and hi are heavy values: count them instead of collecting them
};

struct Counts {
  std::int64_t above = 0, equal_hi = 0, equal_lo = 0;
};

namespace detail {
FM_SIMD inline std::int64_t count_above(const std::uint32_t* key, std::int64_t n, std::uint32_t t) {
  std::int32_t c = 0;  // blocks are short
  for (std::int64_t i = 0; i < n; ++i) c += static_cast<std::int32_t>(key[i]) > static_cast<std::int32_t>(t);
  return c;
}
FM_SIMD inline std::int64_t count_above(const std::uint64_t* key, std::int64_t n, std::uint64_t t) {
  std::int64_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += static_cast<std::int64_t>(key[i]) > static_cast<std::int64_t>(t);
  return c;
}
FM_SIMD inline std::int64_t count_equal(const std::uint32_t* key, std::int64_t n, std::uint32_t t) {
  std::int32_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += key[i] == t;
  return c;
}
FM_SIMD inline std::int64_t count_equal(const std::uint64_t* key, std::int64_t n, std::uint64_t t) {
  std::int64_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += key[i] == t;
  return c;
}
FM_SIMD inline std::int64_t count_inside(const std::uint32_t* key, std::int64_t n, std::uint32_t first, std::uint32_t count) {
  std::int32_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += key[i] - first < count;
  return c;
}
FM_SIMD inline std::int64_t count_inside(const std::uint64_t* key, std::int64_t n, std::uint64_t first, std::uint64_t count) {
  std::int64_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += key[i] - first < count;
  return c;
}

template <class K>
std::int64_t collect_plain(const K* key, std::int64_t n, K first, K count, std::uint32_t at, K* out, std::uint32_t* where) {
  std::int64_t c = 0;
  for (std::int64_t g = 0; g < n; g += 64) {
    const std::int64_t m = n - g < 64 ? n - g : 64;
    if (!count_inside(key + g, m, first, count)) continue;
    for (std::int64_t i = g; i < g + m; ++i) {
      out[c] = key[i];
      where[c] = at + static_cast<std::uint32_t>(i);
      c += key[i] - first < count;
    }
  }
  return c;
}

#ifdef FASTMERGE_COMPRESS
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) inline std::int64_t collect_avx512(
    const std::uint32_t* key, std::int64_t n, std::uint32_t first, std::uint32_t count, std::uint32_t at,
    std::uint32_t* out, std::uint32_t* where) {
  const __m512i from = _mm512_set1_epi32(static_cast<int>(first)), width = _mm512_set1_epi32(static_cast<int>(count));
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  std::int64_t c = 0;
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512i v = _mm512_maskz_loadu_epi32(valid, key + i);
    const __mmask16 hit = _mm512_mask_cmplt_epu32_mask(valid, _mm512_sub_epi32(v, from), width);
    if (!hit) continue;
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(at + i)));
    _mm512_storeu_si512(out + c, _mm512_maskz_compress_epi32(hit, v));
    _mm512_storeu_si512(where + c, _mm512_maskz_compress_epi32(hit, index));
    c += __builtin_popcount(hit);
  }
  return c;
}
inline bool has_compress() {
  static const bool yes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return yes;
}
#endif
}  // namespace detail

constexpr std::int64_t kSlack = 16;  // entries that collect may write past the ones it counts

// Appends the keys inside to out, their positions at + i to where; both have room for n + kSlack. Returns how many.
inline std::int64_t collect(const std::uint32_t* key, std::int64_t n, std::uint32_t first, std::uint32_t count,
                            std::uint32_t at, std::uint32_t* out, std::uint32_t* where) {
#ifdef FASTMERGE_COMPRESS
  if (detail::has_compress()) return detail::collect_avx512(key, n, first, count, at, out, where);
#endif
  return detail::collect_plain(key, n, first, count, at, out, where);
}
inline std::int64_t collect(const std::uint64_t* key, std::int64_t n, std::uint64_t first, std::uint64_t count,
                            std::uint32_t at, std::uint64_t* out, std::uint32_t* where) {
  return detail::collect_plain(key, n, first, count, at, out, where);
}

}  // namespace fastmerge
