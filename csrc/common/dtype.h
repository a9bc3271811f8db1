// Element types and exact conversions, written as integer arithmetic so that loops over them vectorise on any x86-64.
// Narrowing rounds to nearest even; NaN stays NaN (quiet); subnormals are exact.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simd.h"

namespace fastmerge {

// The codes of fastmerge/_native.py:DTYPES.
enum class Dtype : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

inline std::int64_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

FM_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
FM_INLINE float float_of(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

FM_INLINE float to_float(float x) { return x; }
FM_INLINE float to_float(bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
FM_INLINE float to_float(f16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact for subnormals too.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? 0x00400000u : 0u);
  return float_of((magnitude >= 0x7c00u ? special : bits_of(scaled)) | sign);
}

template <class T>
T from_float(float x);
template <>
FM_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FM_INLINE bf16 from_float<bf16>(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (u >> 16) | 0x0040u;
  return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}
template <>
FM_INLINE f16 from_float<f16>(float x) {
  const std::uint32_t u = bits_of(x), a = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  // Normal range: rebias and round on the integer; a carry into the exponent is the right answer, up to Inf.
  const std::uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 aligns the mantissa so that the FPU itself rounds to the subnormal grid.
  const std::uint32_t tiny = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  std::uint32_t h = a < 0x38800000u ? tiny : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x1ffu)) : h;
  return {static_cast<std::uint16_t>(h | sign)};
}

// Calls f(T{}) with the element type of a code.
template <class F>
decltype(auto) dispatch(Dtype t, F&& f) {
  switch (t) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
    case Dtype::f16: return f(f16{});
    case Dtype::bf16: return f(bf16{});
  }
  throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(t)));
}

}  // namespace fastmerge
