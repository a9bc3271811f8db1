// Magnitude keys: the bits of |x| as an unsigned integer, every NaN as one key above Inf. Keys order as magnitudes do,
// so selection compares integers only and all backends agree (fastmerge/ops/threshold.py holds the law).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "dtype.h"

namespace fastmerge {

template <class C>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = std::uint32_t;
  static constexpr type inf = 0x7f800000u, nan = 0x7fc00000u, max = 0x7fffffffu;
};
template <>
struct KeyOf<double> {
  using type = std::uint64_t;
  static constexpr type inf = 0x7ff0000000000000u, nan = 0x7ff8000000000000u, max = 0x7fffffffffffffffu;
};
template <class C>
using Key = typename KeyOf<C>::type;
template <class C>
using SignedKey = std::make_signed_t<Key<C>>;

FM_INLINE std::uint32_t raw_key(float x) { return bits_of(x) & 0x7fffffffu; }
FM_INLINE std::uint64_t raw_key(double x) {
  std::uint64_t u;
  std::memcpy(&u, &x, 8);
  return u & 0x7fffffffffffffffu;
}

constexpr std::uint64_t kNoneKey = 0x7fffffffffffffffu;  // no key is greater: a rule with it keeps nothing

// A rule as Python passes it: keep when key > `key`, or equal and index <= `index`. Everything: {0, INT64_MAX}.
struct Rule {
  std::uint64_t key;
  std::int64_t index;
};

// The rule on elements [at, end) where end = cut(rule, at, ...): keep when the raw key, as a signed integer, is greater
// than the result. NaN needs no canonical form for that, and -1 keeps everything.
template <class C>
SignedKey<C> bound_at(const Rule& r, std::int64_t at) {
  using K = KeyOf<C>;
  const bool ties_pass = at <= r.index;
  Key<C> bound;
  if (r.key >= K::nan) bound = r.key == K::nan && ties_pass ? K::inf : K::max;
  else if (r.key > K::inf) bound = K::inf;
  else bound = static_cast<Key<C>>(r.key) - (ties_pass ? 1 : 0);
  return static_cast<SignedKey<C>>(bound);
}

// Where a block that starts at `at` must end so that the rule is one compare on all of it.
inline std::int64_t cut(const Rule& r, std::int64_t at, std::int64_t end) {
  return r.index >= at && r.index < end - 1 ? r.index + 1 : end;
}

namespace detail {
FM_SIMD inline void delta(const float* x, const float* b, float* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = x[i] - b[i];
}
FM_SIMD inline void delta(const bf16* x, const float* b, float* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = to_float(x[i]) - b[i];
}
FM_SIMD inline void delta(const f16* x, const float* b, float* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = to_float(x[i]) - b[i];
}
FM_SIMD inline void delta(const double* x, const double* b, double* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = x[i] - b[i];
}

FM_SIMD inline void keys(const float* x, std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(x[i]);
}
FM_SIMD inline void keys(const bf16* x, std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = static_cast<std::uint32_t>(x[i].bits & 0x7fffu) << 16;
}
FM_SIMD inline void keys(const f16* x, std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(to_float(x[i]));
}
FM_SIMD inline void keys(const double* x, std::uint64_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(x[i]);
}
FM_SIMD inline void delta_keys(const float* x, const float* b, std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(x[i] - b[i]);
}
FM_SIMD inline void delta_keys(const bf16* x, const float* b, std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(to_float(x[i]) - b[i]);
}
FM_SIMD inline void delta_keys(const f16* x, const float* b, std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(to_float(x[i]) - b[i]);
}
FM_SIMD inline void delta_keys(const double* x, const double* b, std::uint64_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = raw_key(x[i] - b[i]);
}

FM_SIMD inline void canonical(std::uint32_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = k[i] > 0x7f800000u ? 0x7fc00000u : k[i];
}
FM_SIMD inline void canonical(std::uint64_t* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) k[i] = k[i] > 0x7ff0000000000000u ? 0x7ff8000000000000u : k[i];
}
}  // namespace detail

// A tensor as the bindings pass it.
struct Array {
  Dtype type;
  std::uintptr_t address;
};

// K models and their base (address 0: none), all of one length; gives deltas and their keys block by block.
struct Deltas {
  Array base;
  std::vector<Array> models;

  bool has_base() const { return base.address != 0; }
  bool f64() const {
    bool any = has_base() && base.type == Dtype::f64;
    for (const auto& m : models) any = any || m.type == Dtype::f64;
    return any;
  }
  // The base's block as C, in `buffer` or in place; nullptr without a base.
  template <class C>
  const C* origin(std::int64_t at, std::int64_t n, C* buffer) const {
    return has_base() ? load_block(base.type, base.address, at, n, buffer) : nullptr;
  }
  // Raw keys (NaN not canonical) of model k's delta on [at, at + n); b is the base's block.
  template <class C>
  void keys(std::size_t k, const C* b, std::int64_t at, std::int64_t n, Key<C>* out) const {
    const Array& m = models[k];
    if constexpr (std::is_same_v<C, float>) {
      dispatch(m.type, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (!std::is_same_v<T, double>) {
          const T* x = reinterpret_cast<const T*>(m.address) + at;
          b ? detail::delta_keys(x, b, out, n) : detail::keys(x, out, n);
        }
      });
    } else {
      double buffer[kBlock];
      const double* x = load_block(m.type, m.address, at, n, buffer);
      b ? detail::delta_keys(x, b, out, n) : detail::keys(x, out, n);
    }
  }
  // The delta itself: in `buffer`, or in place when there is no base and the model has type C.
  template <class C>
  const C* values(std::size_t k, const C* b, std::int64_t at, std::int64_t n, C* buffer) const {
    const Array& m = models[k];
    if (!b) return load_block(m.type, m.address, at, n, buffer);
    if constexpr (std::is_same_v<C, float>) {
      dispatch(m.type, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (!std::is_same_v<T, double>)
          detail::delta(reinterpret_cast<const T*>(m.address) + at, b, buffer, n);
      });
    } else {
      detail::delta(load_block(m.type, m.address, at, n, buffer), b, buffer, n);
    }
    return buffer;
  }
};

inline Deltas make_deltas(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                          const std::vector<int>& types) {
  Deltas d{{static_cast<Dtype>(base_type), base}, {}};
  for (std::size_t k = 0; k < models.size(); ++k) d.models.push_back({static_cast<Dtype>(types[k]), models[k]});
  return d;
}

}  // namespace fastmerge
