// Deltas against a bracket straight from their inputs: what tally.h does with keys, without writing the keys down.
//
// Story: the first pass of a selection looks at every element and keeps one in fifty. AVX-512 takes the difference, its
// key and three compares in registers; which vectors hold a hit is written to a list without a branch, and the list is
// gone through afterwards, when the inputs are still in L1. On the way the pass can write the mask of what lies above
// the bracket, so that a top-k mask needs no second look at the data: only the few inside are set later.
#pragma once
#include "keys.h"
#include "tally.h"
#include "wide.h"

#ifdef FASTMERGE_AVX512
namespace fastmerge::detail {

template <class T, bool kBase>
FM_WIDE __m512i key16(const T* x, const float* base) {
  const __m512 v = load16(x);
  const __m512 d = kBase ? _mm512_sub_ps(v, _mm512_loadu_ps(base)) : v;
  return _mm512_and_si512(_mm512_castps_si512(d), _mm512_set1_epi32(0x7fffffff));
}

// n keys, a multiple of 16 and at most kListed; as collect_avx512, and with kTied counts the keys equal to the
// bracket's ends. mark: 0/1 bytes of key > hi, or null; `stream` needs it aligned to 64 bytes. NaN keys are raw: hi is
// below Inf.
template <class T, bool kBase, bool kTied, bool kMark>
FM_AVX512 inline std::int64_t scan_listed(const T* x, const float* base, std::int64_t n,
                                          const Bracket<std::uint32_t>& b, std::uint32_t at, std::uint32_t* out,
                                          std::uint32_t* where, Counts& counts, std::uint8_t* mark, bool stream) {
  const __m512i from = _mm512_set1_epi32(static_cast<int>(b.first)),
                width = _mm512_set1_epi32(static_cast<int>(b.count));
  const __m512i top = _mm512_set1_epi32(static_cast<int>(b.hi)), bottom = _mm512_set1_epi32(static_cast<int>(b.lo));
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  std::uint16_t hits[kListed / 16], vectors[kListed / 16];
  std::int64_t listed = 0, above = 0, equal_hi = 0, equal_lo = 0;
  const auto look = [&](std::int64_t i) __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq"))) {
    const __m512i v = key16<T, kBase>(x + i, kBase ? base + i : nullptr);
    const __mmask16 hit = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(v, from), width);
    hits[listed] = hit;
    vectors[listed] = static_cast<std::uint16_t>(i);
    listed += hit != 0;
    if (kTied) {
      equal_hi += __builtin_popcount(_mm512_cmpeq_epi32_mask(v, top));
      equal_lo += __builtin_popcount(_mm512_cmpeq_epi32_mask(v, bottom));
    }
    return static_cast<std::uint64_t>(_mm512_cmpgt_epi32_mask(v, top));
  };
  std::int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    // The tile after this one: with several models in turn the prefetchers start anew at every tile. It never faults.
    for (std::int64_t line = 0; line < 64; line += 64 / sizeof(T))
      _mm_prefetch(reinterpret_cast<const char*>(x + i + kListed + line), _MM_HINT_T0);
    const std::uint64_t a = look(i), c = look(i + 16), e = look(i + 32), g = look(i + 48);
    const std::uint64_t larger = a | c << 16 | e << 32 | g << 48;
    above += __builtin_popcountll(larger);
    if (kMark) {
      const __m512i bytes = _mm512_maskz_set1_epi8(larger, 1);
      if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(mark + i), bytes);
      else _mm512_storeu_si512(mark + i, bytes);
    }
  }
  for (; i < n; i += 16) {
    const std::uint64_t larger = look(i);
    above += __builtin_popcountll(larger);
    if (kMark)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(mark + i), _mm_maskz_set1_epi8(static_cast<__mmask16>(larger), 1));
  }
  counts.above += above;
  counts.equal_hi += equal_hi;
  counts.equal_lo += equal_lo;
  std::int64_t c = 0;
  for (std::int64_t l = 0; l < listed; ++l) {
    const std::int64_t j = vectors[l];
    const __mmask16 hit = hits[l];
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(at + j)));
    _mm512_storeu_si512(out + c, _mm512_maskz_compress_epi32(hit, key16<T, kBase>(x + j, kBase ? base + j : nullptr)));
    _mm512_storeu_si512(where + c, _mm512_maskz_compress_epi32(hit, index));
    c += __builtin_popcount(hit);
  }
  return c;
}

// The same for any n up to kListed: the last vector is padded with zeros, which a bracket that surely lies above 0
// ignores.
template <class T, bool kBase>
std::int64_t scan(const T* x, const float* base, std::int64_t n, const Bracket<std::uint32_t>& b, std::uint32_t at,
                  std::uint32_t* out, std::uint32_t* where, Counts& counts, std::uint8_t* mark, bool stream) {
  const auto run = [&](const T* from, const float* origin, std::int64_t m, std::uint32_t first, std::int64_t c,
                       std::uint8_t* to) {
    if (to)
      return scan_listed<T, kBase, false, true>(from, origin, m, b, first, out + c, where + c, counts, to, stream);
    if (b.tied)
      return scan_listed<T, kBase, true, false>(from, origin, m, b, first, out + c, where + c, counts, to, stream);
    return scan_listed<T, kBase, false, false>(from, origin, m, b, first, out + c, where + c, counts, to, stream);
  };
  const std::int64_t whole = n / 16 * 16;
  std::int64_t c = run(x, base, whole, at, 0, mark);
  if (whole < n) {
    T last[16] = {};
    float origin[16] = {};
    std::uint8_t byte[16];
    std::copy(x + whole, x + n, last);
    if (kBase) std::copy(base + whole, base + n, origin);
    c += run(last, origin, 16, at + static_cast<std::uint32_t>(whole), c, mark ? byte : nullptr);
    if (mark) std::copy(byte, byte + (n - whole), mark + whole);
  }
  return c;
}

}  // namespace fastmerge::detail
#endif
