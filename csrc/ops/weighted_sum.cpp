// weighted_sum: out = base + scale * (sum_i w_i (model_i - base)) / D, or the same without a base.
//
// Story: the sum is bound by memory, so the whole cost is reading K + 1 streams once. The sum of a block of 2048 elements
// stays in L1 in the compute type; each model is folded into it in list order, read in its own dtype, and the block is
// rounded once on the way out, past the cache when the result is large. No mix of dtypes needs a kernel of its own.
#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace fastmerge {
namespace {

// One model into the sum, read in its own dtype T; the compute type C is float, or double where an input is double.
#define FASTMERGE_FOLD(T, C, WIDE)                                                                        \
  FM_SIMD void fold_delta(C* acc, const T* x, const C* base, C w, bool first, std::int64_t n) {            \
    if (first)                                                                                              \
      for (std::int64_t i = 0; i < n; ++i) acc[i] = (WIDE(x[i]) - base[i]) * w;                             \
    else                                                                                                    \
      for (std::int64_t i = 0; i < n; ++i) acc[i] += (WIDE(x[i]) - base[i]) * w;                            \
  }                                                                                                         \
  FM_SIMD void fold(C* acc, const T* x, C w, bool first, std::int64_t n) {                                  \
    if (first)                                                                                              \
      for (std::int64_t i = 0; i < n; ++i) acc[i] = WIDE(x[i]) * w;                                         \
    else                                                                                                    \
      for (std::int64_t i = 0; i < n; ++i) acc[i] += WIDE(x[i]) * w;                                        \
  }
FASTMERGE_FOLD(float, float, to_float)
FASTMERGE_FOLD(bf16, float, to_float)
FASTMERGE_FOLD(f16, float, to_float)
FASTMERGE_FOLD(float, double, to_float)
FASTMERGE_FOLD(bf16, double, to_float)
FASTMERGE_FOLD(f16, double, to_float)
FASTMERGE_FOLD(double, double, )

template <class C>
void run(std::uintptr_t out, Dtype out_type, const std::vector<std::uintptr_t>& in, const std::vector<Dtype>& types,
         std::int64_t n, bool has_base, bool add_base, const std::vector<double>& weight, bool normalize, double divisor,
         double scale, int threads) {
  const bool stream = n * size_of(out_type) >= kStreamBytes;
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) C base[kBlock], acc[kBlock];
    alignas(64) unsigned char rounded[kBlock * sizeof(double)];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, end - at);
      const C* b = has_base ? load_block(types[0], in[0], at, m, base) : nullptr;
      for (std::size_t k = 0; k < weight.size(); ++k) {
        const std::size_t i = k + (has_base ? 1 : 0);
        const C w = static_cast<C>(weight[k]);
        dispatch(types[i], [&](auto zero) {
          using T = decltype(zero);
          if constexpr (!(std::is_same_v<C, float> && std::is_same_v<T, double>)) {
            const T* x = reinterpret_cast<const T*>(in[i]) + at;
            has_base ? fold_delta(acc, x, b, w, k == 0, m) : fold(acc, x, w, k == 0, m);
          }
        });
      }
      if (normalize) divide_block(acc, static_cast<C>(divisor), m);
      if (scale != 1.0) scale_block(acc, static_cast<C>(scale), m);
      if (has_base && add_base) add_block(acc, b, m);
      if (stream) {
        store_block(out_type, reinterpret_cast<std::uintptr_t>(rounded), 0, m, acc);
        stream_out(reinterpret_cast<unsigned char*>(out) + at * size_of(out_type), rounded, m * size_of(out_type));
      } else {
        store_block(out_type, out, at, m, acc);
      }
    }
    if (stream) stream_fence();
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
