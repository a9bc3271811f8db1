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
FM_SIMD inline void philox_plain(DrawKey key, std::uint64_t call, std::uint32_t digit, std::uint16_t* out,
                                 std::int64_t calls) {
  for (std::int64_t i = 0; i < calls; ++i) {
    const std::uint64_t n = call + static_cast<std::uint64_t>(i);
    std::uint32_t c0 = static_cast<std::uint32_t>(n), c1 = static_cast<std::uint32_t>(n >> 32), c2 = key.stream,
                  c3 = digit;
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
struct RoundKeys {  // in memory, where an instruction takes them from for nothing
  std::uint64_t k0[10], k1[10];
  explicit RoundKeys(DrawKey key) {
    for (std::uint32_t round = 0; round < 10; ++round) {
      k0[round] = key.k0 + round * 0x9E3779B9u;
      k1[round] = key.k1 + round * 0xBB67AE85u;
    }
  }
};

// The 64 N digits of calls [call, call + 8 N), in order. Words live in the low halves of 64-bit lanes; the multiplier
// ignores the high halves, so products need no masking. A round waits for the one before, so N chains run side by side.
template <int N>
FM_AVX512 FM_INLINE void philox_rounds(const RoundKeys& keys, std::uint32_t stream, std::uint64_t call,
                                       std::uint32_t digit, __m512i* out) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57),
                low = _mm512_set1_epi64(0xffffffff);
  const __m512i front = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), back = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i c0[N], c1[N], c2[N], c3[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    c0[j] =
        _mm512_add_epi64(lane, _mm512_set1_epi64(static_cast<long long>(call + 8u * static_cast<std::uint64_t>(j))));
    c1[j] = _mm512_srli_epi64(c0[j], 32);
    c2[j] = _mm512_set1_epi64(stream);
    c3[j] = _mm512_set1_epi64(digit);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i k0 = _mm512_set1_epi64(static_cast<long long>(keys.k0[round])),
                  k1 = _mm512_set1_epi64(static_cast<long long>(keys.k1[round]));
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const __m512i p0 = _mm512_mul_epu32(c0[j], m0), p1 = _mm512_mul_epu32(c2[j], m1);
      c0[j] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[j], k0, 0x96);
      c2[j] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[j], k1, 0x96);
      c1[j] = p1;
      c3[j] = p0;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    // 0xca: bits of the second where the mask is set, of the third elsewhere.
    const __m512i lo = _mm512_ternarylogic_epi64(low, c0[j], _mm512_slli_epi64(c1[j], 32), 0xca);
    const __m512i hi = _mm512_ternarylogic_epi64(low, c2[j], _mm512_slli_epi64(c3[j], 32), 0xca);
    out[2 * j] = _mm512_permutex2var_epi64(lo, front, hi);
    out[2 * j + 1] = _mm512_permutex2var_epi64(lo, back, hi);
  }
}
FM_AVX512 inline void philox_avx512(DrawKey key, std::uint64_t call, std::uint32_t digit, std::uint16_t* out,
                                    std::int64_t calls) {
  const RoundKeys keys(key);
  for (std::int64_t i = 0; i < calls; i += 8) {
    __m512i digits[2];
    philox_rounds<1>(keys, key.stream, call + static_cast<std::uint64_t>(i), digit, digits);
    _mm512_storeu_si512(out + 8 * i, digits[0]);
    _mm512_storeu_si512(out + 8 * i + 32, digits[1]);
  }
}
// One bit per element of `words` * 64: the first digit is below `high`; a word of `equal` tells which are not decided.
// Returns whether any is not. Writes up to kChains - 1 words more.
constexpr int kChains = 3;
FM_AVX512 inline std::uint64_t philox_bits(DrawKey key, std::uint64_t call, std::uint16_t high, std::uint64_t* bits,
                                           std::uint64_t* equal, std::int64_t words) {
  const __m512i limit = _mm512_set1_epi16(static_cast<short>(high));
  const RoundKeys keys(key);
  std::uint64_t any = 0;
  for (std::int64_t i = 0; i < words; i += kChains) {
    __m512i digits[2 * kChains];
    philox_rounds<kChains>(keys, key.stream, call + 8 * static_cast<std::uint64_t>(i), 0, digits);
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      const std::uint64_t a = _mm512_cmplt_epu16_mask(digits[2 * j], limit),
                          b = _mm512_cmplt_epu16_mask(digits[2 * j + 1], limit);
      const std::uint64_t c = _mm512_cmpeq_epu16_mask(digits[2 * j], limit),
                          d = _mm512_cmpeq_epu16_mask(digits[2 * j + 1], limit);
      bits[i + j] = a | b << 32;
      equal[i + j] = c | d << 32;
      any |= equal[i + j];
    }
  }
  return any;
}
FM_AVX512 inline std::uint64_t bits_of_bytes(const std::uint8_t* keep) {
  return _mm512_test_epi8_mask(_mm512_loadu_si512(keep), _mm512_loadu_si512(keep));
}
// 64 * words bytes 0 or 1; `stream` writes past the cache and needs `to` aligned to 64 bytes.
FM_AVX512 inline void bytes_of_bits(const std::uint64_t* bits, std::int64_t words, std::uint8_t* to, bool stream) {
  for (std::int64_t i = 0; i < words; ++i) {
    const __m512i v = _mm512_maskz_set1_epi8(bits[i], 1);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 64 * i), v);
    else _mm512_storeu_si512(to + 64 * i, v);
  }
}
#endif

inline void philox_digits(DrawKey key, std::uint64_t call, std::uint32_t digit, std::uint16_t* out,
                          std::int64_t calls) {
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

#ifdef FASTMERGE_AVX512
// random_keep as bits: bit j of word w is element at + 64 w + j; n <= kDraws. Bits past n are arbitrary, and
// `bits` has room for kBitWords words.
constexpr std::int64_t kBitWords = kDraws / 64 + detail::kChains - 1;
inline void random_bits(DrawKey key, std::int64_t at, std::int64_t n, std::uint64_t limit, std::uint64_t* bits) {
  const std::int64_t words = (n + 63) / 64;
  const auto high = static_cast<std::uint32_t>(limit >> 16);
  if (high > 0xffff) {
    for (std::int64_t i = 0; i < words; ++i) bits[i] = ~std::uint64_t{0};
    return;
  }
  if (at % 8) {
    alignas(64) std::uint8_t keep[kDraws + 64];
    random_keep(key, at, n, limit, keep);
    for (std::int64_t i = 0; i < words; ++i) bits[i] = detail::bits_of_bytes(keep + 64 * i);
    return;
  }
  const auto first = static_cast<std::uint64_t>(at / 8);
  std::uint64_t equal[kBitWords];
  if (!detail::philox_bits(key, first, static_cast<std::uint16_t>(high), bits, equal, words)) return;
  for (std::int64_t i = 0; i < words; ++i)
    for (std::uint64_t left = equal[i]; left; left &= left - 1) {
      const int bit = __builtin_ctzll(left);
      std::uint16_t second[8];
      detail::philox_plain(key, first + static_cast<std::uint64_t>(8 * i + bit / 8), 1, second, 1);
      bits[i] |= static_cast<std::uint64_t>(second[bit % 8] < (limit & 0xffff)) << bit;
    }
}
#endif

}  // namespace fastmerge
