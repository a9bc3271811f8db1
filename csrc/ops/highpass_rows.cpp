// highpass_rows: the two passes of the high-pass filter over rows, from the inputs of a merge to its result.
//
// Story: out = base + (delta - low), delta = sum_i w_i (model_i - base). The first pass adds up sixteen rows of delta
// in cache, transforms them (common/lane_fft.h) and keeps only the columns that the mask removes something from,
// transposed: that thin spectrum is all that is held of a matrix. Its columns are transformed, masked and transformed
// back by the caller. The second pass adds the same sixteen rows up again, brings their share of the thin spectrum back
// to rows, and subtracts. Inputs are read twice and nothing of the matrix's size is written but the result. With one
// input of the compute type, without a base, delta is that input as it lies: the plain filter of a matrix is the same
// two calls.
#include <cstring>

#include "common/export.h"
#include "common/lanes.h"
#include "common/model_sum.h"
#include "common/parallel.h"
#include "common/put.h"

namespace fastmerge {
namespace {

template <class F>
struct Work {
  using Point = typename Lanes<F>::Point;
  F* rows;  // [lanes][W]: deltas
  F* low;   // [lanes][W]: what is subtracted from them
  Point *z, *spectrum, *gathered, *work;

  Work(std::int64_t width, const LaneTransform<F>& t) {
    static thread_local Arena arena;
    const std::size_t rows_bytes = Lanes<F>::kCount * ((width * sizeof(F) + 63) / 64 * 64);
    const std::size_t points = width / 2 + t.count + 2 * t.points;
    unsigned char* at = arena.get(2 * rows_bytes + points * sizeof(Point));
    rows = reinterpret_cast<F*>(at);
    low = reinterpret_cast<F*>(at + rows_bytes);
    z = reinterpret_cast<Point*>(at + 2 * rows_bytes);
    spectrum = z + width / 2;
    gathered = spectrum + t.count;
    work = gathered + t.points;
  }
};

FM_SIMD void interleave(const Lanes<float>::Point* p, float* z) {
  const float *re = reinterpret_cast<const float*>(&p->re), *im = reinterpret_cast<const float*>(&p->im);
  for (int i = 0; i < Lanes<float>::kCount; ++i) {
    z[2 * i] = re[i];
    z[2 * i + 1] = im[i];
  }
}
FM_SIMD void deinterleave(const float* z, Lanes<float>::Point* p) {
  float *re = reinterpret_cast<float*>(&p->re), *im = reinterpret_cast<float*>(&p->im);
  for (int i = 0; i < Lanes<float>::kCount; ++i) {
    re[i] = z[2 * i];
    im[i] = z[2 * i + 1];
  }
}
FM_SIMD void interleave(const Lanes<double>::Point* p, double* z) {
  const double *re = reinterpret_cast<const double*>(&p->re), *im = reinterpret_cast<const double*>(&p->im);
  for (int i = 0; i < Lanes<double>::kCount; ++i) {
    z[2 * i] = re[i];
    z[2 * i + 1] = im[i];
  }
}
FM_SIMD void deinterleave(const double* z, Lanes<double>::Point* p) {
  double *re = reinterpret_cast<double*>(&p->re), *im = reinterpret_cast<double*>(&p->im);
  for (int i = 0; i < Lanes<double>::kCount; ++i) {
    re[i] = z[2 * i];
    im[i] = z[2 * i + 1];
  }
}

struct Inputs {
  const std::vector<std::uintptr_t>& in;  // the base first, if there is one
  std::vector<Dtype> types;
  bool has_base;
  const std::vector<double>& weight;
};

template <class F>
constexpr Dtype kCompute = std::is_same_v<F, double> ? Dtype::f64 : Dtype::f32;

// Elements [begin, end) of the weighted sum: where they lie already, else in `to`.
template <class F>
const F* deltas(const Inputs& x, std::int64_t begin, std::int64_t end, F* to) {
  if (!x.has_base && x.in.size() == 1 && x.types[0] == kCompute<F> && x.weight[0] == 1.0)
    return pointer<const F>(x.in[0]) + begin;
  const std::uintptr_t out = reinterpret_cast<std::uintptr_t>(to) - begin * sizeof(F);
  sum_range<F>({out, kCompute<F>, x.in, x.types, x.has_base, false, false, x.weight, 1.0, 1.0}, begin, end, false);
  return to;
}

// Where a group of rows is: [matrices][rows] of them, the first of each matrix being row `first` of `height`.
struct Place {
  std::int64_t matrices, rows, first, height;
};

// f(matrix, row, count): groups of up to a vector's lanes of rows of one matrix.
template <class F, class Body>
void each_group(const Place& p, int threads, const Body& f) {
  const std::int64_t groups = ceil_div(p.rows, Lanes<F>::kCount);
  parallel_blocks(p.matrices * groups, threads, [&](std::int64_t block) {
    const std::int64_t row = block % groups * Lanes<F>::kCount;
    f(block / groups, row, std::min<std::int64_t>(Lanes<F>::kCount, p.rows - row));
  });
}

template <class F>
void check_width(std::int64_t width, const LaneTransform<F>& t) {
  if (2 * t.split * t.points != width) throw std::invalid_argument("highpass_rows: the factors do not give the width");
}

// spectrum: complex [matrices * count, height], row r of it being a column; rows first .. first + rows are filled.
// keep: where the deltas are stored too, or 0.
template <class F>
void forward(const std::vector<std::uintptr_t>& in, const std::vector<int>& types, bool has_base,
             const std::vector<double>& weight, std::uintptr_t keep, const std::vector<std::int64_t>& place,
             std::int64_t width, std::int64_t split, const std::vector<int>& factors, std::uintptr_t order,
             std::uintptr_t columns, std::int64_t count, std::uintptr_t tables, std::uintptr_t spectrum, int threads) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  const LaneTransform<F> t(split, factors, order, columns, count, tables, true);
  check_width(width, t);
  const Inputs x{in, dtypes(types), has_base, weight};
  const Place p{place[0], place[1], place[2], place[3]};
  each_group<F>(p, threads, [&](std::int64_t matrix, std::int64_t row, std::int64_t rows) {
    const Work<F> work(width, t);
    const std::int64_t at = (matrix * p.rows + row) * width;
    const F* delta = deltas(x, at, at + rows * width, keep ? pointer<F>(keep) + at : work.rows);
    to_lanes(delta, width, rows, width, reinterpret_cast<F*>(work.z));
    rows_forward(t, work.z, work.spectrum, work.work);
    F* out = pointer<F>(spectrum) + 2 * (matrix * count * p.height + p.first + row);
    for (std::int64_t c = 0; c < count; ++c, out += 2 * p.height) {
      alignas(64) F line[2 * kLanes];
      if (rows == kLanes) {
        interleave(work.spectrum + c, out);
      } else {
        interleave(work.spectrum + c, line);
        std::memcpy(out, line, 2 * rows * sizeof(F));
      }
    }
  });
}

FM_SIMD void subtract(const float* x, const float* y, float* z, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) z[i] = x[i] - y[i];
}
FM_SIMD void subtract(const double* x, const double* y, double* z, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) z[i] = x[i] - y[i];
}

