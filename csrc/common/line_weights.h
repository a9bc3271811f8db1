// One number per row or per column of a matrix, spread over its elements tile by tile: kernels then have one plain loop
// with a number per element, however short the rows are.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastmerge {

enum class Lines : int { rows = 0, columns = 1 };

template <class C>
struct LineWeights {
  const C* weight;  // one per row of the whole tensor, or one per column
  std::int64_t row;
  Lines lines;

  // out[i] = weight of element position + i of the tensor.
  void spread(std::int64_t position, std::int64_t n, C* out) const {
    std::int64_t line = position / row;
    for (std::int64_t i = 0, stop; i < n; i = stop, ++line) {
      stop = std::min(n, (line + 1) * row - position);
      if (lines == Lines::rows) std::fill(out + i, out + stop, weight[line]);
      else std::copy(weight + (position + i - line * row), weight + (position + stop - line * row), out + i);
    }
  }
};

}  // namespace fastmerge
