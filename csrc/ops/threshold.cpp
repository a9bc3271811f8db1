// Exact top-k thresholds of K deltas: in memory in one call, or streamed (ThresholdSelector). See common/selector.h.
#include <memory>

#include "common/export.h"
#include "common/selector.h"

namespace fastmerge {
namespace {

using Targets = std::vector<std::pair<std::size_t, std::int64_t>>;
using Rules = std::vector<std::pair<std::uint64_t, std::int64_t>>;

std::unique_ptr<SelectorBase> make_selector(std::int64_t n, const Targets& targets, bool f64) {
  if (f64) return std::make_unique<Selector<double>>(n, targets);
  return std::make_unique<Selector<float>>(n, targets);
}

Rules pairs(const std::vector<Rule>& rules) {
  Rules out;
  for (const auto& r : rules) out.emplace_back(r.key, r.index);
  return out;
}

class ThresholdSelector {
 public:
  ThresholdSelector(std::int64_t n, const Targets& targets, bool f64) : selector_(make_selector(n, targets, f64)) {}
  void sample(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models, const std::vector<int>& types,
              std::int64_t n) {
    selector_->sample(make_deltas(base, base_type, models, types), n);
  }
  void feed(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models, const std::vector<int>& types,
            std::int64_t offset, std::int64_t n, int threads) {
    selector_->feed(make_deltas(base, base_type, models, types), offset, n, threads);
  }
  std::vector<std::pair<std::int64_t, std::int64_t>> advance(int threads) {
    std::vector<std::pair<std::int64_t, std::int64_t>> out;
    for (const auto& s : selector_->advance(threads)) out.emplace_back(s.start, s.stop);
    return out;
  }
  Rules results() const { return pairs(selector_->results()); }

 private:
  std::unique_ptr<SelectorBase> selector_;
};

constexpr std::int64_t kSampleSpan = 4;  // elements: spans this short are nearly independent draws

Array gather(const Array& a, const std::vector<std::int64_t>& starts, std::vector<char>& buffer) {
  const std::int64_t item = size_of(a.type), span = item * kSampleSpan;
  buffer.resize(starts.size() * span);
  const char* from = reinterpret_cast<const char*>(a.address);
  for (std::size_t j = 0; j < starts.size(); ++j) std::memcpy(buffer.data() + j * span, from + starts[j] * item, span);
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
    starts.push_back(j * stride + static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(stride - kSampleSpan + 1)));
  }
  std::vector<std::vector<char>> buffers(d.models.size() + 1);
  Deltas small{{d.base.type, 0}, std::vector<Array>(d.models.size())};
  parallel_blocks(static_cast<std::int64_t>(buffers.size()), threads, [&](std::int64_t i) {
    if (i > 0) small.models[i - 1] = gather(d.models[i - 1], starts, buffers[i]);
    else if (d.has_base()) small.base = gather(d.base, starts, buffers[0]);
  });
  selector.sample_spans(small, spans * kSampleSpan, kSampleSpan);
}

template <class C>
Rules solve(const Deltas& d, std::int64_t n, const Targets& targets, int threads) {
  Selector<C> selector(n, targets);
  if (n > 1 << 15) draw_sample(selector, d, n, threads);
  for (;;) {
    const auto spans = selector.advance(threads);
    if (spans.empty()) return pairs(selector.results());
    for (const auto& s : spans) {
      Deltas piece = d;
      if (d.has_base()) piece.base.address += s.start * size_of(d.base.type);
      for (auto& m : piece.models) m.address += s.start * size_of(m.type);
      selector.feed(piece, s.start, s.stop - s.start, threads);
    }
  }
}

Rules topk_thresholds(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                      const std::vector<int>& types, std::int64_t n, const Targets& targets, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  return d.f64() ? solve<double>(d, n, targets, threads) : solve<float>(d, n, targets, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("topk_thresholds", &topk_thresholds, NoGil());
  py::class_<ThresholdSelector>(m, "ThresholdSelector")
      .def(py::init<std::int64_t, const Targets&, bool>())
      .def("sample", &ThresholdSelector::sample, NoGil())
      .def("feed", &ThresholdSelector::feed, NoGil())
      .def("advance", &ThresholdSelector::advance, NoGil())
      .def("results", &ThresholdSelector::results);
}
}  // namespace fastmerge
