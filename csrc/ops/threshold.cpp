// Exact top-k thresholds of K deltas: in memory in one call, or streamed (ThresholdSelector). See common/selector.h.
#include <memory>

#include "common/export.h"
#include "common/sample.h"

namespace fastmerge {
namespace {

using Targets = std::vector<std::pair<std::size_t, std::int64_t>>;
using Rules = std::vector<std::pair<std::uint64_t, std::int64_t>>;

std::unique_ptr<SelectorBase> make_selector(std::int64_t n, const Targets& targets, bool f64, std::size_t lanes) {
  if (f64) return std::make_unique<Selector<double>>(n, targets, lanes);
  return std::make_unique<Selector<float>>(n, targets, lanes);
}

Rules pairs(const std::vector<Rule>& rules) {
  Rules out;
  for (const auto& r : rules) out.emplace_back(r.key, r.index);
  return out;
}

class ThresholdSelector {
 public:
  ThresholdSelector(std::int64_t n, const Targets& targets, bool f64, std::size_t lanes)
      : selector_(make_selector(n, targets, f64, lanes)) {}
  void sample(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
              const std::vector<int>& types, std::int64_t n, std::int64_t length) {
    if (length < 1 || n % length) throw std::invalid_argument("selector: a sample of no whole spans");
    selector_->sample_spans(make_deltas(base, base_type, models, types), n, length);
  }
  void feed(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
            const std::vector<int>& types, std::int64_t offset, std::int64_t n, int threads) {
    selector_->feed(make_deltas(base, base_type, models, types), offset, n, threads);
  }
  void feed_lane(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                 const std::vector<int>& types, std::int64_t offset, std::int64_t n, std::size_t lane) {
    selector_->feed_lane(make_deltas(base, base_type, models, types), offset, n, lane);
  }
  std::vector<std::pair<std::int64_t, std::int64_t>> advance(int threads) {
    std::vector<std::pair<std::int64_t, std::int64_t>> out;
    for (const auto& s : selector_->advance(threads)) out.emplace_back(s.start, s.stop);
    return out;
  }
  void aim(const std::vector<std::int64_t>& counts) { selector_->aim(counts); }
  Rules results() const { return pairs(selector_->results()); }

 private:
  std::unique_ptr<SelectorBase> selector_;
};

Rules topk_thresholds(std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
                      const std::vector<int>& types, std::int64_t n, const Targets& targets, int threads) {
  const Deltas d = make_deltas(base, base_type, models, types);
  return pairs(d.f64() ? select_rules<double>(d, n, targets, threads) : select_rules<float>(d, n, targets, threads));
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("topk_thresholds", &topk_thresholds, NoGil());
  py::class_<ThresholdSelector>(m, "ThresholdSelector")
      .def(py::init<std::int64_t, const Targets&, bool, std::size_t>())
      .def("sample", &ThresholdSelector::sample, NoGil())
      .def("feed", &ThresholdSelector::feed, NoGil())
      .def("feed_lane", &ThresholdSelector::feed_lane, NoGil())
      .def("advance", &ThresholdSelector::advance, NoGil())
      .def("aim", &ThresholdSelector::aim, NoGil())
      .def("results", &ThresholdSelector::results);
}
}  // namespace fastmerge
