// permute_merge: out = (1 - w) * base + w * other[perm0, perm1, ...] in one pass over the three tensors.
//
// Story: the same walk as permute's; a block of the other model's source elements is collected in L1, widened, combined
// with the base's block, rounded once and streamed out. The base and the result are read and written in order.
#include "common/block.h"
#include "common/export.h"
#include "common/gather.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace fastmerge {
namespace {

using Axes = std::vector<std::pair<std::int64_t, std::uintptr_t>>;

constexpr std::int64_t kStep = 1024;  // elements: all buffers fit L1 together

FM_SIMD void combine(const float* b, const float* x, float wb, float wx, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = b[i] * wb + x[i] * wx;
}
FM_SIMD void combine(const double* b, const double* x, double wb, double wx, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = b[i] * wb + x[i] * wx;
}

FM_SIMD void combine(const bf16* b, const bf16* x, float wb, float wx, bf16* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = from_float<bf16>(to_float(b[i]) * wb + to_float(x[i]) * wx);
}
FM_SIMD void combine(const f16* b, const f16* x, float wb, float wx, f16* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = from_float<f16>(to_float(b[i]) * wb + to_float(x[i]) * wx);
}

// One step where the three tensors share a 16-bit dtype: converted in registers, no buffer between.
inline bool combine_narrow(Dtype type, std::uintptr_t base, std::int64_t at, std::uintptr_t other, std::int64_t c, float wb,
                           float wx, void* y, std::int64_t n) {
  if (type == Dtype::bf16)
    combine(pointer<const bf16>(base) + at, pointer<const bf16>(other) + c, wb, wx, static_cast<bf16*>(y), n);
  else if (type == Dtype::f16)
    combine(pointer<const f16>(base) + at, pointer<const f16>(other) + c, wb, wx, static_cast<f16*>(y), n);
  else
    return false;
  return true;
}

template <class C>
void run(std::uintptr_t out, Dtype out_type, std::uintptr_t base, Dtype base_type, std::uintptr_t other,
         Dtype other_type, std::int64_t n, const Gather& from, double weight, int threads) {
  const std::int64_t element = size_of(other_type), narrow = size_of(base_type), wide = size_of(out_type);
  const C wb = static_cast<C>(1.0 - weight), wx = static_cast<C>(weight);
  const bool same = base_type == out_type && other_type == out_type;
  const bool stream = n * wide >= kStreamBytes && out != base;
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) unsigned char raw[kStep * sizeof(double)], rounded[kStep * sizeof(double)];
    alignas(64) C b[kStep], x[kStep];
    walk(from, other, element, begin, end, kStep, [&](std::int64_t at, std::uintptr_t source, std::int64_t c, std::int64_t m) {
      prefetch_range(pointer<const char>(base) + (at + m) * narrow, m * narrow);
      if (!from.columns.empty()) {
        gather_columns(from, element, pointer<const void>(source), c, m, raw);
        source = reinterpret_cast<std::uintptr_t>(raw);
        c = 0;
      }
      if (same && combine_narrow(out_type, base, at, source, c, wb, wx, rounded, m)) {
        unsigned char* target = pointer<unsigned char>(out) + at * wide;
        stream ? stream_out(target, rounded, m * wide) : static_cast<void>(std::memcpy(target, rounded, m * wide));
        return;
      }
      combine(load_block(base_type, base, at, m, b), load_block(other_type, source, c, m, x), wb, wx, b, m);
      if (!stream) return store_block(out_type, out, at, m, b);
      store_block(out_type, reinterpret_cast<std::uintptr_t>(rounded), 0, m, b);
      stream_out(pointer<unsigned char>(out) + at * wide, rounded, m * wide);
    });
    if (stream) stream_fence();
  });
}

void permute_merge(std::uintptr_t out, int out_type, std::uintptr_t base, int base_type, std::uintptr_t other,
                   int other_type, std::int64_t n, const Axes& axes, double weight, int threads) {
  const auto o = static_cast<Dtype>(out_type), b = static_cast<Dtype>(base_type), x = static_cast<Dtype>(other_type);
  const Gather from(axes, size_of(x));
  (any_f64({b, x}) ? run<double> : run<float>)(out, o, base, b, other, x, n, from, weight, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("permute_merge", &permute_merge, NoGil()); }
}  // namespace fastmerge
