// Exact k-th magnitudes of K deltas over a tensor that is fed in pieces.
//
// Story: a sample gives each target (a model and its k) a bracket of keys that surely holds the k-th; one pass counts
// what lies above and collects what lies inside, about 2 % of the elements; a selection among those gives the key, and
// the position of the last tie that is kept. Two things can upset that. Heavy ties (bfloat16 deltas have few distinct
// values) would flood the bracket: then its two ends are counted per piece instead of collected, and one piece is
// looked at again. And a sample can mislead: then two (float64: four) histogram passes over 16-bit digits find the key
// exactly. Pieces may come in any order and of any size; the answer depends on the data alone.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "keys.h"
#include "parallel.h"
#include "scan.h"
#include "select.h"
#include "stream.h"

namespace fastmerge {

struct Span {
  std::int64_t start, stop;
};

class SelectorBase {
 public:
  virtual ~SelectorBase() = default;
  virtual void sample_spans(const Deltas& d, std::int64_t n, std::int64_t length) = 0;
  virtual void feed(const Deltas& d, std::int64_t offset, std::int64_t n, int threads) = 0;
  virtual void feed_lane(const Deltas& d, std::int64_t offset, std::int64_t n, std::size_t lane) = 0;
  virtual std::vector<Span> advance(int threads) = 0;
  virtual void aim(const std::vector<std::int64_t>& counts) = 0;
  virtual std::vector<Rule> results() const = 0;
};

template <class C>
class Selector final : public SelectorBase {
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
  struct Target {
    std::size_t model;
    std::int64_t k;
    Phase phase = Phase::start;
    Bracket<K> bracket{};
    K key = 0, prefix = 0;       // the k-th key, once known; digits found so far
    int digit = kDigits;         // digits still to find
    std::int64_t need = 0;       // of the elements equal to key, how many are kept
    std::int64_t remaining = 0;  // rank within the prefix
    double share = 0;            // of the elements, expected inside the bracket
    bool marked = false;         // the mask was written on the way, see mark()
    Span span{};
    Rule result{};
    std::vector<Run> runs;
  };

 public:
  Selector(std::int64_t n, const std::vector<std::pair<std::size_t, std::int64_t>>& targets, std::size_t lanes = 1)
      : n_(n) {
    for (const auto& [model, k] : targets) {
      if (k < 1 || k > n) throw std::invalid_argument("selector: k " + std::to_string(k) + " of " + std::to_string(n));
      Target t;
      t.model = model;
      t.k = k;
      t.runs.resize(lanes);
      models_ = std::max(models_, model + 1);
      targets_.push_back(std::move(t));
    }
    samples_.resize(models_);
  }

  // With one target: the pass over the data also writes the mask of the elements kept, n bytes. It is whole when
  // marked() says so at the end; heavy ties and sorry samples take other passes, which write nothing.
  void mark(std::uint8_t* mask) { mask_ = mask; }
  bool marked() const { return mask_ && targets_.size() == 1 && targets_[0].marked; }

  // n elements of every delta: spans of the sample, `length` elements each, one after the other.
  void sample_spans(const Deltas& d, std::int64_t n, std::int64_t length) override {
    check(d);
    C base[kBlock];
    for (std::int64_t at = 0; at < n; at += kBlock) {
      const std::int64_t m = std::min(kBlock, n - at);
      const C* b = d.origin(at, m, base);
      for (std::size_t k = 0; k < models_; ++k) {
        auto& s = samples_[k];
        s.resize(s.size() + m);
        d.keys<C>(k, b, at, m, s.data() + s.size() - m);
        detail::canonical(s.data() + s.size() - m, m);
      }
    }
    spans_.insert(spans_.end(), n / length, length);
  }

  void feed(const Deltas& d, std::int64_t offset, std::int64_t n, int threads) override {
    check(d);
    if (offset < 0 || n < 0 || offset + n > n_)
      throw std::invalid_argument("selector: a piece lies outside the tensor");
    fed_ += n;
    const std::int64_t blocks = ceil_div(n, kBlock);
    const std::int64_t runs = std::min<std::int64_t>(std::max(threads, 1), std::max<std::int64_t>(1, n / kGrain));
    for (auto& t : targets_)
      if (t.runs.size() < static_cast<std::size_t>(runs)) t.runs.resize(runs);
    parallel_blocks(runs, threads, [&](std::int64_t r) {
      const std::int64_t begin = blocks * r / runs * kBlock, end = std::min(n, blocks * (r + 1) / runs * kBlock);
      // Positions are 32-bit within a segment.
      for (std::int64_t at = begin; at < end; at += std::int64_t{1} << 31)
        feed_run(d, offset, at, std::min(end, at + (std::int64_t{1} << 31)), static_cast<std::size_t>(r));
    });
  }

