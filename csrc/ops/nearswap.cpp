// nearswap: towards the other model by a share that falls with the distance, one pass over two tensors.
//
// Story: two divisions an element are less than reading and writing it costs, so a plain loop over blocks in L1 is
// bound by memory; large results go past the cache.
#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"
#include "common/put.h"

namespace fastmerge {
namespace {

#define FASTMERGE_NEARSWAP(C)                                                    \
  FM_SIMD void swap_block(const C* a, const C* b, C t, C* out, std::int64_t n) { \
    for (std::int64_t i = 0; i < n; ++i) {                                       \
      const C difference = a[i] - b[i];                                          \
      C distance = difference < C(0) ? -difference : difference;                 \
      distance = distance < C(1e-6) ? C(1e-6) : distance;                        \
      C share = (C(1) / distance) * t;                                           \
      share = share < C(0) ? C(0) : share;                                       \
      share = share > C(1) ? C(1) : share;                                       \
      out[i] = share * b[i] + (C(1) - share) * a[i];                             \
    }                                                                            \
  }
FASTMERGE_NEARSWAP(float)
FASTMERGE_NEARSWAP(double)

template <class C>
void run(std::uintptr_t out, Dtype out_type, std::uintptr_t base, Dtype base_type, std::uintptr_t other,
         Dtype other_type, std::int64_t n, double t, int threads) {
  const bool stream = n * size_of(out_type) >= kStreamBytes;
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) C a[kBlock], b[kBlock], merged[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t m = std::min(kBlock, end - at);
      swap_block(load_block(base_type, base, at, m, a), load_block(other_type, other, at, m, b), static_cast<C>(t),
                 merged, m);
      put_block(out_type, out, at, m, merged, stream);
    }
    if (stream) stream_fence();
  });
}

void nearswap(std::uintptr_t out, int out_type, std::uintptr_t base, int base_type, std::uintptr_t other,
              int other_type, std::int64_t n, double t, int threads) {
  const auto a = static_cast<Dtype>(base_type), b = static_cast<Dtype>(other_type);
  (a == Dtype::f64 || b == Dtype::f64 ? run<double> : run<float>)(out, static_cast<Dtype>(out_type), base, a, other, b,
                                                                  n, t, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("nearswap", &nearswap, NoGil()); }
}  // namespace fastmerge
