// gram_blocks: all K (K + 1) / 2 inner products of K deltas, per block of 65536 elements.
//
// Story: slerp, karcher, multislerp and model_stock need only these numbers of their inputs, so one pass over memory
// replaces dozens. Each tensor's sub-block of 2048 deltas is widened to float once and stays in L1/L2 while every pair
// is multiplied. Products and sums are double in 16 fixed lanes, so that the result depends on nothing but the data.
#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kSumBlock = 65536;
constexpr int kLanes = 16;

FM_SIMD void subtract(float* x, const float* a, const float* b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = a[i] - b[i];
}
FM_SIMD void subtract(double* x, const double* a, const double* b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = a[i] - b[i];
}

template <class C>
FM_INLINE void dot_lanes(double* lanes, const C* x, const C* y, std::int64_t n) {
  double acc[kLanes];
  for (int l = 0; l < kLanes; ++l) acc[l] = lanes[l];
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) acc[l] += static_cast<double>(x[i + l]) * static_cast<double>(y[i + l]);
  for (int l = 0; i < n; ++i, ++l) acc[l] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int l = 0; l < kLanes; ++l) lanes[l] = acc[l];
}
FM_SIMD void dot(double* lanes, const float* x, const float* y, std::int64_t n) { dot_lanes(lanes, x, y, n); }
FM_SIMD void dot(double* lanes, const double* x, const double* y, std::int64_t n) { dot_lanes(lanes, x, y, n); }

template <class C>
void run(double* out, const std::vector<std::uintptr_t>& in, const std::vector<Dtype>& types, std::int64_t n,
         bool has_base, int threads) {
  const std::size_t first = has_base ? 1 : 0, count = in.size() - first, pairs = count * (count + 1) / 2;
  const std::int64_t blocks = ceil_div(n, kSumBlock);
  parallel_blocks(blocks, threads, [&](std::int64_t b) {
    // One allocation a block of 65536 elements, so that any number of models fits.
    std::vector<double> lanes(pairs * kLanes, 0.0);
    std::vector<C> delta(count * kBlock), wide(kBlock), origin(kBlock);
    const std::int64_t end = std::min(n, (b + 1) * kSumBlock);
    for (std::int64_t at = b * kSumBlock; at < end; at += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, end - at);
      const C* base = has_base ? load_block(types[0], in[0], at, m, origin.data()) : nullptr;
      for (std::size_t k = 0; k < count; ++k) {
        C* d = delta.data() + k * kBlock;
        const C* v = load_block(types[first + k], in[first + k], at, m, wide.data());
        if (has_base) subtract(d, v, base, m);
        else std::copy(v, v + m, d);
      }
      double* lane = lanes.data();
      for (std::size_t i = 0; i < count; ++i)
        for (std::size_t j = i; j < count; ++j, lane += kLanes)
          dot(lane, delta.data() + i * kBlock, delta.data() + j * kBlock, m);
    }
    for (std::size_t p = 0; p < pairs; ++p) {
      double sum = lanes[p * kLanes];
      for (int l = 1; l < kLanes; ++l) sum += lanes[p * kLanes + l];
      out[b * pairs + p] = sum;
    }
  });
}

void gram_blocks(std::uintptr_t out, const std::vector<std::uintptr_t>& in, const std::vector<int>& codes,
                 std::int64_t n, bool has_base, int threads) {
  const auto types = dtypes(codes);
  (any_f64(types) ? run<double> : run<float>)(pointer<double>(out), in, types, n, has_base, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("gram_blocks", &gram_blocks, NoGil()); }
}  // namespace fastmerge
