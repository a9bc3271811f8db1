// highpass_columns: between highpass_rows' two passes, every column of the thin spectrum is transformed, masked and
// transformed back, in place.
//
// Story: sixteen columns at a time are brought to lanes (they lie one after another, so that this is the rows' own
// transposition), and only the rows of the spectrum that the mask leaves something of are combined from the decimated
// transforms and brought back: a tenth of them for the radial mask. Gains are counts of integer intervals, as in
// highpass_filter.cpp.
#include "common/export.h"
#include "common/lanes.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

struct Mask {
  const std::int32_t *low, *high;  // [tables][height]
  std::int64_t height;
  int tables;
  const std::int32_t* ring;  // [rings][row, column], ascending
  std::int64_t rings;
  bool keep;  // multiply by the gain, else by 1 - gain
};

// What the bins (row, columns[0 .. n)) are multiplied by; ring: the first listed bin that may be of this row.
template <class F>
FM_INLINE void gains(const Mask& m, std::int64_t row, const std::int32_t* columns, int n, std::int64_t& ring, F* gain) {
  constexpr int kLanes = Lanes<F>::kCount;
  int in[kLanes] = {};
  const std::int64_t other = (m.tables - 1) * m.height + row;
  for (int i = 0; i < n; ++i)
    in[i] = ((m.low[row] <= columns[i]) & (columns[i] < m.high[row])) +
            ((m.low[other] <= columns[i]) & (columns[i] < m.high[other]));
  while (ring < m.rings && m.ring[2 * ring] < row) ++ring;
  for (std::int64_t r = ring; r < m.rings && m.ring[2 * r] == row; ++r)
    for (int i = 0; i < n; ++i) in[i] += (m.ring[2 * r + 1] == columns[i]) * (m.tables == 1 ? 2 : 1);
  for (int i = 0; i < kLanes; ++i)
    gain[i] = m.keep ? F(0.5) * static_cast<F>(in[i]) : F(1) - F(0.5) * static_cast<F>(in[i]);
}

FM_SIMD void apply(const Mask& m, const LaneTransform<float>& t, const std::int32_t* columns, int n,
                   Lanes<float>::Point* spectrum) {
  std::int64_t ring = 0;
  for (std::int64_t c = 0; c < t.count; ++c) {
    Lanes<float>::V gain;
    gains(m, t.wanted[c], columns, n, ring, reinterpret_cast<float*>(&gain));
    spectrum[c].re *= gain;
    spectrum[c].im *= gain;
  }
}
FM_SIMD void apply(const Mask& m, const LaneTransform<double>& t, const std::int32_t* columns, int n,
                   Lanes<double>::Point* spectrum) {
  std::int64_t ring = 0;
  for (std::int64_t c = 0; c < t.count; ++c) {
    Lanes<double>::V gain;
    gains(m, t.wanted[c], columns, n, ring, reinterpret_cast<double*>(&gain));
    spectrum[c].re *= gain;
    spectrum[c].im *= gain;
  }
}

// spectrum: complex [matrices * count, height]. work: for each thread a piece of `piece` bytes, aligned to 64, that
// holds the points of sixteen columns, the wanted ones, and twice those of one transform.
template <class F>
void filter(std::uintptr_t spectrum, std::int64_t matrices, std::uintptr_t columns, std::int64_t count,
            std::int64_t height, std::uintptr_t lows, std::uintptr_t highs, int tables, std::uintptr_t rings,
            std::int64_t ring_count, bool keep, std::int64_t split, const std::vector<int>& factors,
            std::uintptr_t order, std::uintptr_t wanted, std::int64_t wanted_count, std::uintptr_t numbers,
            std::uintptr_t work, std::int64_t piece, int threads) {
  using Point = typename Lanes<F>::Point;
  constexpr std::int64_t kLanes = Lanes<F>::kCount;
  const LaneTransform<F> t(split, factors, order, wanted, wanted_count, numbers, false);
  if (t.split * t.points != height) throw std::invalid_argument("highpass_columns: the factors do not give the height");
  if (piece < static_cast<std::int64_t>((height + wanted_count + 2 * t.points) * sizeof(Point)))
    throw std::invalid_argument("highpass_columns: the work memory is too small");
  const Mask m{pointer<const std::int32_t>(lows),
               pointer<const std::int32_t>(highs),
               height,
               tables,
               pointer<const std::int32_t>(rings),
               ring_count,
               keep};
  const std::int64_t groups = ceil_div(count, kLanes), all = matrices * groups;
  const std::int64_t team = std::min<std::int64_t>(std::max(threads, 1), all);
  parallel_blocks(team, threads, [&](std::int64_t thread) {
    Point* z = pointer<Point>(work + thread * piece);
    Point *bins = z + height, *gathered = bins + wanted_count, *buffer = gathered + t.points;
    for (std::int64_t g = all * thread / team; g < all * (thread + 1) / team; ++g) {
      const std::int64_t first = g % groups * kLanes, n = std::min(kLanes, count - first);
      F* here = pointer<F>(spectrum) + 2 * (g / groups * count + first) * height;
      to_lanes(here, 2 * height, n, 2 * height, reinterpret_cast<F*>(z));
      columns_forward(t, z, bins, buffer);
      apply(m, t, pointer<const std::int32_t>(columns) + first, static_cast<int>(n), bins);
      columns_inverse(t, bins, z, gathered, buffer);
      from_lanes(reinterpret_cast<const F*>(z), 2 * height, n, here, 2 * height);
    }
  });
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("highpass_columns_f32", &filter<float>, NoGil());
  m.def("highpass_columns_f64", &filter<double>, NoGil());
}
}  // namespace fastmerge
