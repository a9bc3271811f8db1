// SCE: the variance of K deltas at each element, the energy of the selected ones, and their merge.
//
// Story: three passes need the same thing, K deltas of one place, and everything after that is elementwise. A tile of
// 1024 elements of every delta is widened into L1 once; the loops over it are plain, one model at a time, so that any
// number of models and any mix of dtypes passes through the same code. The variance is recomputed where it is needed
// (about a dozen additions an element) instead of stored: memory would cost more. Selection is one integer compare with
// the variance's bits (common/keys.h); energies are summed in 16 fixed lanes like gram_blocks'. Up to eight models stay
// in AVX-512 registers instead (common/sce_wide.h), whatever their dtypes but float64; the plain loops take the tails.
#include "common/export.h"
#include "common/keys.h"
#include "common/parallel.h"
#include "common/put.h"
#include "common/sce_wide.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kTile = 1024, kSumBlock = 65536;
constexpr int kLanes = 16;

#define FASTMERGE_SCE_LOOPS(C)                                                                                  \
  FM_SIMD void add_shifted(C* mean, const C* d, const C* first, bool begin, std::int64_t n) {                   \
    for (std::int64_t i = 0; i < n; ++i) mean[i] = (begin ? C(0) : mean[i]) + (d[i] - first[i]);                \
  }                                                                                                             \
  FM_SIMD void begin_squares(C* mean, C* v, C count, std::int64_t n) {                                          \
    for (std::int64_t i = 0; i < n; ++i) {                                                                      \
      mean[i] = mean[i] / count;                                                                                \
      v[i] = mean[i] * mean[i];                                                                                 \
    }                                                                                                           \
  }                                                                                                             \
  FM_SIMD void add_squares(C* v, const C* d, const C* first, const C* mean, std::int64_t n) {                   \
    for (std::int64_t i = 0; i < n; ++i) {                                                                      \
      const C x = (d[i] - first[i]) - mean[i];                                                                  \
      v[i] += x * x;                                                                                            \
    }                                                                                                           \
  }                                                                                                             \
  FM_SIMD void keep_above(const C* v, SignedKey<C> bound, C* keep, std::int64_t n) {                            \
    for (std::int64_t i = 0; i < n; ++i) keep[i] = static_cast<SignedKey<C>>(raw_key(v[i])) > bound;            \
  }                                                                                                             \
  FM_SIMD void add_part(const C* d, const C* total, C w, C* above, C* below, bool first, std::int64_t n) {      \
    for (std::int64_t i = 0; i < n; ++i) {                                                                      \
      const bool agrees = total[i] >= C(0) ? !(d[i] <= C(0)) : !(d[i] >= C(0));                                 \
      const C part = agrees ? d[i] * w : C(0), share = agrees ? w : C(0);                                       \
      above[i] = (first ? C(0) : above[i]) + part;                                                              \
      below[i] = (first ? C(0) : below[i]) + share;                                                             \
    }                                                                                                           \
  }                                                                                                             \
  FM_SIMD void finish(const C* base, const C* above, const C* below, const C* keep, C* out, std::int64_t n) {   \
    for (std::int64_t i = 0; i < n; ++i) {                                                                      \
      const C divisor = below[i] < C(1e-6) ? C(1e-6) : below[i], merged = above[i] / divisor;                   \
      out[i] = base[i] + (keep && keep[i] == C(0) ? C(0) : merged);                                             \
    }                                                                                                           \
  }                                                                                                             \
  FM_SIMD void add_total(C* total, const C* d, bool first, std::int64_t n) {                                    \
    for (std::int64_t i = 0; i < n; ++i) total[i] = first ? d[i] : total[i] + d[i];                             \
  }                                                                                                             \
  FM_SIMD void select(const C* d, const C* keep, C* kept, std::int64_t n) {                                     \
    for (std::int64_t i = 0; i < n; ++i) kept[i] = keep[i] != C(0) ? d[i] : C(0);                               \
  }                                                                                                             \
  FM_SIMD void add_energy(const C* d, double* lanes, std::int64_t n) {                                          \
    double sum[kLanes];                                                                                         \
    for (int l = 0; l < kLanes; ++l) sum[l] = lanes[l];                                                         \
    for (std::int64_t i = 0; i < n; i += kLanes)                                                                \
      for (int l = 0; l < kLanes; ++l) sum[l] += static_cast<double>(d[i + l]) * static_cast<double>(d[i + l]); \
    for (int l = 0; l < kLanes; ++l) lanes[l] = sum[l];                                                         \
  }