// out = base + (delta - low); without `subtracts` base + low, without `adds` no base. delta: where the sums are, or 0.
template <class F>
void inverse(const std::vector<std::uintptr_t>& in, const std::vector<int>& types, bool has_base,
             const std::vector<double>& weight, std::uintptr_t delta, bool adds, bool subtracts, std::uintptr_t out,
             int out_type, const std::vector<std::int64_t>& place, std::int64_t width, std::int64_t split,
             const std::vector<int>& factors, std::uintptr_t order, std::uintptr_t columns, std::int64_t count,
             std::uintptr_t tables, std::uintptr_t spectrum, int threads) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  const LaneTransform<F> t(split, factors, order, columns, count, tables, true);
  check_width(width, t);
  const Inputs x{in, dtypes(types), has_base, weight};
  const Place p{place[0], place[1], place[2], place[3]};
  const Dtype type = static_cast<Dtype>(out_type);
  const bool stream = p.matrices * p.rows * width * size_of(type) >= kStreamBytes;
  each_group<F>(p, threads, [&](std::int64_t matrix, std::int64_t row, std::int64_t rows) {
    const Work<F> work(width, t);
    const std::int64_t at = (matrix * p.rows + row) * width, n = rows * width;
    const F* s = pointer<const F>(spectrum) + 2 * (matrix * count * p.height + p.first + row);
    for (std::int64_t c = 0; c < count; ++c, s += 2 * p.height) {
      alignas(64) F line[2 * kLanes] = {};
      if (rows < kLanes) std::memcpy(line, s, 2 * rows * sizeof(F));
      deinterleave(rows < kLanes ? line : s, work.spectrum + c);
    }
    rows_inverse(t, work.spectrum, work.z, work.gathered, work.work);
    from_lanes(reinterpret_cast<const F*>(work.z), width, rows, work.low, width);
    const F* d = nullptr;
    if (subtracts) d = delta ? pointer<const F>(delta) + at : deltas(x, at, at + n, work.rows);
    alignas(64) F origin[kBlock], sum[kBlock];
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, n - i);
      F* z = work.low + i;
      if (subtracts) {
        subtract(d + i, z, sum, m);
        z = sum;
      }
      if (adds) add_block(z, load_block(x.types[0], in[0], at + i, m, origin), m);
      put_block(type, out, at + i, m, z, stream);
    }
    if (stream) stream_fence();
  });
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("highpass_forward_f32", &forward<float>, NoGil());
  m.def("highpass_forward_f64", &forward<double>, NoGil());
  m.def("highpass_inverse_f32", &inverse<float>, NoGil());
  m.def("highpass_inverse_f64", &inverse<double>, NoGil());
}
}  // namespace fastmerge
