// The exact thresholds of arrays in memory: a sample from all over them, then the selector's passes.
#pragma once
#include "selector.h"

namespace fastmerge {

constexpr std::int64_t kSampleSpan = 4;  // elements: spans this short are nearly independent draws

inline Array gather_spans(const Array& a, const std::vector<std::int64_t>& starts, std::vector<char>& buffer) {
  const std::int64_t item = size_of(a.type), span = item * kSampleSpan;
  buffer.resize(starts.size() * span);
  const char* from = reinterpret_cast<const char*>(a.address);
  constexpr std::size_t kAhead = 32;  // every span is a cache miss of its own
  for (std::size_t j = 0; j < starts.size(); ++j) {
    if (j + kAhead < starts.size()) __builtin_prefetch(from + starts[j + kAhead] * item);
    std::memcpy(buffer.data() + j * span, from + starts[j] * item, span);
  }
  return {a.type, reinterpret_cast<std::uintptr_t>(buffer.data())};
}

// The sample of an array in memory: about n^(2/3) / 2 elements balance sampling against collecting.
template <class C>
void draw_sample(Selector<C>& selector, const Deltas& d, std::int64_t n, int threads) {
  const auto size = static_cast<std::int64_t>(std::max(4096.0, 0.5 * std::pow(static_cast<double>(n), 2.0 / 3.0)));
  const std::int64_t spans = size / kSampleSpan, stride = n / spans;
  std::vector<std::int64_t> starts;
  std::uint64_t state = 0x9e3779b97f4a7c15u;  // jitter: a fixed stride would look at the same columns of every row
  for (std::int64_t j = 0; j < spans; ++j) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    starts.push_back(j * stride +
                     static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(stride - kSampleSpan + 1)));
  }
  std::vector<std::vector<char>> buffers(d.models.size() + 1);
  Deltas small{{d.base.type, 0}, std::vector<Array>(d.models.size())};
  parallel_blocks(static_cast<std::int64_t>(buffers.size()), threads, [&](std::int64_t i) {
    if (i > 0) small.models[i - 1] = gather_spans(d.models[i - 1], starts, buffers[i]);
    else if (d.has_base()) small.base = gather_spans(d.base, starts, buffers[0]);
  });
  selector.sample_spans(small, spans * kSampleSpan, kSampleSpan);
}

// One rule per target. With `mask` (one target only) the mask of what is kept may be written on the way: *marked says
// so.
template <class C>
std::vector<Rule> select_rules(const Deltas& d, std::int64_t n,
                               const std::vector<std::pair<std::size_t, std::int64_t>>& targets, int threads,
                               std::uint8_t* mask = nullptr, bool* marked = nullptr) {
  Selector<C> selector(n, targets);
  selector.mark(mask);
  if (n > 1 << 15) draw_sample(selector, d, n, threads);
  for (;;) {
    const auto spans = selector.advance(threads);
    if (spans.empty()) break;
    for (const auto& s : spans) {
      Deltas piece = d;
      if (d.has_base()) piece.base.address += s.start * size_of(d.base.type);
      for (auto& m : piece.models) m.address += s.start * size_of(m.type);
      selector.feed(piece, s.start, s.stop - s.start, threads);
    }
  }
  if (marked) *marked = selector.marked();
  return selector.results();
}

}  // namespace fastmerge