FASTMERGE_SCE_LOOPS(float)
FASTMERGE_SCE_LOOPS(double)

// A tile of all deltas, and what is computed from them.
template <class C>
class Tile {
 public:
  explicit Tile(const Deltas& d) : deltas_(d), buffer_(d.models.size() * kTile), delta_(d.models.size()) {}

  void load(std::int64_t at, std::int64_t n) {
    n_ = n;
    base_ = deltas_.origin(at, n, origin_);
    for (std::size_t k = 0; k < delta_.size(); ++k)
      delta_[k] = deltas_.values(k, base_, at, n, buffer_.data() + k * kTile);
  }
  const C* base() const { return base_; }
  const C* delta(std::size_t k) const { return delta_[k]; }
  std::size_t models() const { return delta_.size(); }

  // Population variance over the models, deviations taken from the first: exactly 0 where all are equal.
  void variance(C* v) {
    const C count = static_cast<C>(models());
    if (models() == 1) std::fill(mean_, mean_ + n_, C(0));
    for (std::size_t k = 1; k < models(); ++k) add_shifted(mean_, delta_[k], delta_[0], k == 1, n_);
    begin_squares(mean_, v, count, n_);
    for (std::size_t k = 1; k < models(); ++k) add_squares(v, delta_[k], delta_[0], mean_, n_);
    divide_block(v, count, n_);
  }
  // 1 where the rule keeps the variance, else 0; `position` is the tile's place in the whole tensor.
  const C* keep(const Rule& rule, std::int64_t position) {
    variance(total_);
    for (std::int64_t i = 0, stop; i < n_; i = stop) {
      stop = cut(rule, position + i, position + n_) - position;
      keep_above(total_ + i, bound_at<C>(rule, position + i), keep_ + i, stop - i);
    }
    return keep_;
  }
  void merge(const std::vector<double>& weight, const C* keep, C* out) {
    for (std::size_t k = 0; k < models(); ++k) add_total(total_, delta_[k], k == 0, n_);
    for (std::size_t k = 0; k < models(); ++k)
      add_part(delta_[k], total_, static_cast<C>(weight[k]), above_, below_, k == 0, n_);
    finish(base_, above_, below_, keep, out, n_);
  }
  // Adds the squares of the selected deltas (all of them without `keep`); what fills up the last group of lanes adds 0.
  void energy(const C* keep, double* lanes) {
    const std::int64_t full = ceil_div(n_, kLanes) * kLanes;
    for (std::size_t k = 0; k < models(); ++k) {
      const C* d = delta_[k];
      if (keep) select(d, keep, above_, n_);
      else if (full != n_) std::copy(d, d + n_, above_);
      if (keep || full != n_) d = above_;
      std::fill(above_ + n_, above_ + full, C(0));
      add_energy(d, lanes + k * kLanes, full);
    }
  }

 private:
  const Deltas& deltas_;
  std::vector<C> buffer_;
  std::vector<const C*> delta_;
  std::int64_t n_ = 0;
  const C* base_ = nullptr;
  alignas(64) C origin_[kTile], mean_[kTile], total_[kTile], above_[kTile], below_[kTile], keep_[kTile];
};

template <class F>
void with_compute_type(const Deltas& d, const F& f) {
  d.f64() ? f(double{}) : f(float{});
}

#ifdef FASTMERGE_AVX512
// Runs f<K> on as much of [begin, end) as it takes, in steps of `step` elements; returns where it stopped.
template <class C, class F>
std::int64_t run_wide(const Deltas& d, std::int64_t begin, std::int64_t end, std::int64_t step,
                      [[maybe_unused]] const F& f) {
  if (std::is_same_v<C, double> || !has_avx512() || d.models.size() > detail::kSceModels) return begin;
  const std::int64_t stop = begin + (end - begin) / step * step;
  if (stop > begin) detail::with_models(d.models.size(), [&](auto models) { f(models, stop); });
  return stop;
}
#endif

