// fw_products: <g, s_k>, |s_k|^2 and |g|^2 of K candidates over any number of tensors, each byte read once.
//
// Story: a linear minimisation oracle reads K models; nothing may be read twice. A tile of the gradient is widened once
// into L1, then every candidate's tile streams past it, widened in registers, its dot and its square in 64 lanes each.
// Blocks of 65536 elements give one float32 sum per product; they are added to float64 totals in index order.
#include "common/block_sum.h"
#include "common/export.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kRun = 32768;  // elements of one stream read before the next: long enough for the hardware prefetchers

struct Tensor {
  std::uintptr_t g;
  Dtype g_type;
  std::vector<std::uintptr_t> s;
  std::vector<Dtype> s_types;
  std::int64_t n;
};

// Candidate elements [at, at + n) against the tile g; n is a multiple of the lanes unless it ends the tensor.
template <class T>
void fold(const float* g, const T* x, std::int64_t n, const void* ahead, float* dot, float* square) {
  square ? add_products(g, x, n, ahead, dot, square) : add_products(g, x, n, ahead, dot);
}
void fold_tile(Dtype t, std::uintptr_t s, std::int64_t at, std::int64_t n, const float* g, float* buffer, const void* ahead,
               float* dot, float* square) {
  if (n % kLanes != 0) return fold(g, padded(load_block(t, s, at, n, buffer), n, buffer), ceil_to_lanes(n), nullptr, dot, square);
  switch (t) {
    case Dtype::bf16: return fold(g, pointer<const bf16>(s) + at, n, ahead, dot, square);
    case Dtype::f16: return fold(g, pointer<const f16>(s) + at, n, ahead, dot, square);
    default: return fold(g, pointer<const float>(s) + at, n, ahead, dot, square);
  }
}
void fold_tile(Dtype t, std::uintptr_t s, std::int64_t at, std::int64_t n, const double* g, double* buffer, const void* ahead,
               double* dot, double* square) {
  const double* x = padded(load_block(t, s, at, n, buffer), n, buffer);
  square ? add_products(g, x, ceil_to_lanes(n), ahead, dot, square) : add_products(g, x, ceil_to_lanes(n), ahead, dot);
}

// One block of one tensor: out = [K dots, K squares, |g|^2].
template <class C>
void block(const Tensor& t, std::int64_t begin, std::int64_t end, bool norms, double* out) {
  const std::size_t count = t.s.size();
  alignas(64) C x_tile[kBlock], g_lanes[kLanes] = {};
  static thread_local std::vector<C> lanes, g_run;
  lanes.assign(2 * count * kLanes, C(0));
  g_run.resize(kRun);
  for (std::int64_t run = begin; run < end; run += kRun) {
    const std::int64_t stop = std::min(end, run + kRun);
    // The gradient's run stays in L2; widened there unless it has the compute type already.
    const C* g = nullptr;
    for (std::int64_t at = run; at < stop; at += kBlock) {
      C* tile = g_run.data() + (at - run);
      const std::int64_t m = std::min(kBlock, stop - at);
      const C* x = padded(load_block(t.g_type, t.g, at, m, tile), m, tile);
      if (at == run) g = x;
      else if (x == tile && g != g_run.data()) std::copy(g, g + (at - run), g_run.data()), g = g_run.data();
      add_products(x, x, ceil_to_lanes(m), pointer<const char>(t.g) + (at + kBlock) * size_of(t.g_type), g_lanes);
    }
    for (std::size_t k = 0; k < count; ++k) {
      C* dot = lanes.data() + 2 * k * kLanes;
      const std::int64_t size = size_of(t.s_types[k]);
      for (std::int64_t at = run; at < stop; at += kBlock) {
        const std::int64_t m = std::min(kBlock, stop - at);
        const void* ahead = at + kBlock < stop ? pointer<const char>(t.s[k]) + (at + kBlock) * size
                            : k + 1 < count    ? pointer<const char>(t.s[k + 1]) + run * size_of(t.s_types[k + 1])
                                               : nullptr;
        fold_tile(t.s_types[k], t.s[k], at, m, g + (at - run), x_tile, ahead, dot, norms ? dot + kLanes : nullptr);
      }
    }
  }
  for (std::size_t k = 0; k < count; ++k) {
    out[k] = add_lanes(lanes.data() + 2 * k * kLanes);
    out[count + k] = norms ? add_lanes(lanes.data() + (2 * k + 1) * kLanes) : 0.0;
  }
  out[2 * count] = add_lanes(g_lanes);
}

// totals: [L][2K + 1] float64, added to: dots, squares, |g|^2.
void fw_products(std::uintptr_t totals, const std::vector<std::uintptr_t>& g, const std::vector<int>& g_types,
                 const std::vector<std::vector<std::uintptr_t>>& s, const std::vector<std::vector<int>>& s_types,
                 const std::vector<std::int64_t>& sizes, bool norms, int threads) {
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::size_t, std::int64_t>> blocks;  // (tensor, first element)
  for (std::size_t l = 0; l < g.size(); ++l) {
    tensors.push_back({g[l], static_cast<Dtype>(g_types[l]), s[l], dtypes(s_types[l]), sizes[l]});
    for (std::int64_t at = 0; at < sizes[l]; at += kSumBlock) blocks.emplace_back(l, at);
  }
  const std::size_t width = 2 * s[0].size() + 1;
  std::vector<double> sums(blocks.size() * width);
  parallel_blocks(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t b) {
    const auto& [l, at] = blocks[b];
    const Tensor& t = tensors[l];
    const bool f64 = t.g_type == Dtype::f64 || any_f64(t.s_types);
    (f64 ? block<double> : block<float>)(t, at, std::min(t.n, at + kSumBlock), norms, sums.data() + b * width);
  });
  auto* total = pointer<double>(totals);
  for (std::size_t b = 0; b < blocks.size(); ++b)
    for (std::size_t i = 0; i < width; ++i) total[blocks[b].first * width + i] += sums[b * width + i];
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("fw_products", &fw_products, NoGil()); }
}  // namespace fastmerge
