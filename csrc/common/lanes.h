// Rows of a matrix to lanes of vectors and back, for common/lane_fft.h; and the memory that takes.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

#include "avx512.h"
#include "lane_fft.h"

namespace fastmerge {

// Work memory of a thread, kept from call to call: mapping it anew costs more than a transform.
class Arena {
 public:
  unsigned char* get(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset(new unsigned char[bytes + 64]);
      size_ = bytes;
    }
    return memory_.get() + (64 - (reinterpret_cast<std::uintptr_t>(memory_.get()) & 63)) % 64;
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  std::size_t size_ = 0;
};

#ifdef FASTMERGE_AVX512
// to[j][i] = from[i][j] of 16 rows of 16 floats.
FM_AVX512 inline void transpose16(const float* const* from, float* const* to) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(to[i], _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to[i + 8], _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}
#endif

// lanes[j][i] = rows[i][j]; rows that are not there become zeros.
template <class F>
void to_lanes(const F* rows, std::int64_t stride, std::int64_t count, std::int64_t width, F* lanes) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  std::int64_t j = 0;
#ifdef FASTMERGE_AVX512
  if constexpr (std::is_same_v<F, float>)
    if (has_avx512()) {
      alignas(64) const float zeros[kLanes] = {};
      const float* from[kLanes];
      float* to[kLanes];
      for (; j + kLanes <= width; j += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          from[i] = i < count ? rows + i * stride + j : zeros;
          to[i] = lanes + (j + i) * kLanes;
        }
        transpose16(from, to);
      }
    }
#endif
  for (; j < width; ++j)
    for (std::int64_t i = 0; i < kLanes; ++i) lanes[j * kLanes + i] = i < count ? rows[i * stride + j] : F(0);
}

// rows[i][j] = lanes[j ^ 1][i]: re and im come swapped from the inverse transform.
template <class F>
void from_lanes(const F* lanes, std::int64_t width, std::int64_t count, F* rows, std::int64_t stride) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  std::int64_t j = 0;
#ifdef FASTMERGE_AVX512
  if constexpr (std::is_same_v<F, float>)
    if (has_avx512()) {
      alignas(64) float nowhere[kLanes];
      const float* from[kLanes];
      float* to[kLanes];
      for (; j + kLanes <= width; j += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          from[i] = lanes + (j + (i ^ 1)) * kLanes;
          to[i] = i < count ? rows + i * stride + j : nowhere;
        }
        transpose16(from, to);
      }
    }
#endif
  for (; j < width; ++j)
    for (std::int64_t i = 0; i < count; ++i) rows[i * stride + j] = lanes[(j ^ 1) * kLanes + i];
}

}  // namespace fastmerge
