// topk_mask: the mask of the k largest magnitudes, of a whole tensor by its threshold, or of every row.
//
// Story: the pass that looks for the threshold (common/selector.h) knows from a sample what is surely above it, so it
// writes the mask as it goes, and the few elements inside the bracket are set once the threshold is known: one read of
// x. Heavy ties need the threshold first; the mask is then one integer compare per element, and ties to the lowest
// index cost nothing: the rule is one compare on either side of the last kept tie, so the block that holds it is cut in
// two. A row sits in L1, so its threshold is selected there and its mask written in the same visit.
#include "common/export.h"
#include "common/keys.h"
#include "common/parallel.h"
#include "common/sample.h"
#include "common/select.h"
#include "common/stream.h"

namespace fastmerge {
namespace {

FM_SIMD void compare(const float* x, std::int32_t t, std::uint8_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::int32_t>(raw_key(x[i])) > t;
}
FM_SIMD void compare(const bf16* x, std::int32_t t, std::uint8_t* out, std::int64_t n) {
  // A widened bfloat16 has zeros below: comparing the upper halves is enough, and -1 >> 16 stays -1.
  const std::int16_t h = static_cast<std::int16_t>(t >> 16);
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::int16_t>(x[i].bits & 0x7fffu) > h;
}
FM_SIMD void compare(const f16* x, std::int32_t t, std::uint8_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::int32_t>(raw_key(to_float(x[i]))) > t;
}
FM_SIMD void compare(const double* x, std::int64_t t, std::uint8_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::int64_t>(raw_key(x[i])) > t;
}
FM_SIMD void compare(const std::uint32_t* key, std::int32_t t, std::uint8_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::int32_t>(key[i]) > t;
}
FM_SIMD void compare(const std::uint64_t* key, std::int64_t t, std::uint8_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::int64_t>(key[i]) > t;
}

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

void rule_mask(std::uintptr_t out, std::uintptr_t x, int type, std::int64_t n, std::uint64_t key, std::int64_t index,
               int threads) {
  const Rule rule{key, index};
  const bool stream = n >= kStreamBytes;
  dispatch(static_cast<Dtype>(type), [&](auto zero) {
    using T = decltype(zero);
    using C = typename ComputeOf<T>::type;
    const T* from = pointer<const T>(x);
    std::uint8_t* to = pointer<std::uint8_t>(out);
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      alignas(64) std::uint8_t block[kBlock];
      for (std::int64_t at = begin, stop; at < end; at = stop) {
        stop = cut(rule, at, std::min(end, at + kBlock));
        compare(from + at, bound_at<C>(rule, at), stream ? block : to + at, stop - at);
        if (stream) stream_out(to + at, block, stop - at);
      }
      if (stream) stream_fence();
    });
  });
}

void topk_mask(std::uintptr_t out, std::uintptr_t x, int type, std::int64_t n, std::int64_t k, int threads) {
  const Deltas d = make_deltas(0, 0, {x}, {type});
  bool marked = false;
  const Rule rule = (d.f64() ? select_rules<double> : select_rules<float>)(d, n, {{0, k}}, threads,
                                                                           pointer<std::uint8_t>(out), &marked)[0];
  if (!marked) rule_mask(out, x, type, n, rule.key, rule.index, threads);
}

// The k first of the largest keys of one row, by descending key, then ascending position.
template <class K>
void mask_row(const K* key, std::int64_t n, std::int64_t k, std::uint8_t* out) {
  const K last = select_largest(std::vector<KeyPiece<K>>{{key, n}}, k - 1);
  compare(key, static_cast<std::make_signed_t<K>>(last), out, n);
  std::int64_t need = k;
  for (std::int64_t at = 0; at < n; at += kBlock) need -= detail::count_above(key + at, std::min(kBlock, n - at), last);
  for (std::int64_t at = 0; at < n && need > 0; at += kBlock) {
    K equal[kBlock + kSlack];
    std::uint32_t where[kBlock + kSlack];
    std::int64_t above = 0;
    const std::int64_t ties = collect(key + at, std::min(kBlock, n - at), last, K{1}, 0, equal, where, last, above);
    for (std::int64_t i = 0; i < ties && need > 0; ++i, --need) out[at + where[i]] = 1;
  }
}

void topk_rows(std::uintptr_t out, std::uintptr_t x, int type, std::int64_t rows, std::int64_t length, std::int64_t k,
               int threads) {
  dispatch(static_cast<Dtype>(type), [&](auto zero) {
    using T = decltype(zero);
    using K = Key<typename ComputeOf<T>::type>;
    const T* from = pointer<const T>(x);
    std::uint8_t* to = pointer<std::uint8_t>(out);
    parallel_for(rows, std::max<std::int64_t>(1, kGrain / length), threads, [&](std::int64_t begin, std::int64_t end) {
      Buffer<K> key;
      key.reserve(length);
      for (std::int64_t r = begin; r < end; ++r) {
        detail::keys(from + r * length, key.data(), length);
        detail::canonical(key.data(), length);
        mask_row(key.data(), length, k, to + r * length);
      }
    });
  });
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("topk_mask", &topk_mask, NoGil());
  m.def("rule_mask", &rule_mask, NoGil());
  m.def("topk_rows", &topk_rows, NoGil());
}
}  // namespace fastmerge
