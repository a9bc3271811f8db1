// line_gram and line_merge: inner products of K tensors along rows or columns of a matrix, and their sum with weights
// of its own for every row or column.
//
// Story: methods that treat every row (a filter, a neuron) as a vector need what gram_blocks and weighted_sum give of
// whole tensors, once per row. Products along rows are 16 lanes of doubles that stay in registers within a row; along
// columns every column adds up its own rows in order, a tile of columns at a time, so that the sums stay in L1. The
// merge spreads the weights over the elements of a tile and runs plain loops, however short the rows are.
#include "common/export.h"
#include "common/keys.h"
#include "common/line_weights.h"
#include "common/parallel.h"
#include "common/put.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kTile = 1024;
constexpr int kLanes = 16;

#define FASTMERGE_LINE_LOOPS(C)                                                                                       \
  /* Adds x y to 16 lanes, the first element to the first lane; n is a multiple of 16 but for the last part of a row. \
   */                                                                                                                 \
  FM_SIMD void add_products(const C* x, const C* y, double* lanes, std::int64_t n) {                                  \
    double sum[kLanes];                                                                                               \
    for (int l = 0; l < kLanes; ++l) sum[l] = lanes[l];                                                               \
    std::int64_t i = 0;                                                                                               \
    for (; i + kLanes <= n; i += kLanes)                                                                              \
      for (int l = 0; l < kLanes; ++l) sum[l] += static_cast<double>(x[i + l]) * static_cast<double>(y[i + l]);       \
    for (int l = 0; i < n; ++i, ++l) sum[l] += static_cast<double>(x[i]) * static_cast<double>(y[i]);                 \
    for (int l = 0; l < kLanes; ++l) lanes[l] = sum[l];                                                               \
  }                                                                                                                   \
  FM_SIMD void add_each(const C* x, const C* y, double* sum, std::int64_t n) {                                        \
    for (std::int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(x[i]) * static_cast<double>(y[i]);             \
  }                                                                                                                   \
  FM_SIMD void add_weighted(C* sum, const C* x, const C* w, bool first, std::int64_t n) {                             \
    if (first)                                                                                                        \
      for (std::int64_t i = 0; i < n; ++i) sum[i] = x[i] * w[i];                                                      \
    else                                                                                                              \
      for (std::int64_t i = 0; i < n; ++i) sum[i] += x[i] * w[i];                                                     \
  }
FASTMERGE_LINE_LOOPS(float)
FASTMERGE_LINE_LOOPS(double)

// A tile of all deltas (of the models without a base), widened.
template <class C>
class Tile {
 public:
  explicit Tile(const Deltas& d) : deltas_(d), buffer_(d.models.size() * kTile), delta_(d.models.size()) {}
  void load(std::int64_t at, std::int64_t n) {
    base_ = deltas_.origin(at, n, origin_);
    for (std::size_t k = 0; k < delta_.size(); ++k)
      delta_[k] = deltas_.values(k, base_, at, n, buffer_.data() + k * kTile);
  }
  const C* base() const { return base_; }
  const C* delta(std::size_t k) const { return delta_[k]; }

 private:
  const Deltas& deltas_;
  std::vector<C> buffer_;
  std::vector<const C*> delta_;
  const C* base_ = nullptr;
  alignas(64) C origin_[kTile];
};

template <class F>
void each_pair(std::size_t models, const F& f) {
  for (std::size_t i = 0, p = 0; i < models; ++i)
    for (std::size_t j = i; j < models; ++j, ++p) f(p, i, j);
}

// out[row][pair]
template <class C>
void gram_rows(const Deltas& d, double* out, std::int64_t rows, std::int64_t row, int threads) {
  const std::size_t models = d.models.size(), pairs = models * (models + 1) / 2;
  const std::int64_t many = std::max<std::int64_t>(1, kTile / row);  // rows of a tile
  parallel_for(rows, std::max<std::int64_t>(1, kGrain / row), threads, [&](std::int64_t begin, std::int64_t end) {
    Tile<C> tile(d);
    std::vector<double> lanes(pairs * kLanes);
    for (std::int64_t r = begin; r < end; r += many) {
      const std::int64_t here = std::min(many, end - r), whole = here * row;
      for (std::int64_t at = 0; at < whole; at += kTile) {
        const std::int64_t m = std::min(kTile, whole - at);
        tile.load(r * row + at, m);
        for (std::int64_t s = 0; s < m; s += row) {  // the rows of the tile, or the part of one that it is
          const std::int64_t n = std::min(row, m - s);
          if (at == 0) std::fill(lanes.begin(), lanes.end(), 0.0);
          each_pair(models, [&](std::size_t p, std::size_t i, std::size_t j) {
            add_products(tile.delta(i) + s, tile.delta(j) + s, lanes.data() + p * kLanes, n);
          });
          if (at + m < whole) continue;
          double* to = out + (r + s / row) * static_cast<std::int64_t>(pairs);
          for (std::size_t p = 0; p < pairs; ++p) {
            to[p] = lanes[p * kLanes];
            for (int l = 1; l < kLanes; ++l) to[p] += lanes[p * kLanes + l];
          }
        }
      }
    }
  });
}

// out[column][pair], each column's rows added in order.
template <class C>
void gram_columns(const Deltas& d, double* out, std::int64_t rows, std::int64_t columns, int threads) {
  const std::size_t models = d.models.size(), pairs = models * (models + 1) / 2;
  parallel_blocks(ceil_div(columns, kTile), threads, [&](std::int64_t piece) {
    const std::int64_t column = piece * kTile, n = std::min(kTile, columns - column);
    std::vector<double> sums(pairs * kTile, 0.0);
    Tile<C> tile(d);
    for (std::int64_t r = 0; r < rows; ++r) {
      tile.load(r * columns + column, n);
      each_pair(models, [&](std::size_t p, std::size_t i, std::size_t j) {
        add_each(tile.delta(i), tile.delta(j), sums.data() + p * kTile, n);
      });
    }
    for (std::int64_t c = 0; c < n; ++c)
      for (std::size_t p = 0; p < pairs; ++p)
        out[(column + c) * static_cast<std::int64_t>(pairs) + static_cast<std::int64_t>(p)] = sums[p * kTile + c];
  });
}

void line_gram(std::uintptr_t out, std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
               const std::vector<int>& types, std::int64_t rows, std::int64_t columns, int lines, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const auto gram = static_cast<Lines>(lines) == Lines::rows ? gram_rows<C> : gram_columns<C>;
    gram(d, pointer<double>(out), rows, columns, threads);
  };
  d.f64() ? run(double{}) : run(float{});
}

