// Copies out of an L1 buffer with non-temporal stores: a large result that nobody reads soon needs no read for
// ownership, which is a third of the traffic of a two-input kernel. Small results stay in the cache.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "avx512.h"

namespace fastmerge {

constexpr std::int64_t kStreamBytes = 8 << 20;  // below this the result is likely to be read from the cache

#ifdef FASTMERGE_AVX512
// Whole cache lines, one store each; returns the bytes done. `to` is aligned to 64.
FM_AVX512 inline std::int64_t stream_lines(unsigned char* to, const unsigned char* from, std::int64_t bytes) {
  std::int64_t i = 0;
  for (; i + 64 <= bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  return i;
}
#endif

inline void stream_out(void* to, const void* from, std::int64_t bytes) {
#if defined(__x86_64__)
  auto* d = static_cast<unsigned char*>(to);
  auto* s = static_cast<const unsigned char*>(from);
  const std::int64_t head = (16 - (reinterpret_cast<std::uintptr_t>(d) & 15)) & 15;
  if (head >= bytes) {
    std::memcpy(d, s, bytes);
    return;
  }
  std::memcpy(d, s, head);
  std::int64_t i = head;
#ifdef FASTMERGE_AVX512
  if (has_avx512()) {
    for (; (reinterpret_cast<std::uintptr_t>(d + i) & 63) && i + 16 <= bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(d + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
    i += stream_lines(d + i, s + i, bytes - i);
  }
#endif
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
  std::memcpy(d + i, s + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Makes a thread's streamed stores visible to the others; once per piece of work.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastmerge
