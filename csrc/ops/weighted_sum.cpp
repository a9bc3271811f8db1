// weighted_sum: out = base + scale * (sum_i w_i (model_i - base)) / D, or the same without a base.
//
// Story: the sum is bound by memory, so the whole cost is reading K + 1 streams once. With AVX-512 the sums of 64
// elements stay in registers while every model passes by in list order, so that all streams advance together and the
// prefetchers keep up with all of them. Elsewhere (and in double) the sum of a block of 2048 elements stays in L1 and
// each model is folded into it. Either way a model is read in its own dtype, no mix needs a kernel of its own, and
// elements are rounded once on the way out, past the cache when the result is large.
#include "common/export.h"
#include "common/model_sum.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

void weighted_sum(std::uintptr_t out, int out_type, const std::vector<std::uintptr_t>& in,
                  const std::vector<int>& type_codes, std::int64_t n, bool has_base, bool add_base,
                  const std::vector<double>& weight, bool normalize, double divisor, double scale, int threads) {
  const auto types = dtypes(type_codes);
  const Sum s{out, static_cast<Dtype>(out_type), in, types, has_base, add_base, normalize, weight, divisor, scale};
  const auto piece = any_f64(types) ? sum_range<double> : sum_range<float>;
  const bool stream = n * size_of(s.out_type) >= kStreamBytes;
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) { piece(s, begin, end, stream); });
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("weighted_sum", &weighted_sum, NoGil()); }
}  // namespace fastmerge
