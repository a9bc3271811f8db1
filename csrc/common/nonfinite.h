// Counts NaN and Inf: integer compares on the exponent bits, on data that is in cache or will be read right after.
#pragma once
#include <stdexcept>

#include "block.h"

namespace fastmerge {
namespace detail {

template <class U>
FM_INLINE std::int64_t count_all_ones(const U* x, std::int64_t n, U exponent) {
  // A small counter type keeps the inner loop at full vector width; blocks keep it from overflowing.
  std::int64_t total = 0;
  for (std::int64_t at = 0; at < n; at += 16384) {
    const std::int64_t end = std::min<std::int64_t>(n, at + 16384);
    U count = 0;
    for (std::int64_t i = at; i < end; ++i) count = static_cast<U>(count + ((x[i] & exponent) == exponent));
    total += static_cast<std::int64_t>(count);
  }
  return total;
}
FM_SIMD inline std::int64_t count16(const std::uint16_t* x, std::int64_t n, std::uint16_t e) {
  return count_all_ones(x, n, e);
}
FM_SIMD inline std::int64_t count32(const std::uint32_t* x, std::int64_t n, std::uint32_t e) {
  return count_all_ones(x, n, e);
}
FM_SIMD inline std::int64_t count64(const std::uint64_t* x, std::int64_t n, std::uint64_t e) {
  return count_all_ones(x, n, e);
}

}  // namespace detail

inline std::int64_t count_nonfinite(std::uintptr_t x, int dtype, std::int64_t n) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return detail::count32(reinterpret_cast<const std::uint32_t*>(x), n, 0x7f800000u);
    case Dtype::f64: return detail::count64(reinterpret_cast<const std::uint64_t*>(x), n, 0x7ff0000000000000ull);
    case Dtype::f16: return detail::count16(reinterpret_cast<const std::uint16_t*>(x), n, 0x7c00u);
    case Dtype::bf16: return detail::count16(reinterpret_cast<const std::uint16_t*>(x), n, 0x7f80u);
  }
  throw std::invalid_argument("count_nonfinite: unknown dtype");
}

}  // namespace fastmerge
