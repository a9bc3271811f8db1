// Arcee Fusion: a divergence per row, the importance |delta| times divergence of each element, and the merge of those
// that are important.
//
// Story: the divergence is two softmaxes and a logarithm per element, in double, since its terms are a thousand times
// their sum. Calls of exp and log would cost fifty times what memory does, so both are polynomials in plain loops that
// vectorise: exp after taking out powers of two, log(p / q) as 2 atanh((p - q) / (p + q)), one division, of a q brought
// next to p by a power of two. Both are within a few units of the last place of a double. Of a row, the exponentials
// are kept (16 bytes an element, in L2 for rows of any model) between summing and using them. Sums are in 16 fixed
// lanes. The rest is elementwise: one product and one compare beside reading the inputs.
#include <cmath>
#include <limits>

#include "common/export.h"
#include "common/keys.h"
#include "common/line_weights.h"
#include "common/parallel.h"
#include "common/put.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kTile = 1024;
constexpr int kLanes = 16;
constexpr double kEpsilon = 1e-8;

FM_INLINE std::int64_t bits64(double x) {
  std::int64_t u;
  std::memcpy(&u, &x, 8);
  return u;
}
FM_INLINE double double_of(std::int64_t u) {
  double x;
  std::memcpy(&x, &u, 8);
  return x;
}
// Adding it leaves the nearest integer in the low bits.
constexpr double kRound = 0x1.8p52;
constexpr double kLn2 = 0x1.62e42fefa39efp-1, kLn2Low = 0x1.abc9e3b39803fp-56, kPerLn2 = 0x1.71547652b82fep+0;
FM_INLINE double power_of_two(std::int64_t n) { return double_of((n << 52) + (std::int64_t{1023} << 52)); }

// exp(x) for x <= 0 (not below e^-708: an epsilon is added to it); NaN stays.
FM_INLINE double exp_of(double x) {
  x = x < -708.0 ? -708.0 : x;
  const double t = __builtin_fma(x, kPerLn2, kRound), n = t - kRound;
  const double r = __builtin_fma(-n, kLn2Low, __builtin_fma(-n, kLn2, x));
  double p = 0x1.af38a9b0ec855p-26;  // (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, fitted
  p = __builtin_fma(p, r, 0x1.289185613a3d6p-22);
  p = __builtin_fma(p, r, 0x1.71de0dae63bb3p-19);
  p = __builtin_fma(p, r, 0x1.a019b90d2ae7ap-16);
  p = __builtin_fma(p, r, 0x1.a01a01a7c41d5p-13);
  p = __builtin_fma(p, r, 0x1.6c16c1788bd90p-10);
  p = __builtin_fma(p, r, 0x1.11111111109b3p-7);
  p = __builtin_fma(p, r, 0x1.5555555553d63p-5);
  p = __builtin_fma(p, r, 0x1.5555555555556p-3);
  p = __builtin_fma(p, r, 0x1.0000000000001p-1);
  return (1.0 + __builtin_fma(r * r, p, r)) * power_of_two(bits64(t));
}
// log(p / q) of positive numbers; NaN stays.
FM_INLINE double log_ratio(double p, double q) {
  // Bits of a double are nearly its logarithm: this n leaves p and q 2^n within a factor of 1.51 of one another.
  const std::int64_t n = (bits64(p) - bits64(q) + (std::int64_t{1} << 51)) >> 52;
  const double near = q * power_of_two(n), s = (p - near) / (p + near), z = s * s;
  double a = 0x1.36054e626e551p-4;  // (atanh(s) / s - 1) / s^2 on z <= 0.0405, fitted
  a = __builtin_fma(a, z, 0x1.38f773e12d61cp-4);
  a = __builtin_fma(a, z, 0x1.746c307b14c4ep-4);
  a = __builtin_fma(a, z, 0x1.c71c3a9f70708p-4);
  a = __builtin_fma(a, z, 0x1.2492495467eafp-3);
  a = __builtin_fma(a, z, 0x1.999999997a8b6p-3);
  a = __builtin_fma(a, z, 0x1.5555555555570p-2);
  const double count = double_of(n + bits64(kRound)) - kRound;
  return __builtin_fma(count, kLn2, 2.0 * __builtin_fma(s * z, a, s));
}

