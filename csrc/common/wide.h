// Sixteen elements of any 32- or 16-bit dtype as one AVX-512 register of floats, and back: the same bits as dtype.h.
#pragma once
#include <type_traits>

#include "avx512.h"
#include "dtype.h"

#ifdef FASTMERGE_AVX512
#define FM_WIDE FM_AVX512 FM_INLINE

namespace fastmerge {

FM_WIDE __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
FM_WIDE __m512 load16(const bf16* x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
}
FM_WIDE __m512 load16(const f16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }

FM_WIDE __m256i narrow16(__m512 x, bf16) {
  const __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}
FM_WIDE __m256i narrow16(__m512 x, f16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Thirty-two elements; `stream` writes past the cache and needs `to` aligned to 64 bytes.
template <class T>
FM_WIDE void store32(T* to, __m512 a, __m512 b, bool stream) {
  if constexpr (sizeof(T) == 4) {
    if (stream) {
      _mm512_stream_ps(reinterpret_cast<float*>(to), a);
      _mm512_stream_ps(reinterpret_cast<float*>(to) + 16, b);
    } else {
      _mm512_storeu_ps(reinterpret_cast<float*>(to), a);
      _mm512_storeu_ps(reinterpret_cast<float*>(to) + 16, b);
    }
  } else {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow16(a, T{})), narrow16(b, T{}), 1);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
    else _mm512_storeu_si512(to, both);
  }
}

// Thirty-two elements as two registers in whatever order is cheapest, for loops that do the same to every element:
// bfloat16 gives its even and its odd elements, one instruction each, the others their first and second half.
template <int kHalf, class T>
FM_WIDE __m512 load_half(const T* x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m512i both = _mm512_loadu_si512(x);
    return _mm512_castsi512_ps(kHalf ? _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                     : _mm512_slli_epi32(both, 16));
  } else {
    return load16(x + 16 * kHalf);
  }
}
template <class T>
FM_WIDE void store_halves(T* to, __m512 first, __m512 second, bool stream) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1), odd = _mm512_set1_epi32(0x10000);
    const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
    __m512i even = _mm512_add_epi32(a, half), uneven = _mm512_add_epi32(b, half);
    even = _mm512_mask_add_epi32(even, _mm512_test_epi32_mask(a, odd), even, one);
    uneven = _mm512_mask_add_epi32(uneven, _mm512_test_epi32_mask(b, odd), uneven, one);
    if (__builtin_expect(_mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q) != 0, 0)) {
      const __m512i quiet = _mm512_set1_epi32(0x400000);
      even = _mm512_mask_or_epi32(even, _mm512_cmp_ps_mask(first, first, _CMP_UNORD_Q), a, quiet);
      uneven = _mm512_mask_or_epi32(uneven, _mm512_cmp_ps_mask(second, second, _CMP_UNORD_Q), b, quiet);
    }
    // 0xca: bits of the second where the mask is set, of the third elsewhere.
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(0xffff0000u)), uneven,
                                                   _mm512_srli_epi32(even, 16), 0xca);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
    else _mm512_storeu_si512(to, both);
  } else {
    store32(to, first, second, stream);
  }
}

}  // namespace fastmerge
#endif