void sce_variance(std::uintptr_t out, std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                  const std::vector<int>& types, std::int64_t n, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  with_compute_type(d, [&](auto zero) {
    using C = decltype(zero);
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
#ifdef FASTMERGE_AVX512
      const detail::SceCall call{&d.base, d.models.data(), false, {}, 0, nullptr};
      begin = run_wide<C>(d, begin, end, 16, [&](auto models, std::int64_t stop) {
        detail::sce_variances<models()>(call, begin, stop, pointer<float>(out));
      });
#endif
      if (begin == end) return;
      Tile<C> tile(d);
      for (std::int64_t at = begin; at < end; at += kTile) {
        tile.load(at, std::min(kTile, end - at));
        tile.variance(pointer<C>(out) + at);
      }
    });
  });
}

// out: double [blocks][models]; `offset` is a multiple of 65536.
void sce_energy(std::uintptr_t out, std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                const std::vector<int>& types, std::int64_t n, bool selects, std::uint64_t key, std::int64_t index,
                std::int64_t offset, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  const Rule rule{key, index};
  with_compute_type(d, [&](auto zero) {
    using C = decltype(zero);
    parallel_for(n, kSumBlock, threads, [&](std::int64_t begin, std::int64_t end) {
      Tile<C> tile(d);
      std::vector<double> lanes(models.size() * kLanes, 0.0);
      std::int64_t at = begin;
#ifdef FASTMERGE_AVX512
      const detail::SceCall call{&d.base, d.models.data(), selects, rule, offset, nullptr};
      at = run_wide<C>(d, begin, end, kLanes, [&](auto count, std::int64_t stop) {
        detail::sce_energies<count()>(call, begin, stop, lanes.data());
      });
#endif
      for (; at < end; at += kTile) {
        tile.load(at, std::min(kTile, end - at));
        tile.energy(selects ? tile.keep(rule, offset + at) : nullptr, lanes.data());
      }
      for (std::size_t k = 0; k < models.size(); ++k) {
        double sum = lanes[k * kLanes];
        for (int l = 1; l < kLanes; ++l) sum += lanes[k * kLanes + l];
        pointer<double>(
            out)[begin / kSumBlock * static_cast<std::int64_t>(models.size()) + static_cast<std::int64_t>(k)] = sum;
      }
    });
  });
}

void sce_merge(std::uintptr_t out, int out_code, std::uintptr_t base, int base_type,
               const std::vector<std::uintptr_t>& models, const std::vector<int>& types, std::int64_t n,
               const std::vector<double>& weight, bool selects, std::uint64_t key, std::int64_t index,
               std::int64_t offset, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  const Rule rule{key, index};
  const auto out_type = static_cast<Dtype>(out_code);
  const bool stream = n * size_of(out_type) >= kStreamBytes;
  with_compute_type(d, [&](auto zero) {
    using C = decltype(zero);
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t at = begin;
#ifdef FASTMERGE_AVX512
      if (out_type != Dtype::f64)
        at = run_wide<C>(d, begin, end, 32, [&](auto models, std::int64_t stop) {
          const std::vector<float> shares(weight.begin(), weight.end());
          const detail::SceCall call{&d.base, d.models.data(), selects, rule, offset, shares.data()};
          dispatch(out_type, [&](auto zero) {
            using T = decltype(zero);
            T* to = pointer<T>(out) + begin;
            if constexpr (!std::is_same_v<T, double>)
              detail::sce_merges<models()>(call, begin, stop, to,
                                           stream && (reinterpret_cast<std::uintptr_t>(to) & 63) == 0);
          });
        });
      if (at == end) return stream ? stream_fence() : void();
#endif
      Tile<C> tile(d);
      alignas(64) C merged[kTile];
      for (; at < end; at += kTile) {
        const std::int64_t m = std::min(kTile, end - at);
        tile.load(at, m);
        tile.merge(weight, selects ? tile.keep(rule, offset + at) : nullptr, merged);
        put_block(out_type, out, at, m, merged, stream);
      }
      if (stream) stream_fence();
    });
  });
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("sce_variance", &sce_variance, NoGil());
  m.def("sce_energy", &sce_energy, NoGil());
  m.def("sce_merge", &sce_merge, NoGil());
}
}  // namespace fastmerge
