// Counts NaN and Inf in a chunk, for the engine's NaN policy: integer compares on the exponent bits, on data that the
// merge reads right after, so it costs cache bandwidth only.
#include "common/block.h"
#include "common/export.h"

namespace fastmerge {
namespace {

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
FM_SIMD std::int64_t count16(const std::uint16_t* x, std::int64_t n, std::uint16_t e) {
  return count_all_ones(x, n, e);
}
FM_SIMD std::int64_t count32(const std::uint32_t* x, std::int64_t n, std::uint32_t e) {
  return count_all_ones(x, n, e);
}
FM_SIMD std::int64_t count64(const std::uint64_t* x, std::int64_t n, std::uint64_t e) {
  return count_all_ones(x, n, e);
}

std::int64_t count_nonfinite(std::uintptr_t x, int dtype, std::int64_t n) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return count32(pointer<std::uint32_t>(x), n, 0x7f800000u);
    case Dtype::f64: return count64(pointer<std::uint64_t>(x), n, 0x7ff0000000000000ull);
    case Dtype::f16: return count16(pointer<std::uint16_t>(x), n, 0x7c00u);
    case Dtype::bf16: return count16(pointer<std::uint16_t>(x), n, 0x7f80u);
  }
  throw std::invalid_argument("count_nonfinite: unknown dtype");
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("count_nonfinite", &count_nonfinite, NoGil()); }
}  // namespace fastmerge
