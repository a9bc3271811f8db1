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
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "parallel.h"
#include "stream.h"
#include "target.h"

namespace fastmerge {

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
  using Target = fastmerge::Target<C>;
  using Run = typename Target::Run;
  using Phase = typename Target::Phase;

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
  void mark(std::uint8_t* mask) {
    mask_ = mask;
    for (auto& t : targets_) t.marks = mask != nullptr;
  }
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
    parallel_blocks(static_cast<std::int64_t>(targets_.size()), threads, [&](std::int64_t t) {
      Target& target = targets_[t];
      target.step(n_, samples_[target.model], spans_);
    });
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
      if (t.phase == Phase::digits) run.histogram.resize(Target::kHistogram);
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
      if (!t.direct()) return false;
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
  static void count_ties(Run& run, std::int64_t position, std::int64_t m, const Counts& found) {
    typename Target::Ties* ties = &run.ties.back();
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
        const K mask = t.digit == Target::kDigits ? 0 : static_cast<K>(static_cast<K>(-1) << (shift + 15) << 1);
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

  // What a run collected and the rule keeps, into the mask.
  void mark_candidates(const Target& t, const Run& run) const {
    const K key = static_cast<K>(t.result.key);
    for (std::size_t g = 0; g < run.segments.size(); ++g) {
      const auto& segment = run.segments[g];
      const std::int64_t stop = g + 1 < run.segments.size() ? run.segments[g + 1].first : run.size;
      std::uint8_t* to = mask_ + segment.offset;
      const std::int64_t last = t.result.index - segment.offset;
      for (std::int64_t i = segment.first; i < stop; ++i)
        if (run.key[i] > key || (run.key[i] == key && run.where[i] <= last)) to[run.where[i]] = 1;
    }
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
