// One threshold on its way to be known: what the passes of common/selector.h found for it, and what follows from that.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "keys.h"
#include "scan.h"
#include "select.h"

namespace fastmerge {

struct Span {
  std::int64_t start, stop;
};

// The k-th largest magnitude of one model's delta.
template <class C>
struct Target {
  using K = Key<C>;
  static constexpr K kTop = KeyOf<C>::max;
  static constexpr int kDigits = sizeof(K) / 2, kHistogram = 1 << 16;
  enum class Phase { start, bracket, digits, locate, done };

  struct Ties {  // how many elements of [start, stop) equal the bracket's ends
    std::int64_t start, stop, hi, lo;
  };
  struct Segment {  // collected entries from `first` on have positions relative to `offset`
    std::int64_t first, offset;
  };
  // What one thread's part of the feeds found for one target; no two in a cache line, since each thread writes its own.
  struct alignas(128) Run {
    Counts counts;
    Buffer<K> key;
    Buffer<std::uint32_t> where;
    std::int64_t size = 0;
    bool overflow = false;
    std::vector<Segment> segments;
    std::vector<Ties> ties;
    std::vector<std::int64_t> histogram, found;

    void clear() { *this = Run(); }
    void reserve(std::int64_t n) {
      key.reserve(n + kSlack);
      where.reserve(n + kSlack);
    }
  };

  std::size_t model;
  std::int64_t k;
  Phase phase = Phase::start;
  Bracket<K> bracket{};
  K key = 0, prefix = 0;       // the k-th key, once known; digits found so far
  int digit = kDigits;         // digits still to find
  std::int64_t need = 0;       // of the elements equal to key, how many are kept
  std::int64_t remaining = 0;  // rank within the prefix
  double share = 0;            // of the elements, expected inside the bracket
  bool marks = false;          // whether a mask is wanted, see Selector::mark
  bool marked = false;         // the mask was written on the way
  Span span{};
  Rule result{};
  std::vector<Run> runs;

  // Whether zeros lie below the bracket and every NaN above it, so that neither needs care.
  bool direct() const {
#ifdef FASTMERGE_AVX512
    return std::is_same_v<C, float> && has_avx512() && phase == Phase::bracket && bracket.lo > 0 &&
           bracket.hi < KeyOf<C>::inf;
#else
    return false;
#endif
  }

  // After a pass: what it found, of n elements. all: the sample's keys, which lie in spans of these lengths.
  void step(std::int64_t n, const std::vector<K>& all, const std::vector<std::int64_t>& spans) {
    switch (phase) {
      case Phase::start: start(n, all, spans); break;
      case Phase::bracket: resolve(); break;
      case Phase::digits: next_digit(); break;
      case Phase::locate: {
        std::vector<std::int64_t> found;
        for (auto& run : runs) found.insert(found.end(), run.found.begin(), run.found.end());
        settle(found);
        break;
      }
      case Phase::done: break;
    }
  }

 private:
  void start(std::int64_t n, const std::vector<K>& all, const std::vector<std::int64_t>& spans) {
    const auto s = static_cast<std::int64_t>(all.size());
    if (n <= 1 << 15) return set_bracket(0, kTop, false);
    if (s < 64) return start_digits();
    std::vector<K> sample(all);
    sort_keys(sample);  // ascending
    const double p = static_cast<double>(k) / static_cast<double>(n);
    const auto r = std::min(s - 1, static_cast<std::int64_t>(p * static_cast<double>(s)));
    // Neighbours are alike in real tensors: the spread between spans, not a binomial, says how far off the rank can be.
    const K pivot = sample[s - 1 - r];
    std::int64_t at = 0, total = 0;
    std::vector<std::int64_t> above;
    for (const auto length : spans) {
      above.push_back(detail::count_above(all.data() + at, length, pivot));
      total += above.back();
      at += length;
    }
    double variance = 0;
    for (std::size_t j = 0; j < spans.size(); ++j) {
      const double expected = static_cast<double>(total) * static_cast<double>(spans[j]) / static_cast<double>(s);
      variance += (above[j] - expected) * (above[j] - expected);
    }
    variance = std::max(variance, s * p * (1.0 - p));
    const auto reach = static_cast<std::int64_t>(4.5 * std::sqrt(variance)) + 3;
    const K hi = r >= reach ? sample[s - 1 - r + reach] : kTop, lo = r + reach < s ? sample[s - 1 - r - reach] : K{0};
    std::int64_t inside = 0, ends = 0;
    for (const K v : all) {
      inside += v >= lo && v <= hi;
      ends += v == lo || v == hi;
    }
    const bool tied = ends * 4 > inside;
    set_bracket(lo, hi, tied);
    share = 1.1 * static_cast<double>(tied ? inside - ends : inside) / static_cast<double>(s);
  }

