// abs_sum: sums of |model - base| over blocks of 65536 elements, in float64.
//
// Story: the pass is bound by reading, so the only care is a fixed order: 16 lanes per block of 2048 elements, lane j
// taking the elements j, j + 16, ...; the lanes are added to the block's total in order. No vector width changes that.
// With AVX-512 up to four models pass at once, so that their streams advance together and their additions overlap.
#include <cmath>

#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"
#include "common/wide.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kSum = 65536;  // fastmerge/ops/abs_sum.py:BLOCK
constexpr int kLanes = 16;

template <class C>
FM_INLINE void lanes(const C* x, const C* base, double* lane, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += static_cast<double>(std::abs(base ? x[i + j] - base[i + j] : x[i + j]));
  for (int j = 0; i + j < n; ++j) lane[j] += static_cast<double>(std::abs(base ? x[i + j] - base[i + j] : x[i + j]));
}
FM_SIMD void add_lanes(const float* x, const float* base, double* lane, std::int64_t n) {
  base ? lanes(x, base, lane, n) : lanes(x, static_cast<const float*>(nullptr), lane, n);
}
FM_SIMD void add_lanes(const double* x, const double* base, double* lane, std::int64_t n) {
  base ? lanes(x, base, lane, n) : lanes(x, static_cast<const double*>(nullptr), lane, n);
}

#ifdef FASTMERGE_AVX512
constexpr int kTogether = 4;

FM_WIDE __m512 load16(Dtype t, std::uintptr_t address, std::int64_t at) {
  if (t == Dtype::bf16) return fastmerge::load16(reinterpret_cast<const bf16*>(address) + at);
  if (t == Dtype::f16) return fastmerge::load16(reinterpret_cast<const f16*>(address) + at);
  return fastmerge::load16(reinterpret_cast<const float*>(address) + at);
}

// Lanes of K models over n elements from `at` on, n a multiple of 16; no dtype is float64.
template <int K, bool kBase>
FM_AVX512 void lanes_avx512(const std::uintptr_t* in, const Dtype* type, std::uintptr_t base, Dtype base_type,
                            std::int64_t at, std::int64_t n, double* lane) {
  __m512d sum[K][2];
  std::uintptr_t x[K];
  Dtype t[K];
  for (int k = 0; k < K; ++k) {
    sum[k][0] = sum[k][1] = _mm512_setzero_pd();
    x[k] = in[k];
    t[k] = type[k];
  }
  for (std::int64_t i = at; i < at + n; i += 16) {
    const __m512 b = kBase ? load16(base_type, base, i) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const __m512 v = load16(t[k], x[k], i), d = _mm512_abs_ps(kBase ? _mm512_sub_ps(v, b) : v);
      sum[k][0] = _mm512_add_pd(sum[k][0], _mm512_cvtps_pd(_mm512_castps512_ps256(d)));
      sum[k][1] = _mm512_add_pd(sum[k][1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(d, 1)));
    }
  }
  for (int k = 0; k < K; ++k) {
    _mm512_storeu_pd(lane + k * kLanes, sum[k][0]);
    _mm512_storeu_pd(lane + k * kLanes + 8, sum[k][1]);
  }
}

template <int K>
void lanes_wide(const std::uintptr_t* in, const Dtype* type, bool has_base, std::uintptr_t base, Dtype base_type,
                std::int64_t at, std::int64_t n, double* lane) {
  (has_base ? lanes_avx512<K, true> : lanes_avx512<K, false>)(in, type, base, base_type, at, n, lane);
}

// A block of kSum elements (whole tiles of kBlock) of all models.
void block_wide(double* out, std::int64_t stride, const std::vector<std::uintptr_t>& in,
                const std::vector<Dtype>& types, std::int64_t begin, std::int64_t end, bool has_base) {
  const std::int64_t models = static_cast<std::int64_t>(in.size()) - has_base;
  for (std::int64_t at = begin; at < end; at += kBlock)
    for (std::int64_t k = 0; k < models; k += kTogether) {
      const std::int64_t count = std::min<std::int64_t>(kTogether, models - k);
      double lane[kTogether * kLanes];
      const std::uintptr_t* x = in.data() + has_base + k;
      const Dtype* t = types.data() + has_base + k;
      using F = void (*)(const std::uintptr_t*, const Dtype*, bool, std::uintptr_t, Dtype, std::int64_t, std::int64_t,
                         double*);
      static constexpr F each[] = {lanes_wide<1>, lanes_wide<2>, lanes_wide<3>, lanes_wide<4>};
      each[count - 1](x, t, has_base, in[0], types[0], at, kBlock, lane);
      for (std::int64_t c = 0; c < count; ++c)
        for (int j = 0; j < kLanes; ++j) out[(k + c) * stride] += lane[c * kLanes + j];
    }
}
#endif

template <class C>
void run(double* out, const std::vector<std::uintptr_t>& in, const std::vector<Dtype>& types, std::int64_t n,
         bool has_base, int threads) {
  const std::int64_t blocks = ceil_div(n, kSum), models = static_cast<std::int64_t>(in.size()) - has_base;
  parallel_blocks(blocks, threads, [&](std::int64_t block) {
    alignas(64) C base[kBlock], x[kBlock];
    for (std::int64_t k = 0; k < models; ++k) out[k * blocks + block] = 0.0;
    std::int64_t from = block * kSum;
#ifdef FASTMERGE_AVX512
    if (std::is_same_v<C, float> && has_avx512()) {
      const std::int64_t whole = (std::min(n, from + kSum) - from) / kBlock * kBlock;
      block_wide(out + block, blocks, in, types, from, from + whole, has_base);
      from += whole;
    }
#endif
    for (std::int64_t at = from; at < std::min(n, (block + 1) * kSum); at += kBlock) {
      const std::int64_t m = std::min<std::int64_t>(kBlock, std::min(n, (block + 1) * kSum) - at);
      const C* b = has_base ? load_block(types[0], in[0], at, m, base) : nullptr;
      for (std::int64_t k = 0; k < models; ++k) {
        alignas(64) double lane[kLanes] = {};
        add_lanes(load_block(types[k + has_base], in[k + has_base], at, m, x), b, lane, m);
        for (int j = 0; j < kLanes; ++j) out[k * blocks + block] += lane[j];
      }
    }
  });
}

void abs_sum(std::uintptr_t out, const std::vector<std::uintptr_t>& in, const std::vector<int>& type_codes,
             std::int64_t n, bool has_base, int threads) {
  const auto types = dtypes(type_codes);
  (any_f64(types) ? run<double> : run<float>)(pointer<double>(out), in, types, n, has_base, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("abs_sum", &abs_sum, NoGil()); }
}  // namespace fastmerge
