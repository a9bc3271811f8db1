// RAM: what one model alone changed is kept (times a factor), what several changed is averaged; and how much of each.
//
// Story: both passes are elementwise over K deltas. A tile of 1024 elements of every delta is widened into L1; one loop
// per model counts how many changed an element, another adds what counts, so that any number of models and any mix of
// dtypes passes through the same code, bound by reading.
#include "common/export.h"
#include "common/keys.h"
#include "common/parallel.h"
#include "common/put.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kTile = 1024;

#define FASTMERGE_RAM_LOOPS(C)                                                                                         \
  FM_SIMD void count_changed(const C* d, C epsilon, C* count, bool first, std::int64_t n) {                            \
    for (std::int64_t i = 0; i < n; ++i) {                                                                             \
      const C magnitude = d[i] < C(0) ? -d[i] : d[i];                                                                  \
      count[i] = (first ? C(0) : count[i]) + (magnitude > epsilon ? C(1) : C(0));                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  FM_SIMD void add_changed(const C* d, C epsilon, C factor, const C* count, C* sum, bool first, std::int64_t n) {      \
    for (std::int64_t i = 0; i < n; ++i) {                                                                             \
      const C magnitude = d[i] < C(0) ? -d[i] : d[i], alone = d[i] * factor, either = count[i] == C(1) ? alone : d[i]; \
      sum[i] = (first ? C(0) : sum[i]) + (magnitude > epsilon ? either : C(0));                                        \
    }                                                                                                                  \
  }                                                                                                                    \
  FM_SIMD void finish(const C* base, const C* sum, const C* count, C* out, std::int64_t n) {                           \
    for (std::int64_t i = 0; i < n; ++i) out[i] = base[i] + sum[i] / (count[i] < C(1) ? C(1) : count[i]);              \
  }                                                                                                                    \
  FM_SIMD std::int64_t unique(const C* d, C epsilon, const C* count, std::int64_t n) {                                 \
    std::int32_t found = 0;                                                                                            \
    for (std::int64_t i = 0; i < n; ++i) {                                                                             \
      const C magnitude = d[i] < C(0) ? -d[i] : d[i];                                                                  \
      found += (magnitude > epsilon) & (count[i] == C(1));                                                             \
    }                                                                                                                  \
    return found;                                                                                                      \
  }                                                                                                                    \
  FM_SIMD std::int64_t changed(const C* d, C epsilon, std::int64_t n) {                                                \
    std::int32_t found = 0;                                                                                            \
    for (std::int64_t i = 0; i < n; ++i) {                                                                             \
      const C magnitude = d[i] < C(0) ? -d[i] : d[i];                                                                  \
      found += magnitude > epsilon;                                                                                    \
    }                                                                                                                  \
    return found;                                                                                                      \
  }
FASTMERGE_RAM_LOOPS(float)
FASTMERGE_RAM_LOOPS(double)

// A tile of all deltas, and how many models changed each element.
template <class C>
class Tile {
 public:
  Tile(const Deltas& d, double epsilon)
      : deltas_(d), epsilon_(static_cast<C>(epsilon)), buffer_(d.models.size() * kTile), delta_(d.models.size()) {}

  void load(std::int64_t at, std::int64_t n) {
    n_ = n;
    base_ = deltas_.origin(at, n, origin_);
    for (std::size_t k = 0; k < delta_.size(); ++k) {
      delta_[k] = deltas_.values(k, base_, at, n, buffer_.data() + k * kTile);
      count_changed(delta_[k], epsilon_, count_, k == 0, n);
    }
  }
  void merge(const std::vector<double>& factor, C* out) {
    for (std::size_t k = 0; k < delta_.size(); ++k)
      add_changed(delta_[k], epsilon_, static_cast<C>(factor[k]), count_, sum_, k == 0, n_);
    finish(base_, sum_, count_, out, n_);
  }
  // Adds (changed by k alone, changed by k and others) of each model k.
  void tally(std::int64_t* to) const {
    for (std::size_t k = 0; k < delta_.size(); ++k) {
      const std::int64_t own = unique(delta_[k], epsilon_, count_, n_);
      to[2 * k] += own;
      to[2 * k + 1] += changed(delta_[k], epsilon_, n_) - own;
    }
  }

 private:
  const Deltas& deltas_;
  C epsilon_;
  std::vector<C> buffer_;
  std::vector<const C*> delta_;
  std::int64_t n_ = 0;
  const C* base_ = nullptr;
  alignas(64) C origin_[kTile], count_[kTile], sum_[kTile];
};

void ram_merge(std::uintptr_t out, int out_code, std::uintptr_t base, int base_type,
               const std::vector<std::uintptr_t>& models, const std::vector<int>& types, std::int64_t n,
               const std::vector<double>& factor, double epsilon, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  const auto out_type = static_cast<Dtype>(out_code);
  const bool stream = n * size_of(out_type) >= kStreamBytes;
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      Tile<C> tile(d, epsilon);
      alignas(64) C merged[kTile];
      for (std::int64_t at = begin; at < end; at += kTile) {
        const std::int64_t m = std::min(kTile, end - at);
        tile.load(at, m);
        tile.merge(factor, merged);
        put_block(out_type, out, at, m, merged, stream);
      }
      if (stream) stream_fence();
    });
  };
  d.f64() ? run(double{}) : run(float{});
}

// out: int64 [pieces of 65536 elements][models][2]; integers, so the order of adding them up does not matter.
void ram_counts(std::uintptr_t out, std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                const std::vector<int>& types, std::int64_t n, double epsilon, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  const auto each = 2 * static_cast<std::int64_t>(models.size());
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      Tile<C> tile(d, epsilon);
      std::int64_t* to = pointer<std::int64_t>(out) + begin / kGrain * each;
      std::fill(to, to + each, 0);
      for (std::int64_t at = begin; at < end; at += kTile) {
        tile.load(at, std::min(kTile, end - at));
        tile.tally(to);
      }
    });
  };
  d.f64() ? run(double{}) : run(float{});
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("ram_merge", &ram_merge, NoGil());
  m.def("ram_counts", &ram_counts, NoGil());
}
}  // namespace fastmerge
