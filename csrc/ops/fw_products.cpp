// fw_products: <g, s_k>, |s_k|^2 and |g|^2 of K candidates over any number of tensors, each byte read once.
//
// Story: a linear minimisation oracle reads K models; nothing may be read twice. A tile of the gradient is widened once
// into L1, then every candidate's tile streams past it, widened in registers, its dot and its square in 64 lanes each:
// with AVX-512 eight candidates side by side, elsewhere one, while its next tile comes into L2. Blocks of 65536
// elements give one float32 sum per product; they are added to float64 totals in index order. A candidate may be a
// place in a file: a block of it is read into a buffer that stays in L2, so that memory sees each byte once, as a plain
// read of the file does, and the sums are those of the tensor in memory, bit for bit.
#include <array>
#include <atomic>

#include "common/block_sum.h"
#include "common/export.h"
#include "common/file_read.h"
#include "common/parallel.h"
#include "common/products_wide.h"

namespace fastmerge {
namespace {

struct Tensor {
  std::uintptr_t g;
  Dtype g_type;
  std::vector<std::uintptr_t> s;  // addresses; where there is a file, positions in it
  std::vector<Dtype> s_types;
  std::vector<int> files;  // descriptors, -1 = in memory; empty = all in memory
  std::int64_t n;

  int file(std::size_t k) const { return files.empty() ? -1 : files[k]; }
};

// What kept a candidate from being read: {error (an errno, -1 the file is too short, 0 nothing), tensor, candidate}.
using Failure = std::array<std::int64_t, 3>;

#ifdef FASTMERGE_AVX512
bool wide(std::int64_t n) { return n % kLanes == 0 && has_avx512(); }
#endif

// Elements [at, at + n) of a candidate against the tile g; n is a multiple of the lanes unless it ends the tensor.
template <class C, class T>
void fold(const C* g, const T* x, std::int64_t n, const void* ahead, C* dot, C* square) {
  square ? add_products(g, x, n, ahead, dot, square) : add_products(g, x, n, ahead, dot);
}
void fold_tile(Dtype t, std::uintptr_t s, std::int64_t at, std::int64_t n, const float* g, float* buffer, float* dot,
               float* square) {
  if (n % kLanes != 0)
    return fold(g, padded(load_block(t, s, at, n, buffer), n, buffer), ceil_to_lanes(n), buffer, dot, square);
  dispatch(t, [&](auto zero) {
    using T = decltype(zero);
    const T* x = pointer<const T>(s) + at;
    if constexpr (!std::is_same_v<T, double>) fold(g, x, n, x + n, dot, square);
  });
}
void fold_tile(Dtype t, std::uintptr_t s, std::int64_t at, std::int64_t n, const double* g, double* buffer, double* dot,
               double* square) {
  const double* x = padded(load_block(t, s, at, n, buffer), n, buffer);
  fold(g, x, ceil_to_lanes(n), x, dot, square);
}

// How many candidates from k on go together: of one dtype, all with squares or all without; one where it is in a file.
std::size_t together(const Tensor& t, std::size_t k, const std::vector<int>& norms) {
  const std::size_t most = std::min(t.s.size(), k + (norms[k] ? kTogetherSquares : kTogether));
  std::size_t end = k + 1;
  while (end < most && t.s_types[end] == t.s_types[k] && t.file(k) < 0 && t.file(end) < 0 &&
         (norms[end] != 0) == (norms[k] != 0))
    ++end;
  return end - k;
}

// Work memory of a thread.
template <class C>
struct Scratch {
  std::vector<C> lanes;     // [K][2][64]
  std::vector<C> wide;      // a gradient's block in the compute type
  std::vector<C> contents;  // a block of a file; no dtype is wider than the compute type
};

// One block of one tensor: out = [K dots, K squares, |g|^2]; returns {error, candidate}.
template <class C>
std::pair<int, std::size_t> block(const Tensor& t, std::int64_t begin, std::int64_t end, const std::vector<int>& norms,
                                  double* out) {
  static thread_local Scratch<C> scratch;
  const std::size_t count = t.s.size();
  const bool files = std::any_of(t.files.begin(), t.files.end(), [](int file) { return file >= 0; });
  alignas(64) C x_tile[kBlock], g_lanes[kLanes] = {};
  std::array<const C*, kSumBlock / kBlock> g_tiles;
  scratch.lanes.assign(2 * count * kLanes, C(0));
  scratch.wide.resize(files ? kSumBlock : kBlock);
  // A tile of `n` candidates from k on, which go together.
  const auto fold_into = [&](std::size_t k, std::size_t n, const std::uintptr_t* s, std::int64_t at, const C* g) {
    const std::int64_t m = std::min(kBlock, end - at);
    C* dot = scratch.lanes.data() + 2 * k * kLanes;
#ifdef FASTMERGE_AVX512
    if constexpr (std::is_same_v<C, float>)
      if (wide(m)) return add_products_wide(g, t.s_types[k], s, n, norms[k] != 0, at, m, dot);
#endif
    for (std::size_t i = 0; i < n; ++i, dot += 2 * kLanes)
      fold_tile(t.s_types[k], s[i], at, m, g, x_tile, dot, norms[k] ? dot + kLanes : nullptr);
  };
  const auto load_gradient = [&](std::int64_t at, std::int64_t m, C* tile) {
#ifdef FASTMERGE_AVX512
    if constexpr (std::is_same_v<C, float>)
      if (wide(m)) return load_wide(t.g_type, t.g, at, m, tile);
#endif
    return padded(load_block(t.g_type, t.g, at, m, tile), m, tile);
  };
  for (std::int64_t at = begin; at < end; at += kBlock) {
    C* tile = scratch.wide.data() + (files ? at - begin : 0);
    const std::int64_t m = std::min(kBlock, end - at);
    const C* g = load_gradient(at, m, tile);
    g_tiles[(at - begin) / kBlock] = g;
    add_products(g, g, ceil_to_lanes(m), pointer<const char>(t.g) + (at + kBlock) * size_of(t.g_type), g_lanes);
    for (std::size_t k = 0, n; k < count; k += n) {
      n = together(t, k, norms);
      if (t.file(k) < 0) fold_into(k, n, &t.s[k], at, g);
    }
  }
  for (std::size_t k = 0; files && k < count; ++k) {
    if (t.file(k) < 0) continue;
    scratch.contents.resize(kSumBlock);
    const std::int64_t size = size_of(t.s_types[k]);
    if (const int error = read_file(t.file(k), t.s[k] + begin * size, (end - begin) * size, scratch.contents.data()))
      return {error, k};
    const auto s = reinterpret_cast<std::uintptr_t>(scratch.contents.data()) - begin * size;
    for (std::int64_t at = begin; at < end; at += kBlock) fold_into(k, 1, &s, at, g_tiles[(at - begin) / kBlock]);
  }
  for (std::size_t k = 0; k < count; ++k) {
    out[k] = add_lanes(scratch.lanes.data() + 2 * k * kLanes);
    out[count + k] = norms[k] ? add_lanes(scratch.lanes.data() + (2 * k + 1) * kLanes) : 0.0;
  }
  out[2 * count] = add_lanes(g_lanes);
  return {0, 0};
}

// totals: [L][2K + 1] float64, added to: dots, squares (of the candidates that norms marks), |g|^2.
Failure fw_products(std::uintptr_t totals, const std::vector<std::uintptr_t>& g, const std::vector<int>& g_types,
                    const std::vector<std::vector<std::uintptr_t>>& s, const std::vector<std::vector<int>>& s_types,
                    const std::vector<std::vector<int>>& files, const std::vector<std::int64_t>& sizes,
                    const std::vector<int>& norms, int threads) {
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::size_t, std::int64_t>> blocks;  // (tensor, first element)
  for (std::size_t l = 0; l < g.size(); ++l) {
    tensors.push_back({g[l], static_cast<Dtype>(g_types[l]), s[l], dtypes(s_types[l]),
                       files.empty() ? std::vector<int>() : files[l], sizes[l]});
    for (std::int64_t at = 0; at < sizes[l]; at += kSumBlock) blocks.emplace_back(l, at);
  }
  const std::size_t width = 2 * s[0].size() + 1;
  std::vector<double> sums(blocks.size() * width);
  std::vector<Failure> failures(blocks.size(), {0, 0, 0});
  std::atomic<bool> failed{false};
  parallel_blocks(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t b) {
    if (failed.load(std::memory_order_relaxed)) return;
    const auto& [l, at] = blocks[b];
    const Tensor& t = tensors[l];
    const bool f64 = t.g_type == Dtype::f64 || any_f64(t.s_types);
    const auto [error, k] =
        (f64 ? block<double> : block<float>)(t, at, std::min(t.n, at + kSumBlock), norms, sums.data() + b * width);
    if (error != 0) {
      failures[b] = {error, static_cast<std::int64_t>(l), static_cast<std::int64_t>(k)};
      failed.store(true, std::memory_order_relaxed);
    }
  });
  for (const auto& failure : failures)
    if (failure[0] != 0) return failure;
  auto* total = pointer<double>(totals);
  for (std::size_t b = 0; b < blocks.size(); ++b)
    for (std::size_t i = 0; i < width; ++i) total[blocks[b].first * width + i] += sums[b * width + i];
  return {0, 0, 0};
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("fw_products", &fw_products, NoGil()); }
}  // namespace fastmerge
