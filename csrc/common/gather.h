// Where the elements of a permuted tensor come from: a collapsed view [d0, d1, ..., W] whose leading dimensions form
// rows, each with a source row, and whose last dimension is contiguous or permuted too.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dtype.h"

namespace fastmerge {

constexpr std::int64_t kShortRun = 256;  // bytes: shorter contiguous runs are gathered element by element

struct Gather {
  std::vector<std::int64_t> sizes;                // leading dimensions
  std::vector<const std::int64_t*> index;         // of each, or nullptr
  std::vector<std::int64_t> strides;              // in elements
  std::int64_t width = 1;                         // W
  std::vector<std::int32_t> columns;              // source column of each column; empty: in order
  std::vector<std::uint16_t> narrow;              // the same where it fits: half the table beside the row in L1

  // `axes` is [(size, index address or 0)], as fastmerge/ops/_permutations.py:collapse makes it.
  Gather(const std::vector<std::pair<std::int64_t, std::uintptr_t>>& axes, std::int64_t element) {
    sizes.reserve(axes.size());
    for (const auto& [n, address] : axes) {
      sizes.push_back(n);
      index.push_back(reinterpret_cast<const std::int64_t*>(address));
    }
    if (!sizes.empty() && !index.back()) {  // a contiguous run
      width = sizes.back();
      sizes.pop_back();
      index.pop_back();
    }
    // Short runs of a permuted axis become permuted columns, while their table stays small beside the tensor.
    if (!sizes.empty() && index.back() && width * element < kShortRun && sizes.back() * width < (std::int64_t{1} << 31)) {
      const std::int64_t n = sizes.back(), run = width;
      const std::int64_t* from = index.back();
      columns.resize(n * run);
      for (std::int64_t b = 0; b < n; ++b)
        for (std::int64_t i = 0; i < run; ++i) columns[b * run + i] = static_cast<std::int32_t>(from[b] * run + i);
      width = n * run;
      if (width <= 65536) narrow.assign(columns.begin(), columns.end());
      sizes.pop_back();
      index.pop_back();
    }
    strides.assign(sizes.size(), 0);
    std::int64_t stride = width;
    for (std::size_t d = sizes.size(); d-- > 0;) {
      strides[d] = stride;
      stride *= sizes[d];
    }
  }

  // The first element of the row that row `r` is made of.
  std::int64_t source(std::int64_t r) const {
    std::int64_t at = 0;
    for (std::size_t d = sizes.size(); d-- > 0;) {
      const std::int64_t i = r % sizes[d];
      r /= sizes[d];
      at += (index[d] ? index[d][i] : i) * strides[d];
    }
    return at;
  }
};

// Fetches a range that is read soon, into L2: L1 is full of what is worked on now.
inline void prefetch_range(const void* from, std::int64_t bytes) {
  for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b, 0, 2);
}

// to[i] = row[columns[i]] for elements of 2, 4 or 8 bytes.
template <class Word, class Index>
inline void gather_words(const Word* __restrict row, const Index* __restrict columns, std::int64_t n, Word* __restrict to) {
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < n; ++i) to[i] = row[columns[i]];
}
template <class Index>
inline void gather_elements(std::int64_t size, const void* row, const Index* columns, std::int64_t n, void* to) {
  switch (size) {
    case 2: return gather_words(static_cast<const std::uint16_t*>(row), columns, n, static_cast<std::uint16_t*>(to));
    case 4: return gather_words(static_cast<const std::uint32_t*>(row), columns, n, static_cast<std::uint32_t*>(to));
    default: return gather_words(static_cast<const std::uint64_t*>(row), columns, n, static_cast<std::uint64_t*>(to));
  }
}
// Columns [c, c + n) of a permuted row.
inline void gather_columns(const Gather& from, std::int64_t size, const void* row, std::int64_t c, std::int64_t n, void* to) {
  from.narrow.empty() ? gather_elements(size, row, from.columns.data() + c, n, to)
                      : gather_elements(size, row, from.narrow.data() + c, n, to);
}

// Walks elements [begin, end) of the result in steps of at most `step` that stay within a row:
// f(at, source row address, first column, count). While one step is worked on, the source of a later one is fetched:
// in a row that is read in order the next step, in a permuted one the same columns of the next row, because there the
// lines of a row are touched in random order and no hardware prefetcher sees a stream.
template <class F>
void walk(const Gather& from, std::uintptr_t in, std::int64_t element, std::int64_t begin, std::int64_t end,
          std::int64_t step, const F& f) {
  const bool permuted = !from.columns.empty();
  std::int64_t row = begin / from.width, c = begin % from.width;
  std::uintptr_t source = in + from.source(row) * element;
  std::uintptr_t next = (row + 1) * from.width < end ? in + from.source(row + 1) * element : 0;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t m = std::min({step, end - at, from.width - c});
    const bool ends = c + m == from.width;
    const std::uintptr_t ahead = permuted ? (next ? next + c * element : 0) : ends ? next : source + (c + m) * element;
    if (ahead) prefetch_range(reinterpret_cast<const void*>(ahead), m * element);
    f(at, source, c, m);
    at += m;
    c += m;
    if (ends && at < end) {
      c = 0;
      ++row;
      source = next;
      next = (row + 1) * from.width < end ? in + from.source(row + 1) * element : 0;
    }
  }
}

}  // namespace fastmerge
