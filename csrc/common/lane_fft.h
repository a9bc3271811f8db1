// Fourier transforms of many rows at once, one row to a lane of a vector: every lane does the same operations in the
// same order, so that a row's result depends neither on its neighbours, nor on how many rows there are, nor on the
// threads. (The columns of a matrix are rows of what the first pass stores.)
//
// Only some frequencies k are wanted (or given). N points are decimated into R sequences of M points; the transforms
// F_r = DFT_M(z[r + R m]) give X[k] = sum_r w^(rk) F_r[k mod M], w = exp(-2 pi i / N). The inverse runs backwards:
// Y_r[k mod M] += w^(-rk) / N X[k], z[r + R m] = IDFT_M(Y_r)[m]. With few k, R is 4, say: a quarter of the last stages'
// work is done, and M points stay in cache.
//
// A real row of W = 2 N elements is N points z[n] = x[2n] + i x[2n + 1], and the separation goes with the combination:
//   X[k] = sum_r a[r][k] F_r[k mod M] + b[r][k] conj(F_r[-k mod M]),
//   a = w^(rk) (1 - i v^k) / 2, b = w^(rk) (1 + i v^k) / 2, v = exp(-2 pi i / W);
//   Y_r[k mod M] += c X[k], Y_r[-k mod M] += conj(d X[k]), c = conj(a) / N, d = conj(b) / N,
// but d = 0 for k = 0 (whose imaginary part counts as 0) and c = 0 for k = N.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "simd.h"

namespace fastmerge {

template <class F>
struct Lanes {
  typedef F V __attribute__((vector_size(64)));
  static constexpr int kCount = 64 / sizeof(F);
  struct Point {
    V re, im;
  };
};

// Tables of fastmerge/ops/_lane_transform.py; numbers are (re, im) pairs of F.
template <class F>
struct LaneTransform {
  std::int64_t split, points, count;  // R, M, and how many frequencies
  std::vector<int> factors;           // of M, in the order of the stages
  const std::int32_t* order;          // [M]: the point that stage 0 wants at each place
  const std::int32_t* wanted;         // [count]: the frequencies, ascending
  const F* stages;                    // for each stage its radix's roots [f], then twiddles [L][f - 1]
  const F* forward;                   // [R][count][a, b] of real rows, [R][count] of complex ones
  const F* inverse;                   // [R][count][c, d], [R][count]