  void set_bracket(K lo, K hi, bool tied) {
    bracket = {lo, hi, lo, static_cast<K>(hi - lo + 1), tied};
    if (tied) {
      bracket.first = lo + 1;
      bracket.count = hi > lo ? hi - lo - 1 : 0;
    }
    phase = Phase::bracket;
    marked = marks && !tied && direct();
  }
  void start_digits() {
    marked = false;
    phase = Phase::digits;
    digit = kDigits;
    prefix = 0;
    remaining = k;
  }

  void resolve() {
    Counts total;
    std::int64_t inside = 0;
    bool overflow = false;
    for (const auto& run : runs) {
      total.above += run.counts.above;
      for (const auto& ties : run.ties) {
        total.equal_hi += ties.hi;
        total.equal_lo += ties.lo;
      }
      inside += run.size;
      overflow = overflow || run.overflow;
    }
    std::int64_t rank = k - total.above;  // 1 = the largest that is not above
    if (rank < 1 || overflow) return start_digits();
    if (bracket.tied) {
      if (rank <= total.equal_hi) return find_piece(bracket.hi, rank, true);
      rank -= total.equal_hi;
      if (rank > inside) {
        rank -= inside;
        if (rank <= total.equal_lo) return find_piece(bracket.lo, rank, false);
      }
    }
    if (rank > inside) return start_digits();
    std::vector<KeyPiece<K>> pieces;
    for (const auto& run : runs) pieces.push_back({run.key.data(), run.size});
    key = select_largest(pieces, rank - 1);
    need = rank;
    find_candidate();
  }

  // The need-th candidate equal to key in order of position; need still counts the candidates above key. Stretches of
  // one segment are in order and apart from all others, so counting them finds the one stretch to look into.
  void find_candidate() {
    struct Stretch {
      std::int64_t position, ties, n;
      const Segment* segment;
      const Run* run;
      std::int64_t first;
    };
    std::vector<Stretch> stretches;
    for (const auto& run : runs) {
      need -= sum_above(run, key);
      for (std::size_t g = 0; g < run.segments.size(); ++g) {
        const Segment& segment = run.segments[g];
        const std::int64_t stop = g + 1 < run.segments.size() ? run.segments[g + 1].first : run.size;
        for (std::int64_t i = segment.first; i < stop; i += kBlock) {
          const std::int64_t m = std::min(kBlock, stop - i), ties = detail::count_equal(run.key.data() + i, m, key);
          if (ties) stretches.push_back({segment.offset + run.where[i], ties, m, &segment, &run, i});
        }
      }
    }
    std::sort(stretches.begin(), stretches.end(),
              [](const Stretch& a, const Stretch& b) { return a.position < b.position; });
    for (const auto& s : stretches) {
      if (need > s.ties) {
        need -= s.ties;
        continue;
      }
      std::vector<std::int64_t> found;
      for (std::int64_t i = s.first; i < s.first + s.n; ++i)
        if (s.run->key[i] == key) found.push_back(s.segment->offset + s.run->where[i]);
      return settle(found);
    }
    throw std::logic_error("selector: a tie was lost");
  }
  static std::int64_t sum_above(const Run& run, K key) {
    std::int64_t above = 0;
    for (std::int64_t at = 0; at < run.size; at += kBlock)
      above += detail::count_above(run.key.data() + at, std::min(kBlock, run.size - at), key);
    return above;
  }

  // The piece that holds the rank-th element equal to the tie, by the counts of pieces in order of position.
  void find_piece(K tie, std::int64_t rank, bool hi) {
    std::vector<Ties> pieces;
    for (const auto& run : runs) pieces.insert(pieces.end(), run.ties.begin(), run.ties.end());
    std::sort(pieces.begin(), pieces.end(), [](const Ties& a, const Ties& b) { return a.start < b.start; });
    key = tie;
    phase = Phase::locate;
    for (const auto& piece : pieces) {
      const std::int64_t here = hi ? piece.hi : piece.lo;
      need = rank;
      span = {piece.start, piece.stop};
      if (rank <= here) return;
      rank -= here;
    }
    throw std::logic_error("selector: ties do not add up");
  }

  void settle(std::vector<std::int64_t>& found) {
    if (need < 1 || need > static_cast<std::int64_t>(found.size())) throw std::logic_error("selector: a tie was lost");
    std::nth_element(found.begin(), found.begin() + (need - 1), found.end());
    result = {static_cast<std::uint64_t>(key), found[need - 1]};
    phase = Phase::done;
  }

  void next_digit() {
    std::vector<std::int64_t> total(kHistogram, 0);
    for (const auto& run : runs)
      for (std::size_t v = 0; v < run.histogram.size(); ++v) total[v] += run.histogram[v];
    std::int64_t v = kHistogram - 1;
    while (v > 0 && remaining > total[v]) remaining -= total[v--];
    if (remaining > total[v]) throw std::logic_error("selector: digits do not add up");
    --digit;
    prefix |= static_cast<K>(v) << (16 * digit);
    if (digit == 0) set_bracket(prefix, prefix, true);
  }
};

}  // namespace fastmerge
