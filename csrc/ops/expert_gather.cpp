// expert_gather: positions and values of the k largest entries of every row of a delta.
//
// Story: neighbouring rows have similar thresholds, so a bit less than the last row's is a floor that few more than k
// entries of the next one pass: one vectorised pass over blocks that stay in L1 collects them, and a bisection over the
// few finds the cut (selecting by swaps cost more than the pass). A row that fewer than k pass is selected in full. The
// guess decides how much work is done, never the result, so threads may start with any. Deltas are not stored: kept
// values are computed again.
#include "common/export.h"
#include "common/keys.h"
#include "common/parallel.h"
#include "common/select.h"

namespace fastmerge {
namespace {

template <class C>
C value_of(Key<C> key) {
  C x;
  std::memcpy(&x, &key, sizeof x);
  return x;
}

template <class C>
C element(const Array& a, std::int64_t i) {
  switch (a.type) {
    case Dtype::f32: return reinterpret_cast<const float*>(a.address)[i];
    case Dtype::f16: return to_float(reinterpret_cast<const f16*>(a.address)[i]);
    case Dtype::bf16: return to_float(reinterpret_cast<const bf16*>(a.address)[i]);
    case Dtype::f64: break;
  }
  return static_cast<C>(reinterpret_cast<const double*>(a.address)[i]);
}

template <class C>
class RowSelector {
 public:
  RowSelector(const Deltas& deltas, std::int64_t length, std::int64_t k)
      : d_(deltas), n_(length), k_(k), share_(static_cast<C>(0.98 - 0.5 / std::sqrt(static_cast<double>(k)))) {
    found_.reserve(n_ + kSlack);
    where_.reserve(n_ + kSlack);
    kept_.reserve(n_ + 1);
  }

  // The k entries of the row whose first element is number `first` of the arrays: positions within the row, in order.
  const std::uint32_t* select(std::int64_t first) {
    std::int64_t c = floor_ ? candidates(first) : 0;
    if (c < k_) {
      key_.reserve(n_);
      for (std::int64_t at = 0; at < n_; at += kBlock) keys(first, at, key_.data() + at);
      floor_ = select_largest(std::vector<KeyPiece<K>>{{key_.data(), n_}}, k_ - 1);
      floor_ = std::min(floor_, static_cast<K>(KeyOf<C>::inf + 1));  // below every NaN, whatever its payload
      c = candidates(first);
    }
    detail::canonical(found_.data(), c);
    const auto [cut, ties] = cut_of(c);
    std::int64_t left = ties, o = 0;
    for (std::int64_t i = 0; i < c; ++i) {
      const bool tie = found_[i] == cut && left > 0;
      left -= tie;
      kept_[o] = where_[i];
      o += (found_[i] > cut) | tie;
    }
    floor_ = std::max<K>(raw_key(value_of<C>(std::min(cut, static_cast<K>(KeyOf<C>::inf - 1))) * share_), 1);
    return kept_.data();
  }

 private:
  using K = Key<C>;

  void keys(std::int64_t first, std::int64_t at, K* out) {
    C base[kBlock];
    const std::int64_t m = std::min(kBlock, n_ - at);
    d_.keys(0, d_.origin(first + at, m, base), first + at, m, out);
  }

  // The next block is on its way while this one, in L1, is gone through.
  void fetch(std::int64_t at) const {
    fetch(d_.models[0], at);
    if (d_.has_base()) fetch(d_.base, at);
  }
  static void fetch(const Array& a, std::int64_t at) {
    const auto size = static_cast<std::int64_t>(size_of(a.type));
    const char* p = reinterpret_cast<const char*>(a.address) + at * size;
    for (std::int64_t i = 0; i < kBlock * size; i += 64) __builtin_prefetch(p + i);
  }

  std::int64_t candidates(std::int64_t first) {
    alignas(64) K block[kBlock];
    std::int64_t c = 0, above = 0;
    for (std::int64_t at = 0; at < n_; at += kBlock) {
      keys(first, at, block);
      fetch(first + at + kBlock);
      c += collect(block, std::min(kBlock, n_ - at), floor_, static_cast<K>(KeyOf<C>::max - floor_ + 1),
                   static_cast<std::uint32_t>(at), found_.data() + c, where_.data() + c, KeyOf<C>::max, above);
    }
    return c;
  }

  // (cut, ties): the k largest are the candidates above `cut` and the first `ties` that equal it.
  std::pair<K, std::int64_t> cut_of(std::int64_t c) {
    if (floor_ == 0 && c == k_) return {0, c - detail::count_above(found_.data(), c, K{0})};  // nothing is below a zero
    K low = floor_ - 1, high = KeyOf<C>::nan;  // more than k above low (or all kept), at most k - 1 above high
    if (c == k_) return {low, 0};
    if (c > 1024) {
      high = select_largest(std::vector<KeyPiece<K>>{{found_.data(), c}}, k_ - 1);
      return {high, k_ - detail::count_above(found_.data(), c, high)};
    }
    while (high - low > 1) {
      const K mid = low + (high - low) / 2;
      const std::int64_t above = detail::count_above(found_.data(), c, mid);
      if (above == k_) return {mid, 0};
      (above > k_ ? low : high) = mid;
    }
    return {high, k_ - detail::count_above(found_.data(), c, high)};
  }

  const Deltas& d_;
  std::int64_t n_, k_;
  C share_;
  K floor_ = 0;  // entries below it are not looked at; 0: nothing is known yet
  Buffer<K> key_, found_;
  Buffer<std::uint32_t> where_, kept_;
};

template <class C>
void rows(const Deltas& d, std::int64_t count, std::int64_t length, std::int64_t k, std::int64_t offset,
          std::int64_t* index, C* value, int threads) {
  parallel_for(count, std::max<std::int64_t>(1, 4 * kGrain / length), threads,
               [&](std::int64_t begin, std::int64_t end) {
                 RowSelector<C> selector(d, length, k);
                 for (std::int64_t r = begin; r < end; ++r) {
                   const std::uint32_t* kept = selector.select(r * length);
                   for (std::int64_t i = 0; i < k; ++i) {
                     const std::int64_t at = r * length + kept[i];
                     const C x = element<C>(d.models[0], at);
                     index[r * k + i] = offset + at;
                     value[r * k + i] = d.has_base() ? x - element<C>(d.base, at) : x;
                   }
                 }
               });
}

void expert_gather(std::uintptr_t base, int base_type, std::uintptr_t model, int type, std::int64_t count,
                   std::int64_t length, std::int64_t k, std::int64_t offset, std::uintptr_t index, std::uintptr_t value,
                   int threads) {
  const Deltas d = make_deltas(base, base_type, {model}, {type});
  auto* at = pointer<std::int64_t>(index);
  d.f64() ? rows<double>(d, count, length, k, offset, at, pointer<double>(value), threads)
          : rows<float>(d, count, length, k, offset, at, pointer<float>(value), threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("expert_gather", &expert_gather, NoGil()); }
}  // namespace fastmerge
