// zip_match: ZipIt's greedy matching of 2n features, the same merges in the same order as the published O(n^3) loop.
//
// Story: the published loop takes the argmax of the whole matrix and copies it without one row and column, n times.
// Here nothing moves. The matrix is symmetric, so only pairs (i, j) with i < j are kept, row by row; deleted features
// leave -inf behind, and since deletion keeps order, "first in the flattened matrix" is "lowest (i, j)". Every row
// carries a tree of maxima over its columns, 16 children to a node and in the same memory as the row, so that one
// changed entry costs at most 16 reads per level, and the first position of a maximum is found by walking down. A merge
// (r, c) rewrites row r (rebuilt in O(n)) and one entry of columns r and c in each lower row: O(n log n) a merge, O(n^2
// log n) in all, whatever the data. Rows are padded off powers of two, or every column access would fall into one cache
// set.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"
#include "common/export.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kFan = 16;

template <class T>
class Pairs {
 public:
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  Pairs(const T* s, std::int64_t n, int threads) : n_(n) {
    std::int64_t width = ceil_div(std::max<std::int64_t>(n, 1), kFan) * kFan, at = 0;
    while (true) {
      level_.push_back(at);
      at += width;
      if (width == kFan) break;
      width = ceil_div(width / kFan, kFan) * kFan;
    }
    stride_ = at + kFan;
    data_.assign(static_cast<std::size_t>(stride_ * n), kNone);
    best_.assign(static_cast<std::size_t>(n), kNone);
    parallel_for(n, 64, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        std::copy(s + i * n + i + 1, s + (i + 1) * n, row(i) + i + 1);
        rebuild(i);
      }
    });
  }

  T get(std::int64_t i, std::int64_t j) const { return i < j ? row(i)[j] : row(j)[i]; }
  const T* row(std::int64_t i) const { return data_.data() + i * stride_; }

  // Sets the pair (i, j), i < j, and the maxima above it.
  void set(std::int64_t i, std::int64_t j, T value) {
    T* r = row(i);
    T old = r[j];
    r[j] = value;
    for (std::size_t l = 1; l < level_.size(); ++l) {
      T& node = r[level_[l] + j / kFan];
      if (old != node && !(value > node)) return;  // neither was the maximum nor is it now
      old = node;
      node = value > node ? value : top(r + level_[l - 1] + j / kFan * kFan);
      value = node;
      if (value == old) return;
      j /= kFan;
    }
    best_[i] = top(r + level_.back());
  }

  // Overwrites without touching the maxima; rebuild(i) must follow.
  void write(std::int64_t i, std::int64_t j, T value) { row(i)[j] = value; }

  void rebuild(std::int64_t i) {
    T* r = row(i);
    for (std::size_t l = 1; l < level_.size(); ++l) {
      const std::int64_t count = (level_[l] - level_[l - 1]) / kFan;
      for (std::int64_t b = 0; b < count; ++b) r[level_[l] + b] = top(r + level_[l - 1] + b * kFan);
    }
    best_[i] = top(r + level_.back());
  }
  void drop(std::int64_t i) { best_[i] = kNone; }

  // The first row of the largest pair and its column; -1 when no pair is left.
  std::pair<std::int64_t, std::int64_t> first_best() const {
    const std::int64_t i = std::max_element(best_.begin(), best_.end()) - best_.begin();
    const T value = best_[i];
    if (value == kNone) return {-1, -1};
    std::int64_t j = 0;
    for (std::size_t l = level_.size(); l-- > 0;) {
      const T* group = row(i) + level_[l] + j * kFan;
      j = j * kFan + (std::find(group, group + kFan, value) - group);
    }
    return {i, j};
  }

 private:
  T* row(std::int64_t i) { return data_.data() + i * stride_; }
  static T top(const T* x) {
    T m = x[0];
    for (std::int64_t k = 1; k < kFan; ++k) m = x[k] > m ? x[k] : m;
    return m;
  }

  std::int64_t n_, stride_ = 0;
  std::vector<std::int64_t> level_;  // where each level of a row starts; level 0 is the row itself
  std::vector<T> data_, best_;
};

template <class T>
void match(std::int64_t* label, T* score, const T* s, std::int64_t size, std::int64_t merges, T alpha,
           std::int64_t budget, int threads) {
  const std::int64_t n = size / 2;
  Pairs<T> pairs(s, size, threads);
  std::vector<std::int64_t> root(size), alive(size);
  std::vector<std::uint8_t> model(size), seen(size);
  std::iota(root.begin(), root.end(), 0);
  std::iota(alive.begin(), alive.end(), 0);
  for (std::int64_t i = 0; i < size; ++i) seen[i] = static_cast<std::uint8_t>(1 << (model[i] = i >= n));
  std::int64_t left[2] = {budget, budget};
  for (std::int64_t step = 0; step < merges; ++step) {
    const auto [r, c] = pairs.first_best();
    if (r < 0) throw std::invalid_argument("zip_match: no pair of features is left to merge; is similarity finite?");
    score[step] = pairs.get(r, c);
    root[c] = r;
    seen[r] |= seen[c];
    alive.erase(std::lower_bound(alive.begin(), alive.end(), c));
    pairs.write(r, c, Pairs<T>::kNone);
    for (const std::int64_t i : alive) {
      if (i == r) continue;
      T value = std::min(pairs.get(i, r), pairs.get(i, c));
      value = alpha > 0 ? value * alpha : (seen[i] & seen[r]) ? Pairs<T>::kNone : value;
      if (i < r) pairs.set(i, r, value);
      else pairs.write(r, i, value);
      if (i < c) pairs.set(i, c, Pairs<T>::kNone);
    }
    pairs.rebuild(r);
    pairs.drop(c);
    if (model[r] == model[c] && --left[model[r]] <= 0) {
      const std::uint8_t mine = model[r];
      for (const std::int64_t i : alive) {
        if (model[i] != mine) continue;
        for (const std::int64_t j : alive)
          if (j > i && model[j] == mine) pairs.write(i, j, Pairs<T>::kNone);
        pairs.rebuild(i);
      }
    }
  }
  std::vector<std::int64_t> rank(size);
  for (std::size_t k = 0; k < alive.size(); ++k) rank[alive[k]] = static_cast<std::int64_t>(k);
  for (std::int64_t i = 0; i < size; ++i) {
    while (root[i] != root[root[i]]) root[i] = root[root[i]];
    label[i] = rank[root[i]];
  }
}

void zip_match(std::uintptr_t label, std::uintptr_t score, std::uintptr_t s, int type, std::int64_t size,
               std::int64_t merges, double alpha, std::int64_t budget, int threads) {
  auto* out = pointer<std::int64_t>(label);
  if (static_cast<Dtype>(type) == Dtype::f64)
    match<double>(out, pointer<double>(score), pointer<const double>(s), size, merges, alpha, budget, threads);
  else
    match<float>(out, pointer<float>(score), pointer<const float>(s), size, merges, static_cast<float>(alpha), budget,
                 threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("zip_match", &zip_match, NoGil()); }
}  // namespace fastmerge