  LaneTransform(std::int64_t split, const std::vector<int>& factors, std::uintptr_t order, std::uintptr_t wanted,
                std::int64_t count, std::uintptr_t tables, bool real);
};

namespace detail {

constexpr int kLargestRadix = 257;  // fastmerge/ops/_lane_transform.py:LARGEST_RADIX

template <class P, class F>
FM_INLINE P times(const P& z, F re, F im) {
  return {z.re * re - z.im * im, z.re * im + z.im * re};
}
template <class P>
FM_INLINE P plus(const P& a, const P& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class P>
FM_INLINE P minus(const P& a, const P& b) {
  return {a.re - b.re, a.im - b.im};
}

template <class P>
FM_INLINE void butterfly2(P* z) {
  const P a = z[0], b = z[1];
  z[0] = plus(a, b);
  z[1] = minus(a, b);
}

template <class P>
FM_INLINE void butterfly4(P* z) {
  const P t0 = plus(z[0], z[2]), t1 = minus(z[0], z[2]), t2 = plus(z[1], z[3]), u = minus(z[1], z[3]);
  z[0] = plus(t0, t2);
  z[2] = minus(t0, t2);
  z[1] = {t1.re + u.im, t1.im - u.re};  // t1 - i u
  z[3] = {t1.re - u.im, t1.im + u.re};
}

// An odd prime radix, by pairs of points: sums carry the cosines, differences the sines.
template <class P, class F>
FM_INLINE void butterfly_odd(P* z, int radix, const F* roots) {
  constexpr int kMost = kLargestRadix / 2;
  const int half = radix / 2;
  P sum[kMost], difference[kMost];
  P total = z[0];
  for (int j = 0; j < half; ++j) {
    sum[j] = plus(z[j + 1], z[radix - 1 - j]);
    difference[j] = minus(z[j + 1], z[radix - 1 - j]);
    total = plus(total, sum[j]);
  }
  const P first = z[0];
  z[0] = total;
  for (int k = 1; k <= half; ++k) {
    P even = first, odd{};
    for (int j = 1, at = k; j <= half; ++j, at = at + k < radix ? at + k : at + k - radix) {
      const F c = roots[2 * at], s = -roots[2 * at + 1];
      even.re += sum[j - 1].re * c;
      even.im += sum[j - 1].im * c;
      odd.re += difference[j - 1].re * s;
      odd.im += difference[j - 1].im * s;
    }
    z[k] = {even.re + odd.im, even.im - odd.re};  // even - i odd
    z[radix - k] = {even.re - odd.im, even.im + odd.re};
  }
}

// One stage: M / (L f) blocks of L f points, in place in `work`, or from `from` (points order[i] * stride) when it is
// the first and to `to` (points i * stride) when it is the last.
template <class F, int kRadix, bool kFirst, class P>
FM_INLINE void stage(P* to, std::int64_t to_stride, const P* from, std::int64_t from_stride, const std::int32_t* order,
                     std::int64_t points, std::int64_t length, int radix, const F* roots) {
  const int f = kRadix ? kRadix : radix;
  const F* twiddle = roots + 2 * f;
  P z[kRadix ? kRadix : kLargestRadix];
  for (std::int64_t block = 0; block < points; block += length * f)
    for (std::int64_t j = 0; j < length; ++j) {
      const std::int64_t at = block + j;
      const F* w = twiddle + 2 * j * (f - 1);
      for (int q = 0; q < f; ++q) {
        const std::int64_t i = at + q * length;
        z[q] = kFirst ? from[order[i] * from_stride] : from[i];
        if (!kFirst && q) z[q] = times(z[q], w[2 * q - 2], w[2 * q - 1]);
      }
      if (kRadix == 2) butterfly2(z);
      else if (kRadix == 4) butterfly4(z);
      else butterfly_odd(z, f, roots);
      for (int q = 0; q < f; ++q) to[(at + q * length) * to_stride] = z[q];
    }
}

template <class F, bool kFirst, class P>
FM_INLINE void any_stage(P* to, std::int64_t to_stride, const P* from, std::int64_t from_stride,
                         const std::int32_t* order, std::int64_t points, std::int64_t length, int radix,
                         const F* roots) {
  switch (radix) {
    case 2: stage<F, 2, kFirst>(to, to_stride, from, from_stride, order, points, length, radix, roots); return;
    case 3: stage<F, 3, kFirst>(to, to_stride, from, from_stride, order, points, length, radix, roots); return;
    case 4: stage<F, 4, kFirst>(to, to_stride, from, from_stride, order, points, length, radix, roots); return;
    case 5: stage<F, 5, kFirst>(to, to_stride, from, from_stride, order, points, length, radix, roots); return;
    default: stage<F, 0, kFirst>(to, to_stride, from, from_stride, order, points, length, radix, roots);
  }
}

// DFT of the M points from[i * from_stride] into to[i * to_stride]; work: [M], may be `to` where to_stride is 1.
template <class F, class P>
FM_INLINE void transform(const LaneTransform<F>& t, P* to, std::int64_t to_stride, const P* from,
                         std::int64_t from_stride, P* work) {
  const F* roots = t.stages;
  std::int64_t length = 1;
  const std::size_t stages = t.factors.size();
  for (std::size_t s = 0; s < stages; ++s) {
    const int f = t.factors[s];
    P* into = s + 1 == stages ? to : work;
    const std::int64_t stride = s + 1 == stages ? to_stride : 1;
    if (s == 0) any_stage<F, true>(into, stride, from, from_stride, t.order, t.points, length, f, roots);
    else any_stage<F, false>(into, stride, work, 1, t.order, t.points, length, f, roots);
    roots += 2 * (f + length * (f - 1));
    length *= f;
  }
}

// z: [N] points; spectrum: [count], filled; work: [M].
template <class F, class P>
FM_INLINE void forward_real(const LaneTransform<F>& t, const P* z, P* spectrum, P* work) {
  for (std::int64_t c = 0; c < t.count; ++c) spectrum[c] = P{};
  for (std::int64_t r = 0; r < t.split; ++r) {
    transform(t, work, 1, z + r, t.split, work);
    const F* table = t.forward + 4 * r * t.count;
    for (std::int64_t c = 0; c < t.count; ++c, table += 4) {
      const std::int64_t k = t.wanted[c] % t.points;
      const P &x = work[k], &y = work[k ? t.points - k : 0];
      const P ax = times(x, table[0], table[1]), by = times(P{y.re, -y.im}, table[2], table[3]);
      spectrum[c].re += ax.re + by.re;
      spectrum[c].im += ax.im + by.im;
    }
  }
}

// spectrum: [count]; z: [N] points, filled with re and im swapped; gathered, work: [M].
template <class F, class P>
FM_INLINE void inverse_real(const LaneTransform<F>& t, const P* spectrum, P* z, P* gathered, P* work) {
  for (std::int64_t r = 0; r < t.split; ++r) {
    for (std::int64_t m = 0; m < t.points; ++m) gathered[m] = P{};
    const F* table = t.inverse + 4 * r * t.count;
    for (std::int64_t c = 0; c < t.count; ++c, table += 4) {
      const std::int64_t k = t.wanted[c] % t.points;
      P &x = gathered[k], &y = gathered[k ? t.points - k : 0];
      const P cs = times(spectrum[c], table[0], table[1]), ds = times(spectrum[c], table[2], table[3]);
      // A transform of points with re and im swapped is the inverse transform, swapped.
      x.re += cs.im;
      x.im += cs.re;
      y.re -= ds.im;
      y.im += ds.re;
    }
    transform(t, z + r, t.split, gathered, 1, work);
  }
}

// The same for complex points.
template <class F, class P>
FM_INLINE void forward_complex(const LaneTransform<F>& t, const P* z, P* spectrum, P* work) {
  for (std::int64_t c = 0; c < t.count; ++c) spectrum[c] = P{};
  for (std::int64_t r = 0; r < t.split; ++r) {
    transform(t, work, 1, z + r, t.split, work);
    const F* table = t.forward + 2 * r * t.count;
    for (std::int64_t c = 0; c < t.count; ++c, table += 2)
      spectrum[c] = plus(spectrum[c], times(work[t.wanted[c] % t.points], table[0], table[1]));
  }
}
template <class F, class P>
FM_INLINE void inverse_complex(const LaneTransform<F>& t, const P* spectrum, P* z, P* gathered, P* work) {
  for (std::int64_t r = 0; r < t.split; ++r) {
    for (std::int64_t m = 0; m < t.points; ++m) gathered[m] = P{};
    const F* table = t.inverse + 2 * r * t.count;
    for (std::int64_t c = 0; c < t.count; ++c, table += 2) {
      P& x = gathered[t.wanted[c] % t.points];
      const P s = times(spectrum[c], table[0], table[1]);
      x = plus(x, P{s.im, s.re});
    }
    transform(t, z + r, t.split, gathered, 1, work);
  }
}

}  // namespace detail

template <class F>
LaneTransform<F>::LaneTransform(std::int64_t split, const std::vector<int>& factors, std::uintptr_t order,
                                std::uintptr_t wanted, std::int64_t count, std::uintptr_t tables, bool real)
    : split(split),
      points(1),
      count(count),
      factors(factors),
      order(reinterpret_cast<const std::int32_t*>(order)),
      wanted(reinterpret_cast<const std::int32_t*>(wanted)),
      stages(reinterpret_cast<const F*>(tables)) {
  std::int64_t numbers = 0;
  for (int f : factors) {
    if (f > detail::kLargestRadix) throw std::invalid_argument("LaneTransform: a factor is too large");
    numbers += f + points * (f - 1);
    points *= f;
  }
  forward = stages + 2 * numbers;
  inverse = forward + (real ? 4 : 2) * split * count;
}

// One per compute type and direction, compiled for each instruction set. Inverses leave re and im of z swapped.
#define FASTMERGE_LANE_TRANSFORMS(F)                                                                                  \
  FM_SIMD inline void rows_forward(const LaneTransform<F>& t, const Lanes<F>::Point* z, Lanes<F>::Point* spectrum,    \
                                   Lanes<F>::Point* work) {                                                           \
    detail::forward_real(t, z, spectrum, work);                                                                       \
  }                                                                                                                   \
  FM_SIMD inline void rows_inverse(const LaneTransform<F>& t, const Lanes<F>::Point* spectrum, Lanes<F>::Point* z,    \
                                   Lanes<F>::Point* gathered, Lanes<F>::Point* work) {                                \
    detail::inverse_real(t, spectrum, z, gathered, work);                                                             \
  }                                                                                                                   \
  FM_SIMD inline void columns_forward(const LaneTransform<F>& t, const Lanes<F>::Point* z, Lanes<F>::Point* spectrum, \
                                      Lanes<F>::Point* work) {                                                        \
    detail::forward_complex(t, z, spectrum, work);                                                                    \
  }                                                                                                                   \
  FM_SIMD inline void columns_inverse(const LaneTransform<F>& t, const Lanes<F>::Point* spectrum, Lanes<F>::Point* z, \
                                      Lanes<F>::Point* gathered, Lanes<F>::Point* work) {                             \
    detail::inverse_complex(t, spectrum, z, gathered, work);                                                          \
  }
FASTMERGE_LANE_TRANSFORMS(float)
FASTMERGE_LANE_TRANSFORMS(double)

}  // namespace fastmerge
