// Sixteen elements of any 32- or 16-bit dtype as one AVX-512 register of floats, and back: the same bits as dtype.h.
#pragma once
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

}  // namespace fastmerge
#endif
