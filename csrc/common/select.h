// The r-th largest of an array of keys in memory: what is left of a selection once a bracket has been collected.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "tally.h"

namespace fastmerge {

// A bracket [lo, hi] for the rank `r` (0 = largest) of a sample, `reach` ranks to either side; reorders the sample.
template <class K>
void bracket_ranks(K* sample, std::int64_t s, std::int64_t r, std::int64_t reach, K top, K* lo, K* hi) {
  const std::int64_t up = r - reach, down = r + reach;
  *hi = top;
  *lo = 0;
  std::int64_t from = 0;
  if (up >= 0 && up < s) {
    std::nth_element(sample, sample + up, sample + s, std::greater<K>());
    *hi = sample[up];
    from = up;
  }
  if (down < s) {
    std::nth_element(sample + from, sample + down, sample + s, std::greater<K>());
    *lo = sample[down];
  }
}

// The r-th largest (0 = largest) of a[0, n), r < n; reorders and shrinks a. Expected time one pass over a (Floyd, Rivest 1975).
template <class K>
K select_largest(std::vector<K>& a, std::int64_t n, std::int64_t r) {
  std::vector<K> sample;
  std::vector<std::uint32_t> where;
  while (n > 8192) {
    const std::int64_t step = std::max<std::int64_t>(8, static_cast<std::int64_t>(std::cbrt(static_cast<double>(n))));
    sample.clear();
    for (std::int64_t i = 0; i < n; i += step) sample.push_back(a[i]);
    const auto s = static_cast<std::int64_t>(sample.size());
    const double p = static_cast<double>(r) / static_cast<double>(n);
    const auto reach = static_cast<std::int64_t>(4.0 * std::sqrt(s * p * (1.0 - p))) + 4;
    K lo, hi;
    bracket_ranks(sample.data(), s, static_cast<std::int64_t>(p * s), reach, static_cast<K>(-1) >> 1, &lo, &hi);
    std::int64_t above = 0;
    for (std::int64_t at = 0; at < n; at += 1 << 20)
      above += detail::count_above(a.data() + at, std::min<std::int64_t>(1 << 20, n - at), hi);
    where.resize(n + kSlack);
    sample.resize(n + kSlack);
    const std::int64_t inside = collect(a.data(), n, lo, static_cast<K>(hi - lo + 1), 0, sample.data(), where.data());
    if (r < above || r >= above + inside || inside == n) break;
    if (lo == hi) return lo;
    a.swap(sample);
    n = inside;
    r -= above;
  }
  std::nth_element(a.begin(), a.begin() + r, a.begin() + n, std::greater<K>());
  return a[r];
}

}  // namespace fastmerge
