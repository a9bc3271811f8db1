// What consensus_merge and delta_l1 share: how each model is trimmed, and the keep mask of trims that are not
// thresholds.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "keys.h"
#include "parallel.h"
#include "philox.h"
#include "rank.h"

namespace fastmerge {

constexpr std::int64_t kTermBlock = 1024;  // elements: the terms of four models and their sums stay in L1
constexpr std::size_t kHotModels = 8;

enum class TrimKind : int { rule = 0, random = 1, rank = 2 };
enum class Elect : int { none = 0, sum = 1, count = 2 };

struct Trim {
  TrimKind kind;
  Rule low, high;              // rule: kept by low and not by high
  std::uint64_t limit;         // random
  RankLimits ranks;            // rank
  double weight, coefficient;  // of the divisor; of the delta (weight times rescale factor)
};

// (kind, low key, low index, high key, high index, limit or first, span, divisor, weight, coefficient)
using TrimArguments = std::tuple<int, std::uint64_t, std::int64_t, std::uint64_t, std::int64_t, std::uint64_t,
                                 std::uint64_t, std::uint64_t, double, double>;

inline std::vector<Trim> make_trims(const std::vector<TrimArguments>& arguments) {
  std::vector<Trim> out;
  for (const auto& [kind, low_key, low_index, high_key, high_index, first, span, divisor, weight, coefficient] :
       arguments)
    out.push_back({static_cast<TrimKind>(kind),
                   {low_key, low_index},
                   {high_key, high_index},
                   first,
                   {first, span, divisor},
                   weight,
                   coefficient});
  return out;
}

// One model's arrays in the single loop over up to eight models.
template <class T>
struct Hot {
  const T* base;
  T* out;
  const T* model[kHotModels];
  float coefficient[kHotModels], weight[kHotModels], scale, divisor;
  std::int32_t bound[kHotModels];         // keep when the key is greater, or
  const std::uint64_t* keep[kHotModels];  // random trims: bit j of word w is element 64 w + j of the block
};

template <class T>
T* pointer_of(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Merge {
  Deltas deltas;
  std::uintptr_t out = 0;
  Dtype out_type = Dtype::f32;
  std::int64_t n = 0, row = 1, offset = 0;
  std::vector<Trim> trims;
  std::uint32_t k0 = 0, k1 = 0;
  Elect elect = Elect::none;
  bool normalize = false;
  double divisor = 1.0, scale = 1.0;

  std::int64_t out_size() const { return size_of(out_type); }
  bool by_rank() const {
    return std::any_of(trims.begin(), trims.end(), [](const Trim& t) { return t.kind == TrimKind::rank; });
  }
  // Elements of a parallel piece; whole rows where ranks are needed.
  std::int64_t grain() const { return by_rank() ? std::max<std::int64_t>(1, kGrain / row) * row : kGrain; }
  // The end of a block from `at` on which every rule is one compare, and which lies in one row where ranks matter.
  std::int64_t cut(std::int64_t at, std::int64_t end) const {
    for (const auto& t : trims)
      if (t.kind == TrimKind::rule)
        end = fastmerge::cut(t.high, offset + at, fastmerge::cut(t.low, offset + at, offset + end)) - offset;
    return by_rank() ? std::min(end, (at / row + 1) * row) : end;
  }
};

// Keep masks of random trims for consecutive blocks of one piece.
template <class C>
class Trimmer {
 public:
  explicit Trimmer(const Merge& m) : merge_(m) {
    if (!m.by_rank()) return;
    ranker_ = std::make_unique<Ranker<C>>(m.row);
    rows_.resize(m.trims.size() * m.row + 64);  // whole words of 64 are looked at
    at_.assign(m.trims.size(), -1);
  }

  const std::uint8_t* keep(std::size_t k, std::int64_t at, std::int64_t n) {
    const Trim& t = merge_.trims[k];
    const DrawKey draws{merge_.k0, merge_.k1, static_cast<std::uint32_t>(k)};
    if (t.kind == TrimKind::random) {
      random_keep(draws, merge_.offset + at, n, t.limit, block_);
      return block_;
    }
    const std::int64_t start = at / merge_.row * merge_.row;
    std::uint8_t* row = rows_.data() + static_cast<std::int64_t>(k) * merge_.row;
    if (at_[k] != start) ranker_->keep(merge_.deltas, k, start, t.ranks, draws, merge_.offset + start, row);
    at_[k] = start;
    return row + (at - start);
  }

#ifdef FASTMERGE_AVX512
  // The same as bits: bit j of word w is element at + 64 w + j; bits past n are arbitrary, room as for random_bits.
  void bits(std::size_t k, std::int64_t at, std::int64_t n, std::uint64_t* words) {
    const Trim& t = merge_.trims[k];
    if (t.kind == TrimKind::random) {
      random_bits({merge_.k0, merge_.k1, static_cast<std::uint32_t>(k)}, merge_.offset + at, n, t.limit, words);
      return;
    }
    const std::uint8_t* kept = keep(k, at, n);
    for (std::int64_t i = 0; i < n; i += 64) words[i / 64] = detail::bits_of_bytes(kept + i);
  }
#endif

 private:
  const Merge& merge_;
  std::unique_ptr<Ranker<C>> ranker_;
  std::vector<std::uint8_t> rows_;
  std::vector<std::int64_t> at_;
  std::uint8_t block_[kDraws];
};

}  // namespace fastmerge
