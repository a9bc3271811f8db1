// Ranks by magnitude within a row, turned into keep probabilities (DELLA).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "keys.h"
#include "philox.h"

namespace fastmerge {

// The element of rank r (0 = smallest) is kept when its draw is below first + floor(r * span / divisor), all below
// 2^32.
struct RankLimits {
  std::uint64_t first, span, divisor;
};

template <class C>
class Ranker {
  using K = Key<C>;
  struct Entry {
    K key;
    std::uint32_t index;
  };

 public:
  explicit Ranker(std::int64_t length) : length_(length), entries_(length), other_(length), limit_(length) {}

  // keep[0, length) for the row of model k that starts at `at`; `position` is its flat index within the whole tensor.
  void keep(const Deltas& d, std::size_t k, std::int64_t at, const RankLimits& limits, DrawKey draws,
            std::int64_t position, std::uint8_t* keep) {
    rank(d, k, at);
    // r * span / divisor by addition: a quotient and a remainder, no division in the loop.
    const std::uint64_t whole = limits.span / limits.divisor, part = limits.span % limits.divisor;
    std::uint64_t limit = limits.first, rest = 0;
    for (std::int64_t r = 0; r < length_; ++r) {
      limit_[entries_[r].index] = static_cast<std::uint32_t>(limit);
      limit += whole;
      rest += part;
      const bool carry = rest >= limits.divisor;
      limit += carry;
      rest -= carry ? limits.divisor : 0;
    }
    for (std::int64_t i = 0; i < length_; i += kDraws)
      random_keep(draws, position + i, std::min(kDraws, length_ - i), limit_.data() + i, keep + i);
  }

 private:
  // Sorts ascending by key; of equals the lowest index comes last, so that it ranks highest: the sort is stable, and
  // entries go in from the end of the row.
  void rank(const Deltas& d, std::size_t k, std::int64_t at) {
    constexpr int kBits = 11, kBuckets = 1 << kBits, kPasses = (8 * sizeof(K) - 1 + kBits - 1) / kBits;
    std::vector<std::uint32_t>& count = counts_;
    count.assign(static_cast<std::size_t>(kPasses) * kBuckets, 0);
    for (std::int64_t i = 0; i < length_; i += kBlock) {
      C base[kBlock];
      K key[kBlock];
      const std::int64_t m = std::min(kBlock, length_ - i);
      const C* b = d.origin(at + i, m, base);
      d.keys<C>(k, b, at + i, m, key);
      detail::canonical(key, m);
      for (std::int64_t j = 0; j < m; ++j) {
        entries_[length_ - 1 - i - j] = {key[j], static_cast<std::uint32_t>(i + j)};
        for (int p = 0; p < kPasses; ++p) ++count[p * kBuckets + ((key[j] >> (p * kBits)) & (kBuckets - 1))];
      }
    }
    for (int p = 0; p < kPasses; ++p) {
      std::uint32_t* c = count.data() + p * kBuckets;
      const int shift = p * kBits;
      if (c[(entries_[0].key >> shift) & (kBuckets - 1)] == length_) continue;  // one digit for all
      std::uint32_t sum = 0;
      for (int v = 0; v < kBuckets; ++v) {
        const std::uint32_t here = c[v];
        c[v] = sum;
        sum += here;
      }
      for (const Entry& e : entries_) other_[c[(e.key >> shift) & (kBuckets - 1)]++] = e;
      entries_.swap(other_);
    }
  }

  std::int64_t length_;
  std::vector<Entry> entries_, other_;
  std::vector<std::uint32_t> limit_, counts_;
};

}  // namespace fastmerge