#define FASTMERGE_ARCEE_LOOPS(C)                                                                                     \
  FM_SIMD void largest(const C* x, C* most, std::int64_t n) {                                                        \
    C m[kLanes];                                                                                                     \
    for (int l = 0; l < kLanes; ++l) m[l] = most[l];                                                                 \
    std::int64_t i = 0;                                                                                              \
    for (; i + kLanes <= n; i += kLanes)                                                                             \
      for (int l = 0; l < kLanes; ++l) m[l] = x[i + l] > m[l] ? x[i + l] : m[l];                                     \
    for (int l = 0; i < n; ++i, ++l) m[l] = x[i] > m[l] ? x[i] : m[l];                                               \
    for (int l = 0; l < kLanes; ++l) most[l] = m[l];                                                                 \
  }                                                                                                                  \
  FM_SIMD void exponentials(const C* x, double most, double* e, std::int64_t n) {                                    \
    for (std::int64_t i = 0; i < n; ++i) e[i] = exp_of(static_cast<double>(x[i]) - most);                            \
  }                                                                                                                  \
  FM_SIMD void importances(const C* base, const C* other, const C* divergence, C* out, std::int64_t n) {             \
    for (std::int64_t i = 0; i < n; ++i) {                                                                           \
      const C d = other[i] - base[i];                                                                                \
      out[i] = std::abs(d) * divergence[i];                                                                          \
    }                                                                                                                \
  }                                                                                                                  \
  FM_SIMD void merge_tile(const C* base, const C* other, const C* divergence, C threshold, C* out, std::int64_t n) { \
    for (std::int64_t i = 0; i < n; ++i) {                                                                           \
      const C d = other[i] - base[i], importance = std::abs(d) * divergence[i];                                      \
      out[i] = base[i] + (importance >= threshold ? d : C(0));                                                       \
    }                                                                                                                \
  }
FASTMERGE_ARCEE_LOOPS(float)
FASTMERGE_ARCEE_LOOPS(double)

