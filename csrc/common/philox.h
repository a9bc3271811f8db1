// Counter-based random draws, as fastmerge/ops/philox.py defines them: element i of stream s owns a 32-bit draw of two
// 16-bit digits, and one Philox-4x32-10 call gives one digit of eight neighbours.
//
// The first digit settles all elements but one in 65536, so a mask costs one call for eight elements; the few undecided
// get their second digit one by one.
#pragma once
#include <cstdint>

#include "avx512.h"

namespace fastmerge {

struct DrawKey {
  std::uint32_t k0, k1, stream;
};

namespace detail {
// Digit `digit` of elements [8 call, 8 (call + calls)).
FM_SIMD inline void philox_plain(DrawKey key, std::uint64_t call, std::uint32_t digit, std::uint16_t* out, std::int64_t calls) {
  for (std::int64_t i = 0; i < calls; ++i) {
    const std::uint64_t n = call + static_cast<std::uint64_t>(i);
    std::uint32_t c0 = static_cast<std::uint32_t>(n), c1 = static_cast<std::uint32_t>(n >> 32), c2 = key.stream, c3 = digit;
    std::uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<std::uint32_t>(p1);
      c3 = static_cast<std::uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[8 * i + 0] = static_cast<std::uint16_t>(c0);
    out[8 * i + 1] = static_cast<std::uint16_t>(c0 >> 16);
    out[8 * i + 2] = static_cast<std::uint16_t>(c1);
    out[8 * i + 3] = static_cast<std::uint16_t>(c1 >> 16);
    out[8 * i + 4] = static_cast<std::uint16_t>(c2);
    out[8 * i + 5] = static_cast<std::uint16_t>(c2 >> 16);
    out[8 * i + 6] = static_cast<std::uint16_t>(c3);
    out[8 * i + 7] = static_cast<std::uint16_t>(c3 >> 16);
  }
}

#ifdef FASTMERGE_AVX512
// Words live in the low halves of 64-bit lanes; the multiplier ignores the high halves, so products need no masking.
FM_AVX512 inline void philox_avx512(
    DrawKey key, std::uint64_t call, std::uint32_t digit, std::uint16_t* out, std::int64_t calls) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57), low = _mm512_set1_epi64(0xffffffff);
  const __m512i front = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), back = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (std::int64_t i = 0; i < calls; i += 8) {
    __m512i c0 = _mm512_add_epi64(lane, _mm512_set1_epi64(static_cast<long long>(call + static_cast<std::uint64_t>(i))));
    __m512i c1 = _mm512_srli_epi64(c0, 32);
    __m512i c2 = _mm512_set1_epi64(key.stream), c3 = _mm512_set1_epi64(digit);
    std::uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; ++round) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // 0xca: bits of the second where the mask is set, of the third elsewhere.
    const __m512i lo = _mm512_ternarylogic_epi64(low, c0, _mm512_slli_epi64(c1, 32), 0xca);
    const __m512i hi = _mm512_ternarylogic_epi64(low, c2, _mm512_slli_epi64(c3, 32), 0xca);
    _mm512_storeu_si512(out + 8 * i, _mm512_permutex2var_epi64(lo, front, hi));
    _mm512_storeu_si512(out + 8 * i + 32, _mm512_permutex2var_epi64(lo, back, hi));
  }
}
#endif

inline void philox_digits(DrawKey key, std::uint64_t call, std::uint32_t digit, std::uint16_t* out, std::int64_t calls) {
#ifdef FASTMERGE_AVX512
  const std::int64_t whole = has_avx512() ? calls / 8 * 8 : 0;
  if (whole) philox_avx512(key, call, digit, out, whole);
  if (whole == calls) return;
  philox_plain(key, call + static_cast<std::uint64_t>(whole), digit, out + 8 * whole, calls - whole);
#else
  philox_plain(key, call, digit, out, calls);
#endif
}

FM_SIMD inline std::int32_t below(const std::uint16_t* digit, std::uint32_t limit, std::uint8_t* keep, std::int64_t n) {
  std::int32_t undecided = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    keep[i] = digit[i] < limit;
    undecided += digit[i] == limit;
  }
  return undecided;
}
FM_SIMD inline void below(const std::uint16_t* digit0, const std::uint16_t* digit1, const std::uint32_t* limit,
                          std::uint8_t* keep, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) keep[i] = (static_cast<std::uint32_t>(digit0[i]) << 16 | digit1[i]) < limit[i];
}
}  // namespace detail

constexpr std::int64_t kDraws = 2048;  // elements of one call of the functions below, at most

// keep[i] = 1 where the draw of element at + i is below `limit` (at most 2^32), else 0; n <= kDraws.
inline void random_keep(DrawKey key, std::int64_t at, std::int64_t n, std::uint64_t limit, std::uint8_t* keep) {
  std::uint16_t digit[kDraws + 16];
  const std::int64_t first = at / 8, skip = at - first * 8, calls = (skip + n + 7) / 8;
  detail::philox_digits(key, static_cast<std::uint64_t>(first), 0, digit, calls);
  const auto high = static_cast<std::uint32_t>(limit >> 16);
  if (!detail::below(digit + skip, high, keep, n) || high > 0xffff) return;
  for (std::int64_t i = 0; i < n; ++i) {
    if (digit[skip + i] != high) continue;
    std::uint16_t second[8];
    detail::philox_plain(key, static_cast<std::uint64_t>((at + i) / 8), 1, second, 1);
    keep[i] = second[(at + i) % 8] < (limit & 0xffff);
  }
}

// The same with a limit (below 2^32) for each element.
inline void random_keep(DrawKey key, std::int64_t at, std::int64_t n, const std::uint32_t* limit, std::uint8_t* keep) {
  std::uint16_t digit0[kDraws + 16], digit1[kDraws + 16];
  const std::int64_t first = at / 8, skip = at - first * 8, calls = (skip + n + 7) / 8;
  detail::philox_digits(key, static_cast<std::uint64_t>(first), 0, digit0, calls);
  detail::philox_digits(key, static_cast<std::uint64_t>(first), 1, digit1, calls);
  detail::below(digit0 + skip, digit1 + skip, limit, keep, n);
}

}  // namespace fastmerge
