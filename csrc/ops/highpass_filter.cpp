// highpass_filter, the parts around the 1-D transforms (which are torch.fft's, on blocks that stay in cache).
//
// Story: a plain rfft2 + irfft2 spends most of its time in strided column passes over the whole spectrum. Here a block
// of rows is transformed, and only the columns whose gain is not 1 anywhere leave it, transposed, so that the column
// transforms are contiguous too: 205 of 2049 columns for the radial mask of a 4096 x 4096 matrix. They are multiplied
// by (1 - gain), transformed back, and each block of rows subtracts its share: out = x - irfft2((1 - gain) rfft2(x)).
// Where every column is touched the gain itself is applied and nothing is subtracted. Gains are counts of integer
// intervals (fastmerge/ops/_spectral_mask.py); no frequency is ever compared here.
//
// A merge, out = base + (delta - low) with delta = sum_i w_i (model_i - base), adds its inputs up twice, once before
// each row transform, while a block is in cache: they are read twice, and nothing of the matrix's size is written but
// the result.
#include <algorithm>
#include <complex>

#include "common/block.h"
#include "common/export.h"
#include "common/model_sum.h"
#include "common/parallel.h"
#include "common/put.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kTile = 8;  // columns: one cache line of complex64

template <class Z>
void gather(std::uintptr_t spectrum, std::int64_t width, std::int64_t row, std::int64_t rows, std::int64_t height,
            std::uintptr_t columns, std::int64_t count, std::uintptr_t out, int threads) {
  const Z* s = pointer<const Z>(spectrum);
  const std::int32_t* column = pointer<const std::int32_t>(columns);
  Z* o = pointer<Z>(out);
  parallel_blocks(ceil_div(count, kTile), threads, [&](std::int64_t tile) {
    const std::int64_t end = std::min(count, (tile + 1) * kTile);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t matrix = (row + r) / height, h = (row + r) % height;
      for (std::int64_t c = tile * kTile; c < end; ++c) o[(matrix * count + c) * height + h] = s[r * width + column[c]];
    }
  });
}

// The inverse of gather; columns that are not listed become zero.
template <class Z>
void scatter(std::uintptr_t spectrum, std::int64_t width, std::int64_t row, std::int64_t rows, std::int64_t height,
             std::uintptr_t columns, std::int64_t count, std::uintptr_t in, int threads) {
  Z* s = pointer<Z>(spectrum);
  const std::int32_t* column = pointer<const std::int32_t>(columns);
  const Z* x = pointer<const Z>(in);
  constexpr std::int64_t kRows = 16;
  parallel_blocks(ceil_div(rows, kRows), threads, [&](std::int64_t block) {
    const std::int64_t begin = block * kRows, end = std::min(rows, begin + kRows);
    if (count < width) std::fill(s + begin * width, s + end * width, Z(0));
    for (std::int64_t tile = 0; tile < count; tile += kTile)
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t matrix = (row + r) / height, h = (row + r) % height;
        for (std::int64_t c = tile; c < std::min(count, tile + kTile); ++c)
          s[r * width + column[c]] = x[(matrix * count + c) * height + h];
      }
  });
}

// z[h] *= a + b * (how many of the two intervals of row h hold the column); re and im are interleaved. With one table
// the second interval is the first and b is halved: exact, since the shares are 1 and 1/2.
struct Rows {
  const std::int32_t *low, *high, *low2, *high2;
};
FM_SIMD void apply(float* z, Rows t, std::int32_t column, float a, float b, std::int64_t begin, std::int64_t end) {
  for (std::int64_t h = begin; h < end; ++h) {
    const int in = ((t.low[h] <= column) & (column < t.high[h])) + ((t.low2[h] <= column) & (column < t.high2[h]));
    const float gain = a + b * static_cast<float>(in);
    z[2 * h] *= gain;
    z[2 * h + 1] *= gain;
  }
}
FM_SIMD void apply(double* z, Rows t, std::int32_t column, double a, double b, std::int64_t begin, std::int64_t end) {
  for (std::int64_t h = begin; h < end; ++h) {
    const int in = ((t.low[h] <= column) & (column < t.high[h])) + ((t.low2[h] <= column) & (column < t.high2[h]));
    const double gain = a + b * static_cast<double>(in);
    z[2 * h] *= gain;
    z[2 * h + 1] *= gain;
  }
}