FM_SIMD void terms(const double* other, const double* base, double per_other, double per_base, double* out,
                   std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double p = other[i] * per_other + kEpsilon, q = base[i] * per_base + kEpsilon;
    out[i] = p * log_ratio(p, q);
  }
}
// Lane l adds every 16th element from l on, in order; n is a multiple of 16 but for the last call.
FM_SIMD void add_lanes(const double* x, double* lanes, std::int64_t n) {
  double sum[kLanes];
  for (int l = 0; l < kLanes; ++l) sum[l] = lanes[l];
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) sum[l] += x[i + l];
  for (int l = 0; i < n; ++i, ++l) sum[l] += x[i];
  for (int l = 0; l < kLanes; ++l) lanes[l] = sum[l];
}
double total(const double* lanes) {
  double sum = lanes[0];
  for (int l = 1; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// Fills e with exp(x - max x) of a row; returns their sum.
template <class C>
double soften(const Array& x, std::int64_t at, std::int64_t row, double* e) {
  alignas(64) C wide[kTile];
  C most[kLanes];
  std::fill(most, most + kLanes, -std::numeric_limits<C>::infinity());
  for (std::int64_t i = 0; i < row; i += kTile) {
    const std::int64_t n = std::min(kTile, row - i);
    largest(load_block(x.type, x.address, at + i, n, wide), most, n);
  }
  const auto top = static_cast<double>(*std::max_element(most, most + kLanes));
  double lanes[kLanes] = {};
  for (std::int64_t i = 0; i < row; i += kTile) {
    const std::int64_t n = std::min(kTile, row - i);
    exponentials(load_block(x.type, x.address, at + i, n, wide), top, e + i, n);
    add_lanes(e + i, lanes, n);
  }
  return total(lanes);
}

template <class C>
void divergences(C* out, const Array& base, const Array& other, std::int64_t rows, std::int64_t row, int threads) {
  const std::int64_t group = std::max<std::int64_t>(1, kGrain / row);
  parallel_for(rows, group, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> p(row), q(row);
    alignas(64) double part[kTile];
    for (std::int64_t r = begin; r < end; ++r) {
      const double per_other = 1.0 / soften<C>(other, r * row, row, p.data());
      const double per_base = 1.0 / soften<C>(base, r * row, row, q.data());
      double lanes[kLanes] = {};
      for (std::int64_t i = 0; i < row; i += kTile) {
        const std::int64_t n = std::min(kTile, row - i);
        terms(p.data() + i, q.data() + i, per_other, per_base, part, n);
        add_lanes(part, lanes, n);
      }
      out[r] = static_cast<C>(total(lanes));
    }
  });
}

// f(at, n, base, other, divergence): tiles of [0, n) as C, `offset` being the first element's place in the tensor.
template <class C, class F>
void each_tile(const Array& base, const Array& other, const LineWeights<C>& divergence, std::int64_t begin,
               std::int64_t end, std::int64_t offset, const F& f) {
  alignas(64) C a[kTile], b[kTile], w[kTile];
  for (std::int64_t at = begin; at < end; at += kTile) {
    const std::int64_t n = std::min(kTile, end - at);
    divergence.spread(offset + at, n, w);
    f(at, n, load_block(base.type, base.address, at, n, a), load_block(other.type, other.address, at, n, b), w);
  }
}

struct Pair {
  Array base, other;
  bool f64() const { return base.type == Dtype::f64 || other.type == Dtype::f64; }
};
Pair make_pair(std::uintptr_t base, int base_type, std::uintptr_t other, int other_type) {
  return {{static_cast<Dtype>(base_type), base}, {static_cast<Dtype>(other_type), other}};
}
template <class F>
void with_compute_type(const Pair& x, const F& f) {
  x.f64() ? f(double{}) : f(float{});
}

void arcee_divergence(std::uintptr_t out, std::uintptr_t base, int base_type, std::uintptr_t other, int other_type,
                      std::int64_t rows, std::int64_t row, int threads) {
  const Pair x = make_pair(base, base_type, other, other_type);
  with_compute_type(x, [&](auto zero) {
    using C = decltype(zero);
    divergences(pointer<C>(out), x.base, x.other, rows, row, threads);
  });
}

void arcee_importance(std::uintptr_t out, std::uintptr_t base, int base_type, std::uintptr_t other, int other_type,
                      std::int64_t n, std::uintptr_t divergence, std::int64_t row, std::int64_t offset, int threads) {
  const Pair x = make_pair(base, base_type, other, other_type);
  with_compute_type(x, [&](auto zero) {
    using C = decltype(zero);
    const LineWeights<C> weights{pointer<C>(divergence), row, Lines::rows};
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      each_tile<C>(x.base, x.other, weights, begin, end, offset,
                   [&](std::int64_t at, std::int64_t m, const C* a, const C* b, const C* w) {
                     importances(a, b, w, pointer<C>(out) + at, m);
                   });
    });
  });
}

void arcee_merge(std::uintptr_t out, int out_code, std::uintptr_t base, int base_type, std::uintptr_t other,
                 int other_type, std::int64_t n, std::uintptr_t divergence, double threshold, std::int64_t row,
                 std::int64_t offset, int threads) {
  const Pair x = make_pair(base, base_type, other, other_type);
  const auto out_type = static_cast<Dtype>(out_code);
  const bool stream = n * size_of(out_type) >= kStreamBytes;
  with_compute_type(x, [&](auto zero) {
    using C = decltype(zero);
    const LineWeights<C> weights{pointer<C>(divergence), row, Lines::rows};
    parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      alignas(64) C merged[kTile];
      each_tile<C>(x.base, x.other, weights, begin, end, offset,
                   [&](std::int64_t at, std::int64_t m, const C* a, const C* b, const C* w) {
                     merge_tile(a, b, w, static_cast<C>(threshold), merged, m);
                     put_block(out_type, out, at, m, merged, stream);
                   });
      if (stream) stream_fence();
    });
  });
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("arcee_divergence", &arcee_divergence, NoGil());
  m.def("arcee_importance", &arcee_importance, NoGil());
  m.def("arcee_merge", &arcee_merge, NoGil());
}
}  // namespace fastmerge
