// abs_sum: sums of |model - base| over blocks of 65536 elements, in float64.
//
// Story: the pass is bound by reading, so the only care is a fixed order: 16 lanes per block of 2048 elements, lane j
// taking the elements j, j + 16, ...; the lanes are added to the block's total in order. No vector width changes that.
#include <cmath>

#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kSum = 65536;  // fastmerge/ops/abs_sum.py:BLOCK
constexpr int kLanes = 16;

template <class C>
FM_INLINE void lanes(const C* x, const C* base, double* lane, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += static_cast<double>(std::abs(base ? x[i + j] - base[i + j] : x[i + j]));
  for (int j = 0; i + j < n; ++j) lane[j] += static_cast<double>(std::abs(base ? x[i + j] - base[i + j] : x[i + j]));
}
FM_SIMD void add_lanes(const float* x, const float* base, double* lane, std::int64_t n) {
  base ? lanes(x, base, lane, n) : lanes(x, static_cast<const float*>(nullptr), lane, n);
}
FM_SIMD void add_lanes(const double* x, const double* base, double* lane, std::int64_t n) {
  base ? lanes(x, base, lane, n) : lanes(x, static_cast<const double*>(nullptr), lane, n);
}

template <class C>
void run(double* out, const std::vector<std::uintptr_t>& in, const std::vector<Dtype>& types, std::int64_t n,
         bool has_base, int threads) {
  const std::int64_t blocks = ceil_div(n, kSum), models = static_cast<std::int64_t>(in.size()) - has_base;
  parallel_blocks(blocks, threads, [&](std::int64_t block) {
    alignas(64) C base[kBlock], x[kBlock];
    for (std::int64_t k = 0; k < models; ++k) out[k * blocks + block] = 0.0;
    for (std::int64_t at = block * kSum; at < std::min(n, (block + 1) * kSum); at += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, std::min(n, (block + 1) * kSum) - at);
      const C* b = has_base ? load_block(types[0], in[0], at, m, base) : nullptr;
      for (std::int64_t k = 0; k < models; ++k) {
        alignas(64) double lane[kLanes] = {};
        add_lanes(load_block(types[k + has_base], in[k + has_base], at, m, x), b, lane, m);
        for (int j = 0; j < kLanes; ++j) out[k * blocks + block] += lane[j];
      }
    }
  });
}

void abs_sum(std::uintptr_t out, const std::vector<std::uintptr_t>& in, const std::vector<int>& type_codes,
             std::int64_t n, bool has_base, int threads) {
  const auto types = dtypes(type_codes);
  (any_f64(types) ? run<double> : run<float>)(pointer<double>(out), in, types, n, has_base, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("abs_sum", &abs_sum, NoGil()); }
}  // namespace fastmerge
