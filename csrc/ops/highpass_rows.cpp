// highpass_rows: the two passes of the high-pass filter over rows, from the inputs of a merge to its result.
//
// Story: out = base + (delta - low), delta = sum_i w_i (model_i - base). The first pass adds up sixteen rows of delta in
// cache, transforms them (common/row_fft.h) and keeps only the columns that the mask removes something from, transposed:
// that thin spectrum is all that is held of a matrix. Its columns are transformed, masked and transformed back by the
// caller. The second pass adds the same sixteen rows up again, brings their share of the thin spectrum back to rows, and
// subtracts. Inputs are read twice and nothing of the matrix's size is written but the result. With one input of the
// compute type, without a base, delta is that input as it lies: the plain filter of a matrix is the same two calls.
#include <cstring>
#include <memory>

#include "common/export.h"
#include "common/model_sum.h"
#include "common/parallel.h"
#include "common/row_fft.h"

namespace fastmerge {
namespace {

// Work memory of a thread, kept from call to call: mapping it anew costs more than a transform.
class Arena {
 public:
  unsigned char* get(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset(new unsigned char[bytes + 64]);
      size_ = bytes;
    }
    return memory_.get() + (64 - (reinterpret_cast<std::uintptr_t>(memory_.get()) & 63)) % 64;
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  std::size_t size_ = 0;
};

template <class F>
struct Work {
  using Point = typename Lanes<F>::Point;
  F* rows;  // [lanes][W]: deltas
  F* low;   // [lanes][W]: what is subtracted from them
  Point *z, *spectrum, *gathered, *work;

  explicit Work(const RowTransform<F>& t) {
    static thread_local Arena arena;
    const std::size_t rows_bytes = Lanes<F>::kCount * ((t.width * sizeof(F) + 63) / 64 * 64);
    const std::size_t points = t.width / 2 + t.count + 2 * t.points;
    unsigned char* at = arena.get(2 * rows_bytes + points * sizeof(Point));
    rows = reinterpret_cast<F*>(at);
    low = reinterpret_cast<F*>(at + rows_bytes);
    z = reinterpret_cast<Point*>(at + 2 * rows_bytes);
    spectrum = z + t.width / 2;
    gathered = spectrum + t.count;
    work = gathered + t.points;
  }
};

#ifdef FASTMERGE_AVX512
// Transposes 16 rows of 16 floats: to[16 j + i] = from[i][j], or back.
FM_AVX512 inline void transpose16(const float* const* from, std::int64_t from_at, float* const* to, std::int64_t to_at) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from[i] + from_at);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(to[i] + to_at, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to[i + 8] + to_at, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}
#endif

// lanes[j][i] = rows[i][j]; rows that are not there become zeros.
template <class F>
void to_lanes(const F* rows, std::int64_t stride, std::int64_t count, std::int64_t width, F* lanes) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  std::int64_t j = 0;
#ifdef FASTMERGE_AVX512
  if constexpr (std::is_same_v<F, float>)
    if (count == kLanes && has_avx512()) {
      const float* from[kLanes];
      float* to[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        from[i] = rows + i * stride;
        to[i] = lanes + i * kLanes;
      }
      for (; j + kLanes <= width; j += kLanes) transpose16(from, j, to, j * kLanes);
    }
#endif
  for (; j < width; ++j)
    for (std::int64_t i = 0; i < kLanes; ++i) lanes[j * kLanes + i] = i < count ? rows[i * stride + j] : F(0);
}

// rows[i][j] = lanes[j ^ 1][i]: re and im come swapped from the inverse transform.
template <class F>
void from_lanes(const F* lanes, std::int64_t width, std::int64_t count, F* rows, std::int64_t stride) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  std::int64_t j = 0;
#ifdef FASTMERGE_AVX512
  if constexpr (std::is_same_v<F, float>)
    if (has_avx512()) {  // rows beyond `count` are written too: there is room for all lanes
      const float* from[kLanes];
      float* to[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        from[i] = lanes + (i ^ 1) * kLanes;
        to[i] = rows + i * stride;
      }
      for (; j + kLanes <= width; j += kLanes) transpose16(from, j * kLanes, to, j);
    }
#endif
  for (; j < width; ++j)
    for (std::int64_t i = 0; i < count; ++i) rows[i * stride + j] = lanes[(j ^ 1) * kLanes + i];
}

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
RowTransform<F> described(std::int64_t width, std::int64_t split, const std::vector<int>& factors,
                          std::uintptr_t order, std::uintptr_t columns, std::int64_t count, std::uintptr_t tables) {
  std::int64_t points = 1, stages = 0;
  for (int f : factors) {
    if (f > detail::kLargestRadix) throw std::invalid_argument("highpass_rows: a factor is too large");
    stages += 2 * (f + points * (f - 1));
    points *= f;
  }
  if (split * points * 2 != width) throw std::invalid_argument("highpass_rows: the factors do not give the width");
  const F* at = pointer<const F>(tables);
  return {width, split, points, count, factors, pointer<const std::int32_t>(order),
          pointer<const std::int32_t>(columns), at, at + stages, at + stages + 4 * split * count};
}

// spectrum: complex [matrices * count, height], row r of it being a column; rows first .. first + rows are filled.
// keep: where the deltas are stored too, or 0.
template <class F>
void forward(const std::vector<std::uintptr_t>& in, const std::vector<int>& types, bool has_base,
             const std::vector<double>& weight, std::uintptr_t keep, const std::vector<std::int64_t>& place,
             std::int64_t width, std::int64_t split, const std::vector<int>& factors, std::uintptr_t order,
             std::uintptr_t columns, std::int64_t count, std::uintptr_t tables, std::uintptr_t spectrum, int threads) {
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  const RowTransform<F> t = described<F>(width, split, factors, order, columns, count, tables);
  const Inputs x{in, dtypes(types), has_base, weight};
  const Place p{place[0], place[1], place[2], place[3]};
  each_group<F>(p, threads, [&](std::int64_t matrix, std::int64_t row, std::int64_t rows) {
    const Work<F> work(t);
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
  const RowTransform<F> t = described<F>(width, split, factors, order, columns, count, tables);
  const Inputs x{in, dtypes(types), has_base, weight};
  const Place p{place[0], place[1], place[2], place[3]};
  const Dtype type = static_cast<Dtype>(out_type);
  const bool stream = p.matrices * p.rows * width * size_of(type) >= kStreamBytes;
  each_group<F>(p, threads, [&](std::int64_t matrix, std::int64_t row, std::int64_t rows) {
    const Work<F> work(t);
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
    alignas(64) unsigned char rounded[kBlock * sizeof(double)];
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, n - i);
      F* z = work.low + i;
      if (subtracts) {
        subtract(d + i, z, sum, m);
        z = sum;
      }
      if (adds) add_block(z, load_block(x.types[0], in[0], at + i, m, origin), m);
      if (stream) {
        store_block(type, reinterpret_cast<std::uintptr_t>(rounded), 0, m, z);
        stream_out(pointer<unsigned char>(out) + (at + i) * size_of(type), rounded, m * size_of(type));
      } else {
        store_block(type, out, at + i, m, z);
      }
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