  // The same on the calling thread alone, while other threads feed other lanes.
  void feed_lane(const Deltas& d, std::int64_t offset, std::int64_t n, std::size_t lane) override {
    check(d);
    if (offset < 0 || n < 0 || offset + n > n_)
      throw std::invalid_argument("selector: a piece lies outside the tensor");
    for (const auto& t : targets_)
      if (lane >= t.runs.size()) throw std::invalid_argument("selector: there is no lane " + std::to_string(lane));
    fed_ += n;
    for (std::int64_t at = 0; at < n; at += std::int64_t{1} << 31)
      feed_run(d, offset, at, std::min(n, at + (std::int64_t{1} << 31)), lane);
  }

  // What has to be fed before the next call; nothing when all thresholds are known.
  std::vector<Span> advance(int threads) override {
    if (fed_ != expected_)
      throw std::invalid_argument("selector: " + std::to_string(fed_.load()) + " elements were fed, " +
                                  std::to_string(expected_) + " were asked for");
    parallel_blocks(static_cast<std::int64_t>(targets_.size()), threads, [&](std::int64_t t) { step(targets_[t]); });
    for (auto& t : targets_) {
      if (mask_ && t.marked) {
        auto& runs = t.runs;
        parallel_blocks(static_cast<std::int64_t>(runs.size()), threads,
                        [&](std::int64_t r) { mark_candidates(t, runs[r]); });
      }
      for (auto& run : t.runs) run.clear();
    }
    samples_.clear();
    samples_.resize(models_);
    bool whole = false;
    std::vector<Span> spans;
    for (const auto& t : targets_) {
      whole = whole || t.phase == Phase::bracket || t.phase == Phase::digits;
      if (t.phase == Phase::locate) spans.push_back(t.span);
    }
    if (whole) return expect({{0, n_}});
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.start < b.start; });
    std::vector<Span> merged;
    for (const auto& s : spans) {
      if (merged.empty() || s.start >= merged.back().stop) merged.push_back(s);
      else merged.back().stop = std::max(merged.back().stop, s.stop);
    }
    return expect(merged);
  }

  // Other counts k, one per target, when the first pass over everything has shown them; before the next advance. The
  // brackets stay: where a new k lies outside of its own, passes of histograms find the key.
  void aim(const std::vector<std::int64_t>& counts) override {
    if (counts.size() != targets_.size()) throw std::invalid_argument("selector: a count is needed for every target");
    for (std::size_t t = 0; t < counts.size(); ++t) {
      if (counts[t] < 1 || counts[t] > n_ || targets_[t].phase != Phase::bracket)
        throw std::invalid_argument("selector: it is too late, or too far, to aim at " + std::to_string(counts[t]));
      targets_[t].k = counts[t];
    }
  }

  std::vector<Rule> results() const override {
    std::vector<Rule> out;
    for (const auto& t : targets_) {
      if (t.phase != Phase::done) throw std::invalid_argument("selector: not finished");
      out.push_back(t.result);
    }
    return out;
  }

 private:
  void check(const Deltas& d) const {
    if (d.models.size() < models_) throw std::invalid_argument("selector: fewer models than at the start");
  }
  std::vector<Span> expect(std::vector<Span> spans) {
    fed_ = 0;
    expected_ = 0;
    for (const auto& s : spans) expected_ += s.stop - s.start;
    return spans;
  }
  std::int64_t limit() const {
    return std::max<std::int64_t>(1 << 17, std::min(n_ / 8, (std::int64_t{1} << 22) + n_ / 64));
  }

  void feed_run(const Deltas& d, std::int64_t offset, std::int64_t begin, std::int64_t end, std::size_t r) {
    alignas(64) C base[kBlock];
    alignas(64) K key[kBlock];
    std::vector<char> used(models_, 0);
    const std::int64_t base_bytes = d.has_base() ? size_of(d.base.type) : 0;
    bool canonical = false;
    for (auto& t : targets_) {
      if (t.phase == Phase::done) continue;
      used[t.model] = 1;
      // Below Inf a NaN's raw key is above the bracket like its canonical one.
      canonical = canonical || t.phase != Phase::bracket || t.bracket.hi >= KeyOf<C>::inf;
      Run& run = t.runs[r];
      if (t.phase == Phase::bracket) {
        run.segments.push_back({run.size, offset + begin});
        if (!run.overflow)
          run.reserve(run.size + static_cast<std::int64_t>(t.share * static_cast<double>(end - begin)) + kBlock);
        if (t.bracket.tied) run.ties.push_back({offset + begin, offset + begin, 0, 0});
      }
      if (t.phase == Phase::digits) run.histogram.resize(kHistogram);
    }
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t m = std::min(kBlock, end - at);
      const C* b = d.origin(at, m, base);
      for (std::size_t k = 0; k < models_; ++k) {
        if (!used[k]) continue;
        // A share of the base's next block, as the models' are fetched by their own scans.
        if (b && base_bytes > 0) {
          const char* next = reinterpret_cast<const char*>(d.base.address) + (at + kBlock) * base_bytes;
          const std::int64_t bytes = kBlock * base_bytes, share = static_cast<std::int64_t>(models_);
          for (std::int64_t c = bytes * static_cast<std::int64_t>(k) / share;
               c < bytes * static_cast<std::int64_t>(k + 1) / share; c += 64)
            __builtin_prefetch(next + c);
        }
        bool keyed = false;
        for (auto& t : targets_) {
          if (t.model != k || t.phase == Phase::done || scanned(t, d, b, at, m, t.runs[r], offset + at, at - begin))
            continue;
          if (!keyed) {
            d.keys<C>(k, b, at, m, key);
            if (canonical) detail::canonical(key, m);
            keyed = true;
          }
          tally(t, t.runs[r], key, m, offset + at, at - begin);
        }
      }
    }
    if (mask_) stream_fence();
  }

  // The tally of a bracket in one go from the inputs, where that is possible; otherwise false and nothing done.
  bool scanned(const Target& t, const Deltas& d, const C* b, std::int64_t at, std::int64_t m, Run& run,
               std::int64_t position, std::int64_t local) const {
#ifdef FASTMERGE_AVX512
    if constexpr (std::is_same_v<C, float>) {
      if (!direct(t)) return false;
      if (run.overflow) return true;  // digits will be counted instead, whatever is found here
      Counts found;
      run.reserve(run.size + m);
      std::uint8_t* mark = mask_ && t.marked ? mask_ + position : nullptr;
      const bool stream = n_ >= kStreamBytes && (reinterpret_cast<std::uintptr_t>(mark) & 63) == 0;
      dispatch(d.models[t.model].type, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (!std::is_same_v<T, double>) {
          const T* x = reinterpret_cast<const T*>(d.models[t.model].address) + at;
          run.size +=
              (b ? detail::scan<T, true>
                 : detail::scan<T, false>)(x, b, m, t.bracket, static_cast<std::uint32_t>(local),
                                           run.key.data() + run.size, run.where.data() + run.size, found, mark, stream);
        }
      });
      run.counts.above += found.above;
      if (t.bracket.lo == t.bracket.hi) found.equal_lo = 0;
      if (t.bracket.tied) count_ties(run, position, m, found);
      run.overflow = run.size > limit();
      return true;
    }
