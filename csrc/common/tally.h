// Counting and collecting keys against a bracket: the inner loops of selection.
//
// Story: a selection knows from a sample that its key lies in [lo, hi]. One pass counts the keys above hi and writes
// out the few inside with their positions; a selection among those few decides later. AVX-512 writes a vector's hits
// with one compress; elsewhere a vectorised count tells which groups of 64 hold any, and only those are walked.
#pragma once
#include <cstdint>

#include "avx512.h"

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
FM_SIMD inline std::int64_t count_inside(const std::uint32_t* key, std::int64_t n, std::uint32_t first,
                                         std::uint32_t count) {
  std::int32_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += key[i] - first < count;
  return c;
}
FM_SIMD inline std::int64_t count_inside(const std::uint64_t* key, std::int64_t n, std::uint64_t first,
                                         std::uint64_t count) {
  std::int64_t c = 0;
  for (std::int64_t i = 0; i < n; ++i) c += key[i] - first < count;
  return c;
}

template <class K>
std::int64_t collect_plain(const K* key, std::int64_t n, K first, K count, std::uint32_t at, K* out,
                           std::uint32_t* where) {
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

#ifdef FASTMERGE_AVX512
constexpr std::int64_t kListed = 2048;  // keys looked at before the vectors with hits are gone through

// Which vectors hold a hit is data: it is written to a list without a branch, and the list is gone through afterwards.
FM_AVX512 inline std::int64_t collect_avx512(const std::uint32_t* key, std::int64_t n, std::uint32_t first,
                                             std::uint32_t count, std::uint32_t at, std::uint32_t* out,
                                             std::uint32_t* where, std::uint32_t hi, std::int64_t& above) {
  const __m512i from = _mm512_set1_epi32(static_cast<int>(first)), width = _mm512_set1_epi32(static_cast<int>(count));
  const __m512i top = _mm512_set1_epi32(static_cast<int>(hi)), one = _mm512_set1_epi32(1);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  std::uint16_t hits[kListed / 16], vectors[kListed / 16];
  std::int64_t c = 0;
  for (std::int64_t begin = 0; begin < n; begin += kListed) {
    const std::int64_t end = n - begin < kListed ? n : begin + kListed;
    __m512i larger = _mm512_setzero_si512();
    const std::int64_t whole = begin + (end - begin) / 16 * 16;
    std::int64_t listed = 0;
    for (std::int64_t i = begin; i < whole; i += 16) {
      const __m512i v = _mm512_loadu_si512(key + i);
      larger = _mm512_mask_add_epi32(larger, _mm512_cmpgt_epi32_mask(v, top), larger, one);
      const __mmask16 hit = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(v, from), width);
      hits[listed] = hit;
      vectors[listed] = static_cast<std::uint16_t>(i - begin);
      listed += hit != 0;
    }
    alignas(64) std::int32_t sums[16];
    _mm512_store_si512(sums, larger);
    for (const std::int32_t v : sums) above += v;
    for (std::int64_t l = 0; l < listed; ++l) {
      const std::int64_t j = begin + vectors[l];
      const __mmask16 hit = hits[l];
      const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(at + j)));
      _mm512_storeu_si512(out + c, _mm512_maskz_compress_epi32(hit, _mm512_loadu_si512(key + j)));
      _mm512_storeu_si512(where + c, _mm512_maskz_compress_epi32(hit, index));
      c += __builtin_popcount(hit);
    }
    for (std::int64_t i = whole; i < end; ++i) {
      above += static_cast<std::int32_t>(key[i]) > static_cast<std::int32_t>(hi);
      out[c] = key[i];
      where[c] = at + static_cast<std::uint32_t>(i);
      c += key[i] - first < count;
    }
  }
  return c;
}
#endif
}  // namespace detail

constexpr std::int64_t kSlack = 16;  // entries that collect may write past the ones it counts

// Appends the keys inside to out, their positions at + i to where (both have room for n + kSlack), adds the number of
// keys greater than `hi` to above; returns how many were appended.
inline std::int64_t collect(const std::uint32_t* key, std::int64_t n, std::uint32_t first, std::uint32_t count,
                            std::uint32_t at, std::uint32_t* out, std::uint32_t* where, std::uint32_t hi,
                            std::int64_t& above) {
#ifdef FASTMERGE_AVX512
  if (has_avx512()) return detail::collect_avx512(key, n, first, count, at, out, where, hi, above);
#endif
  above += detail::count_above(key, n, hi);
  return detail::collect_plain(key, n, first, count, at, out, where);
}
inline std::int64_t collect(const std::uint64_t* key, std::int64_t n, std::uint64_t first, std::uint64_t count,
                            std::uint32_t at, std::uint64_t* out, std::uint32_t* where, std::uint64_t hi,
                            std::int64_t& above) {
  above += detail::count_above(key, n, hi);
  return detail::collect_plain(key, n, first, count, at, out, where);
}

}  // namespace fastmerge