// weight: C [models][lines]
template <class C>
void merge(const Deltas& d, std::uintptr_t out, Dtype out_type, const C* weight, std::int64_t count, std::int64_t n,
           std::int64_t row, Lines lines, int threads) {
  const bool stream = n * size_of(out_type) >= kStreamBytes;
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    Tile<C> tile(d);
    alignas(64) C sum[kTile], w[kTile];
    for (std::int64_t at = begin; at < end; at += kTile) {
      const std::int64_t m = std::min(kTile, end - at);
      tile.load(at, m);
      for (std::size_t k = 0; k < d.models.size(); ++k) {
        LineWeights<C>{weight + static_cast<std::int64_t>(k) * count, row, lines}.spread(at, m, w);
        add_weighted(sum, tile.delta(k), w, k == 0, m);
      }
      if (tile.base()) add_block(sum, tile.base(), m);
      put_block(out_type, out, at, m, sum, stream);
    }
    if (stream) stream_fence();
  });
}

void line_merge(std::uintptr_t out, int out_type, std::uintptr_t base, int base_type,
                const std::vector<std::uintptr_t>& models, const std::vector<int>& types, std::uintptr_t weight,
                std::int64_t rows, std::int64_t columns, int lines, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  const auto along = static_cast<Lines>(lines);
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    merge(d, out, static_cast<Dtype>(out_type), pointer<C>(weight), along == Lines::rows ? rows : columns,
          rows * columns, columns, along, threads);
  };
  d.f64() ? run(double{}) : run(float{});
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("line_gram", &line_gram, NoGil());
  m.def("line_merge", &line_merge, NoGil());
}
}  // namespace fastmerge