#endif
    (void)t, (void)d, (void)b, (void)at, (void)m, (void)run, (void)position, (void)local;
    return false;
  }
  // Whether zeros lie below the bracket and every NaN above it, so that neither needs care.
  bool direct(const Target& t) const {
#ifdef FASTMERGE_AVX512
    return std::is_same_v<C, float> && has_avx512() && t.phase == Phase::bracket && t.bracket.lo > 0 &&
           t.bracket.hi < KeyOf<C>::inf;
#else
    (void)t;
    return false;
#endif
  }
  static void count_ties(Run& run, std::int64_t position, std::int64_t m, const Counts& found) {
    Ties* ties = &run.ties.back();
    if (ties->stop - ties->start >= kGrain) {
      run.ties.push_back({position, position, 0, 0});
      ties = &run.ties.back();
    }
    ties->stop = position + m;
    ties->hi += found.equal_hi;
    ties->lo += found.equal_lo;
  }

  void tally(Target& t, Run& run, const K* key, std::int64_t m, std::int64_t position, std::int64_t local) {
    const Bracket<K>& b = t.bracket;
    switch (t.phase) {
      case Phase::bracket:
        if (b.tied)
          count_ties(run, position, m,
                     {0, detail::count_equal(key, m, b.hi), b.lo != b.hi ? detail::count_equal(key, m, b.lo) : 0});
        if (b.count && !run.overflow) {
          run.reserve(run.size + m);
          run.size += collect(key, m, b.first, b.count, static_cast<std::uint32_t>(local), run.key.data() + run.size,
                              run.where.data() + run.size, b.hi, run.counts.above);
          run.overflow = run.size > limit();
        } else {
          run.counts.above += detail::count_above(key, m, b.hi);
        }
        break;
      case Phase::digits: {
        const int shift = 16 * (t.digit - 1);
        const K mask = t.digit == kDigits ? 0 : static_cast<K>(static_cast<K>(-1) << (shift + 15) << 1);
        for (std::int64_t i = 0; i < m; ++i)
          if ((key[i] & mask) == t.prefix) ++run.histogram[(key[i] >> shift) & 0xffff];
        break;
      }
      case Phase::locate:
        for (std::int64_t i = std::max<std::int64_t>(0, t.span.start - position);
             i < std::min(m, t.span.stop - position); ++i)
          if (key[i] == t.key) run.found.push_back(position + i);
        break;
      default: break;
    }
  }

  void step(Target& t) {
    switch (t.phase) {
      case Phase::start: start(t); break;
      case Phase::bracket: resolve(t); break;
      case Phase::digits: next_digit(t); break;
      case Phase::locate: {
        std::vector<std::int64_t> found;
        for (auto& run : t.runs) found.insert(found.end(), run.found.begin(), run.found.end());
        settle(t, found);
        break;
      }
      case Phase::done: break;
    }
  }

  // What a run collected and the rule keeps, into the mask.
  void mark_candidates(const Target& t, const Run& run) const {
    const K key = static_cast<K>(t.result.key);
    for (std::size_t g = 0; g < run.segments.size(); ++g) {
      const Segment& segment = run.segments[g];
      const std::int64_t stop = g + 1 < run.segments.size() ? run.segments[g + 1].first : run.size;
      std::uint8_t* to = mask_ + segment.offset;
      const std::int64_t last = t.result.index - segment.offset;
      for (std::int64_t i = segment.first; i < stop; ++i)
        if (run.key[i] > key || (run.key[i] == key && run.where[i] <= last)) to[run.where[i]] = 1;
    }
  }

  void start(Target& t) {
    const std::vector<K>& all = samples_[t.model];
    const auto s = static_cast<std::int64_t>(all.size());
    if (n_ <= 1 << 15) return set_bracket(t, 0, kTop, false);
    if (s < 64) return start_digits(t);
    std::vector<K> sample(all);
    sort_keys(sample);  // ascending
    const double p = static_cast<double>(t.k) / static_cast<double>(n_);
    const auto r = std::min(s - 1, static_cast<std::int64_t>(p * static_cast<double>(s)));
    // Neighbours are alike in real tensors: the spread between spans, not a binomial, says how far off the rank can be.
    const K pivot = sample[s - 1 - r];
    std::int64_t at = 0, total = 0;
    std::vector<std::int64_t> above;
    for (const auto length : spans_) {
      above.push_back(detail::count_above(all.data() + at, length, pivot));
      total += above.back();
      at += length;
    }
    double variance = 0;
    for (std::size_t j = 0; j < spans_.size(); ++j) {
      const double expected = static_cast<double>(total) * static_cast<double>(spans_[j]) / static_cast<double>(s);
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
    set_bracket(t, lo, hi, tied);
    t.share = 1.1 * static_cast<double>(tied ? inside - ends : inside) / static_cast<double>(s);
  }

  void set_bracket(Target& t, K lo, K hi, bool tied) {
    t.bracket = {lo, hi, lo, static_cast<K>(hi - lo + 1), tied};
    if (tied) {
      t.bracket.first = lo + 1;
      t.bracket.count = hi > lo ? hi - lo - 1 : 0;
    }
    t.phase = Phase::bracket;
    t.marked = mask_ && !tied && direct(t);
  }
  void start_digits(Target& t) {
    t.marked = false;
    t.phase = Phase::digits;
    t.digit = kDigits;
    t.prefix = 0;
    t.remaining = t.k;
  }

  void resolve(Target& t) {
    Counts total;
    std::int64_t inside = 0;
    bool overflow = false;
    for (const auto& run : t.runs) {
      total.above += run.counts.above;
      for (const auto& ties : run.ties) {
        total.equal_hi += ties.hi;
        total.equal_lo += ties.lo;
      }
      inside += run.size;
      overflow = overflow || run.overflow;
    }
    std::int64_t rank = t.k - total.above;  // 1 = the largest that is not above
    if (rank < 1 || overflow) return start_digits(t);
    if (t.bracket.tied) {
      if (rank <= total.equal_hi) return find_piece(t, t.bracket.hi, rank, true);
      rank -= total.equal_hi;
      if (rank > inside) {
        rank -= inside;
        if (rank <= total.equal_lo) return find_piece(t, t.bracket.lo, rank, false);
      }
    }
    if (rank > inside) return start_digits(t);
    std::vector<KeyPiece<K>> pieces;
    for (const auto& run : t.runs) pieces.push_back({run.key.data(), run.size});
    t.key = select_largest(pieces, rank - 1);
    t.need = rank;
    find_candidate(t);
  }

  // The need-th candidate equal to key in order of position; need still counts the candidates above key. Stretches of
  // one segment are in order and apart from all others, so counting them finds the one stretch to look into.
  void find_candidate(Target& t) {
    struct Stretch {
      std::int64_t position, ties, n;
      const Segment* segment;
      const Run* run;
      std::int64_t first;
    };
    std::vector<Stretch> stretches;
    for (const auto& run : t.runs) {
      t.need -= sum_above(run, t.key);
      for (std::size_t g = 0; g < run.segments.size(); ++g) {
        const Segment& segment = run.segments[g];
        const std::int64_t stop = g + 1 < run.segments.size() ? run.segments[g + 1].first : run.size;
        for (std::int64_t i = segment.first; i < stop; i += kBlock) {
          const std::int64_t m = std::min(kBlock, stop - i), ties = detail::count_equal(run.key.data() + i, m, t.key);
          if (ties) stretches.push_back({segment.offset + run.where[i], ties, m, &segment, &run, i});
        }
      }
    }
    std::sort(stretches.begin(), stretches.end(),
              [](const Stretch& a, const Stretch& b) { return a.position < b.position; });
    for (const auto& s : stretches) {
      if (t.need > s.ties) {
        t.need -= s.ties;
        continue;
      }
      std::vector<std::int64_t> found;
      for (std::int64_t i = s.first; i < s.first + s.n; ++i)
        if (s.run->key[i] == t.key) found.push_back(s.segment->offset + s.run->where[i]);
      return settle(t, found);
    }
    throw std::logic_error("selector: a tie was lost");
  }
  static std::int64_t sum_above(const Run& run, K key) {
    std::int64_t above = 0;
    for (std::int64_t at = 0; at < run.size; at += kBlock)
      above += detail::count_above(run.key.data() + at, std::min(kBlock, run.size - at), key);
    return above;
  }

  // The piece that holds the need-th element equal to key, by the counts of pieces in order of position.
  void find_piece(Target& t, K key, std::int64_t need, bool hi) {
    std::vector<Ties> pieces;
    for (const auto& run : t.runs) pieces.insert(pieces.end(), run.ties.begin(), run.ties.end());
    std::sort(pieces.begin(), pieces.end(), [](const Ties& a, const Ties& b) { return a.start < b.start; });
    t.key = key;
    t.phase = Phase::locate;
    for (const auto& piece : pieces) {
      const std::int64_t here = hi ? piece.hi : piece.lo;
      t.need = need;
      t.span = {piece.start, piece.stop};
      if (need <= here) return;
      need -= here;
    }
    throw std::logic_error("selector: ties do not add up");
  }

  void settle(Target& t, std::vector<std::int64_t>& found) {
    if (t.need < 1 || t.need > static_cast<std::int64_t>(found.size()))
      throw std::logic_error("selector: a tie was lost");
    std::nth_element(found.begin(), found.begin() + (t.need - 1), found.end());
    t.result = {static_cast<std::uint64_t>(t.key), found[t.need - 1]};
    t.phase = Phase::done;
  }

  void next_digit(Target& t) {
    std::vector<std::int64_t> total(kHistogram, 0);
    for (const auto& run : t.runs)
      for (std::size_t v = 0; v < run.histogram.size(); ++v) total[v] += run.histogram[v];
    std::int64_t v = kHistogram - 1;
    while (v > 0 && t.remaining > total[v]) t.remaining -= total[v--];
    if (t.remaining > total[v]) throw std::logic_error("selector: digits do not add up");
    --t.digit;
    t.prefix |= static_cast<K>(v) << (16 * t.digit);
    if (t.digit == 0) set_bracket(t, t.prefix, t.prefix, true);
  }

  std::int64_t n_, expected_ = 0;
  std::atomic<std::int64_t> fed_{0};
  std::size_t models_ = 0;
  std::vector<std::vector<K>> samples_;
  std::vector<std::int64_t> spans_;
  std::vector<Target> targets_;
  std::uint8_t* mask_ = nullptr;
};

}  // namespace fastmerge
