// fw_step: theta += gamma * (s - theta) for all tensors, optionally with <g, s - theta> and |s - theta|^2.
//
// Story: two reads and one write, nothing else; the iterate's line is in the cache when it is written, so plain stores
// cost no extra read. Tensors are cut into the blocks of block_sum.h, and all blocks of all tensors share one loop.
// With AVX-512 an element stays in registers from its load to its store, whatever the dtypes; elsewhere tiles stay in
// L1.
#include "common/block_sum.h"
#include "common/export.h"
#include "common/parallel.h"
#include "common/products_wide.h"

namespace fastmerge {
namespace {

FM_SIMD void direction(const float* s, const float* theta, float* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = s[i] - theta[i];
}
FM_SIMD void direction(const double* s, const double* theta, double* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = s[i] - theta[i];
}
FM_SIMD void step(const float* theta, const float* d, float gamma, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = theta[i] + d[i] * gamma;
}
FM_SIMD void step(const double* theta, const double* d, double gamma, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = theta[i] + d[i] * gamma;
}

struct Tensor {
  std::uintptr_t theta, s, g;  // s, g: 0 = the zero vertex, no products
  Dtype theta_type, s_type, g_type;
  std::int64_t n;
  double gamma;
};

#ifdef FASTMERGE_AVX512
constexpr std::int64_t kStepAhead = 2048;  // bytes fetched ahead of each of three streams

// n elements from `at` on, a multiple of the lanes; the vertex is there, and the gradient, if any, is float32.
template <class T, class S, bool kProducts>
FM_AVX512 void tile_avx512(const Tensor& t, std::int64_t at, std::int64_t n, float* dot, float* square) {
  T* theta = pointer<T>(t.theta) + at;
  const S* s = pointer<const S>(t.s) + at;
  const float* g = pointer<const float>(t.g) + (kProducts ? at : 0);
  const __m512 gamma = _mm512_set1_ps(static_cast<float>(t.gamma));
  __m512 dots[4], squares[4];
  for (int j = 0; j < 4; ++j) dots[j] = squares[j] = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < n; i += kLanes) {
    if (kProducts) {  // three streams; the hardware keeps up with two
      detail::prefetch_lines(theta + i, kStepAhead, kLanes * sizeof(T));
      detail::prefetch_lines(s + i, kStepAhead, kLanes * sizeof(S));
      detail::prefetch_lines(g + i, kStepAhead, kLanes * sizeof(float));
    }
    __m512 y[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 old = load16(theta + i + 16 * j), d = _mm512_sub_ps(load16(s + i + 16 * j), old);
      y[j] = _mm512_add_ps(old, _mm512_mul_ps(d, gamma));
      if (kProducts) {
        dots[j] = _mm512_add_ps(dots[j], _mm512_mul_ps(load16(g + i + 16 * j), d));
        squares[j] = _mm512_add_ps(squares[j], _mm512_mul_ps(d, d));
      }
    }
    store32(theta + i, y[0], y[1], false);
    store32(theta + i + 32, y[2], y[3], false);
  }
  if (kProducts) {
    detail::add_to_lanes(dot, dots);
    detail::add_to_lanes(square, squares);
  }
}

// False where the plain loops have to do it.
bool tile_wide(const Tensor& t, std::int64_t at, std::int64_t n, float* dot, float* square) {
  if (!t.s || n % kLanes != 0 || (t.g && t.g_type != Dtype::f32) || !has_avx512()) return false;
  dispatch(t.theta_type, [&](auto theta) {
    dispatch(t.s_type, [&](auto s) {
      using T = decltype(theta);
      using S = decltype(s);
      if constexpr (!std::is_same_v<T, double> && !std::is_same_v<S, double>)
        (t.g ? tile_avx512<T, S, true> : tile_avx512<T, S, false>)(t, at, n, dot, square);
    });
  });
  return true;
}
#endif

template <class C>
void block(const Tensor& t, std::int64_t begin, std::int64_t end, double* out) {
  alignas(64) C theta[kBlock], s[kBlock], d[kBlock], g[kBlock], y[kBlock];
  alignas(64) C dot[kLanes] = {}, square[kLanes] = {};
  std::fill(s, s + kBlock, C(0));
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t m = std::min(kBlock, end - at);
#ifdef FASTMERGE_AVX512
    if constexpr (std::is_same_v<C, float>)
      if (tile_wide(t, at, m, dot, square)) continue;
#endif
    const C* old = load_block(t.theta_type, t.theta, at, m, theta);
    direction(t.s ? load_block(t.s_type, t.s, at, m, s) : s, old, d, m);
    step(old, d, static_cast<C>(t.gamma), y, m);
    store_block(t.theta_type, t.theta, at, m, y);
    if (t.g) {
      const C* p = padded(load_block(t.g_type, t.g, at, m, g), m, g);
      padded(d, m, d);
      add_products(p, d, ceil_to_lanes(m), d, dot, square);
    }
  }
  out[0] = add_lanes(dot);
  out[1] = add_lanes(square);
}

// totals: [L][2] float64, added to; 0 when there are no gradients.
void fw_step(std::uintptr_t totals, const std::vector<std::uintptr_t>& theta, const std::vector<int>& theta_types,
             const std::vector<std::uintptr_t>& s, const std::vector<int>& s_types,
             const std::vector<std::uintptr_t>& g, const std::vector<int>& g_types,
             const std::vector<std::int64_t>& sizes, const std::vector<double>& gamma, int threads) {
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::size_t, std::int64_t>> blocks;
  for (std::size_t l = 0; l < theta.size(); ++l) {
    tensors.push_back({theta[l], s[l], g[l], static_cast<Dtype>(theta_types[l]), static_cast<Dtype>(s_types[l]),
                       static_cast<Dtype>(g_types[l]), sizes[l], gamma[l]});
    for (std::int64_t at = 0; at < sizes[l]; at += kSumBlock) blocks.emplace_back(l, at);
  }
  std::vector<double> sums(blocks.size() * 2);
  parallel_blocks(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t b) {
    const auto& [l, at] = blocks[b];
    const Tensor& t = tensors[l];
    // A gradient's dtype must not change the step's arithmetic: float64 only where the iterate or the vertex is.
    const bool f64 = t.theta_type == Dtype::f64 || (t.s && t.s_type == Dtype::f64);
    (f64 ? block<double> : block<float>)(t, at, std::min(t.n, at + kSumBlock), sums.data() + 2 * b);
  });
  if (auto* total = pointer<double>(totals))
    for (std::size_t b = 0; b < blocks.size(); ++b)
      for (std::size_t i = 0; i < 2; ++i) total[blocks[b].first * 2 + i] += sums[b * 2 + i];
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("fw_step", &fw_step, NoGil()); }
}  // namespace fastmerge
