// weighted_sum: out = base + scale * (sum_i w_i (model_i - base)) / D, or the same without a base.
//
// Story: the sum is bound by memory, so the whole cost is reading K + 1 streams once. A block of 2048 elements is
// converted to the compute type in a buffer that stays in L1, each model is folded into it in list order, and the block
// is rounded once on the way out. Input dtypes may differ, and no dtype combination needs a kernel of its own.
#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

FM_SIMD void fold_delta(float* acc, const float* x, const float* base, float w, bool first, std::int64_t n) {
  if (first)
    for (std::int64_t i = 0; i < n; ++i) acc[i] = (x[i] - base[i]) * w;
  else
    for (std::int64_t i = 0; i < n; ++i) acc[i] += (x[i] - base[i]) * w;
}
FM_SIMD void fold_delta(double* acc, const double* x, const double* base, double w, bool first, std::int64_t n) {
  if (first)
    for (std::int64_t i = 0; i < n; ++i) acc[i] = (x[i] - base[i]) * w;
  else
    for (std::int64_t i = 0; i < n; ++i) acc[i] += (x[i] - base[i]) * w;
}
FM_SIMD void fold(float* acc, const float* x, float w, bool first, std::int64_t n) {
  if (first)
    for (std::int64_t i = 0; i < n; ++i) acc[i] = x[i] * w;
  else
    for (std::int64_t i = 0; i < n; ++i) acc[i] += x[i] * w;
}
FM_SIMD void fold(double* acc, const double* x, double w, bool first, std::int64_t n) {
  if (first)
    for (std::int64_t i = 0; i < n; ++i) acc[i] = x[i] * w;
  else
    for (std::int64_t i = 0; i < n; ++i) acc[i] += x[i] * w;
}

template <class C>
void run(std::uintptr_t out, Dtype out_type, const std::vector<std::uintptr_t>& in, const std::vector<Dtype>& types,
         std::int64_t n, bool has_base, bool add_base, const std::vector<double>& weight, bool normalize, double divisor,
         double scale, int threads) {
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) C base[kBlock], x[kBlock], acc[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, end - at);
      const C* b = has_base ? load_block(types[0], in[0], at, m, base) : nullptr;
      for (std::size_t k = 0; k < weight.size(); ++k) {
        const std::size_t i = k + (has_base ? 1 : 0);
        const C* v = load_block(types[i], in[i], at, m, x);
        const C w = static_cast<C>(weight[k]);
        has_base ? fold_delta(acc, v, b, w, k == 0, m) : fold(acc, v, w, k == 0, m);
      }
      if (normalize) divide_block(acc, static_cast<C>(divisor), m);
      if (scale != 1.0) scale_block(acc, static_cast<C>(scale), m);
      if (has_base && add_base) add_block(acc, b, m);
      store_block(out_type, out, at, m, acc);
    }
  });
}

void weighted_sum(std::uintptr_t out, int out_type, const std::vector<std::uintptr_t>& in,
                  const std::vector<int>& type_codes, std::int64_t n, bool has_base, bool add_base,
                  const std::vector<double>& weight, bool normalize, double divisor, double scale, int threads) {
  const auto types = dtypes(type_codes);
  (any_f64(types) ? run<double> : run<float>)(out, static_cast<Dtype>(out_type), in, types, n, has_base, add_base,
                                              weight, normalize, divisor, scale, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("weighted_sum", &weighted_sum, NoGil()); }
}  // namespace fastmerge