// panel: complex [rows, height], row p being column columns[(first + p) % count]; low, high: int32 [tables, height];
// ring: int32 [ring_count, 2] (row, column), ascending. keep: multiply by the gain, else by 1 - gain.
template <class F>
void mask(std::uintptr_t panel, std::int64_t rows, std::int64_t height, std::int64_t first, std::uintptr_t columns,
          std::int64_t count, std::uintptr_t lows, std::uintptr_t highs, int tables, std::uintptr_t rings,
          std::int64_t ring_count, bool keep, int threads) {
  const std::int32_t *low = pointer<const std::int32_t>(lows), *high = pointer<const std::int32_t>(highs);
  const std::int32_t* ring = pointer<const std::int32_t>(rings);
  const Rows table{low, high, low + (tables - 1) * height, high + (tables - 1) * height};
  const F a = keep ? F(0) : F(1), b = keep ? F(0.5) : F(-0.5);
  parallel_blocks(rows, threads, [&](std::int64_t p) {
    F* z = pointer<F>(panel) + 2 * p * height;
    const std::int32_t column = pointer<const std::int32_t>(columns)[(first + p) % count];
    std::int64_t done = 0;
    for (std::int64_t i = 0; i < ring_count; ++i) {
      const std::int64_t h = ring[2 * i];
      if (ring[2 * i + 1] != column || h < done) continue;  // a bin listed twice was done the first time
      apply(z, table, column, a, b, done, h);
      int in = (low[h] <= column && column < high[h]) + (table.low2[h] <= column && column < table.high2[h]);
      for (std::int64_t k = i; k < ring_count && ring[2 * k] == h; ++k)
        in += (ring[2 * k + 1] == column) * (tables == 1 ? 2 : 1);
      const F gain = a + b * static_cast<F>(in);
      z[2 * h] *= gain;
      z[2 * h + 1] *= gain;
      done = h + 1;
    }
    apply(z, table, column, a, b, done, height);
  });
}

FM_SIMD void subtract(const float* x, const float* y, float* z, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) z[i] = x[i] - y[i];
}
FM_SIMD void subtract(const double* x, const double* y, double* z, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) z[i] = x[i] - y[i];
}

template <class F>
constexpr Dtype kCompute = std::is_same_v<F, double> ? Dtype::f64 : Dtype::f32;

// out = base + (delta - low); without `subtracts` base + low, without `adds` no base. delta: where the sums are, or 0:
// then they are added up again, block by block, from in[0 .. models] (the base first, if there is one). The n elements
// are part of a result of `whole`; delta and out may be the same memory.
template <class F>
void finish(const std::vector<std::uintptr_t>& in, const std::vector<int>& in_types, bool has_base,
            const std::vector<double>& weight, std::uintptr_t delta, bool adds, bool subtracts, std::uintptr_t out,
            int out_type, std::uintptr_t low, std::int64_t n, std::int64_t whole, int threads) {
  const std::vector<Dtype> types = dtypes(in_types);
  const Dtype type = static_cast<Dtype>(out_type);
  const bool stream = whole * static_cast<std::int64_t>(size_of(type)) >= kStreamBytes;
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) F origin[kBlock], summed[kBlock], filtered[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, end - at);
      const F* y = pointer<const F>(low) + at;
      if (subtracts) {
        const F* d = summed;
        if (delta != 0) {
          d = pointer<const F>(delta) + at;
        } else {
          const std::uintptr_t to = reinterpret_cast<std::uintptr_t>(summed) - at * sizeof(F);
          sum_range<F>({to, kCompute<F>, in, types, has_base, false, false, weight, 1.0, 1.0}, at, at + m, false);
        }
        subtract(d, y, filtered, m);
        y = filtered;
      }
      if (adds) {
        if (y != filtered) std::copy(y, y + m, filtered);
        add_block(filtered, load_block(types[0], in[0], at, m, origin), m);
        y = filtered;
      }
      put_block(type, out, at, m, y, stream);
    }
    if (stream) stream_fence();
  });
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("highpass_gather_f32", &gather<std::complex<float>>, NoGil());
  m.def("highpass_gather_f64", &gather<std::complex<double>>, NoGil());
  m.def("highpass_scatter_f32", &scatter<std::complex<float>>, NoGil());
  m.def("highpass_scatter_f64", &scatter<std::complex<double>>, NoGil());
  m.def("highpass_mask_f32", &mask<float>, NoGil());
  m.def("highpass_mask_f64", &mask<double>, NoGil());
  m.def("highpass_finish_f32", &finish<float>, NoGil());
  m.def("highpass_finish_f64", &finish<double>, NoGil());
}
}  // namespace fastmerge
