// Where the elements of a permuted tensor come from: a collapsed view [d0, d1, ..., W] whose leading dimensions form
// rows, each with a source row, and whose last dimension is contiguous or permuted too; and the walk over such a tensor
// that hands out its elements in order, gathered in L1.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "dtype.h"
#include "parallel.h"
#include "stream.h"
#include "tiles.h"

namespace fastmerge {

using Axes = std::vector<std::pair<std::int64_t, std::uintptr_t>>;  // (size, index address or 0), outermost first

constexpr std::int64_t kShortRun = 256;     // bytes: shorter contiguous runs are gathered element by element
constexpr std::int64_t kStep = 1024;        // elements handed out at a time at most: what is made of them fits L1 too
constexpr std::int64_t kTileColumns = 256;  // of a step over several rows
constexpr std::int64_t kScratchBytes = 1 << 20;  // of rows spread out for tiles; wider rows are gathered one by one

struct Gather {
  std::vector<std::int64_t> sizes;         // leading dimensions
  std::vector<const std::int64_t*> index;  // of each, or nullptr
  std::vector<std::int64_t> strides;       // in elements
  std::int64_t width = 1;                  // W
  std::vector<std::int32_t> columns;       // source column of each column; empty: in order

  // `axes` is what fastmerge/ops/_permutations.py:collapse makes.
  Gather(const Axes& axes, std::int64_t element) {
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
    if (!sizes.empty() && index.back() && width * element < kShortRun &&
        sizes.back() * width < (std::int64_t{1} << 31)) {
      const std::int64_t n = sizes.back(), run = width;
      const std::int64_t* from = index.back();
      columns.resize(n * run);
      for (std::int64_t b = 0; b < n; ++b)
        for (std::int64_t i = 0; i < run; ++i) columns[b * run + i] = static_cast<std::int32_t>(from[b] * run + i);
      width = n * run;
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

template <class Word>
inline void gather_words(const void* row, const std::int32_t* columns, std::int64_t n, void* to) {
  const auto* __restrict from = static_cast<const Word*>(row);
  auto* __restrict out = static_cast<Word*>(to);
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < n; ++i) out[i] = from[columns[i]];
}
// to[i] = row[columns[i]] for elements of 2, 4 or 8 bytes.
inline void gather_columns(std::int64_t size, const void* row, const std::int32_t* columns, std::int64_t n, void* to) {
  switch (size) {
    case 2: return gather_words<std::uint16_t>(row, columns, n, to);
    case 4: return gather_words<std::uint32_t>(row, columns, n, to);
    default: return gather_words<std::uint64_t>(row, columns, n, to);
  }
}

// Elements [begin, end) of the result in steps that stay within a row: f(at, where they are, how many, a position whose
// turn comes soon, to prefetch what f itself reads there). While one step is worked on, the source of a later one is
// fetched: in a row that is read in order the next step, in a permuted one the same columns of the next row, because
// there the lines of a row are touched in random order and no hardware prefetcher sees a stream.
template <class F>
void walk_rows(const Gather& from, std::uintptr_t in, std::int64_t element, std::int64_t begin, std::int64_t end,
               const F& f) {
  alignas(64) unsigned char buffer[kStep * sizeof(double)];
  const bool permuted = !from.columns.empty();
  std::int64_t row = begin / from.width, c = begin % from.width;
  std::uintptr_t source = in + from.source(row) * element;
  std::uintptr_t next = (row + 1) * from.width < end ? in + from.source(row + 1) * element : 0;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t m = std::min({kStep, end - at, from.width - c});
    const bool ends = c + m == from.width;
    const std::uintptr_t ahead = permuted ? (next ? next + c * element : 0) : ends ? next : source + (c + m) * element;
    if (ahead) prefetch_range(reinterpret_cast<const void*>(ahead), m * element);
    const void* here = reinterpret_cast<const void*>(source + c * element);
    if (permuted) {
      gather_columns(element, reinterpret_cast<const void*>(source), from.columns.data() + c, m, buffer);
      here = buffer;
    }
    f(at, here, m, at + m);
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

#ifdef FASTMERGE_TILES
// Rows [first, last) of a result with permuted columns, kTileRows at a time; the rows that are left go one by one.
template <class Word, class F>
void walk_tiles(const Gather& from, std::uintptr_t in, std::int64_t first, std::int64_t last, const F& f) {
  constexpr std::int64_t R = kTileRows<Word>, E = sizeof(Word);
  const std::int64_t width = from.width;
  alignas(64) Word buffer[R * kTileColumns];
  const std::unique_ptr<Word[]> scratch(new Word[R * width]);
  const Word* row[R];
  const Word* next[R];
  const auto find = [&](std::int64_t r, const Word** to) {
    for (std::int64_t i = 0; i < R; ++i) to[i] = reinterpret_cast<const Word*>(in + from.source(r + i) * E);
  };
  std::int64_t r = first;
  if (r + R <= last) find(r, next);
  for (; r + R <= last; r += R) {
    std::copy(next, next + R, row);
    spread_rows(row, width, scratch.get());
    const bool more = r + 2 * R <= last;
    if (more) find(r + R, next);
    for (std::int64_t c = 0; c < width; c += kTileColumns) {
      const std::int64_t m = std::min(kTileColumns, width - c);
      if (more)
        for (std::int64_t i = 0; i < R; ++i) prefetch_range(next[i] + c, m * E);
      collect_columns(scratch.get(), from.columns.data() + c, m, buffer, kTileColumns);
      const std::int64_t ahead = c + m < width ? m : R * width - c;
      for (std::int64_t i = 0; i < R; ++i) {
        const std::int64_t at = (r + i) * width + c;
        f(at, buffer + i * kTileColumns, m, at + ahead);
      }
    }
  }
  if (r < last) walk_rows(from, in, E, r * width, last * width, f);
}
#endif

// The whole result of n elements, in parallel: f(at, where elements [at, at + m) are, m, what comes soon), m <= kStep.
template <class F>
void gather_all(const Gather& from, std::uintptr_t in, std::int64_t element, std::int64_t n, int threads, const F& f) {
#ifdef FASTMERGE_TILES
  const std::int64_t rows = from.columns.empty() ? 0 : n / from.width, per_tile = 32 / element;
  if (rows >= 2 * per_tile && element <= 4 && from.width >= per_tile && from.width * 32 <= kScratchBytes &&
      has_avx2()) {
    const std::int64_t tiles = ceil_div(rows, per_tile);
    const std::int64_t pieces = std::min(std::max<std::int64_t>(1, n / kGrain), std::min<std::int64_t>(threads, tiles));
    parallel_blocks(pieces, threads, [&](std::int64_t p) {
      const std::int64_t first = tiles * p / pieces * per_tile,
                         last = std::min(rows, tiles * (p + 1) / pieces * per_tile);
      element == 2 ? walk_tiles<std::uint16_t>(from, in, first, last, f)
                   : walk_tiles<std::uint32_t>(from, in, first, last, f);
      stream_fence();
    });
    return;
  }
#endif
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    walk_rows(from, in, element, begin, end, f);
    stream_fence();
  });
}

}  // namespace fastmerge
