// The loops of SCE in AVX-512 registers: the same arithmetic in the same order as the plain ones of ops/sce_merge.cpp.
//
// Story: sixteen elements of up to eight deltas fit the registers, and the variance, the election and the mean need
// nothing else. Dividing by the number of models is a product where that is a power of two, which is exact alike.
#pragma once
#include <algorithm>

#include "keys.h"
#include "wide.h"

#ifdef FASTMERGE_AVX512
namespace fastmerge::detail {

constexpr std::size_t kSceModels = 8;
constexpr int kSceLanes = 16;

FM_WIDE __m512 load16_of(const Array& x, std::int64_t at) {
  if (x.type == Dtype::bf16) return load16(reinterpret_cast<const bf16*>(x.address) + at);
  if (x.type == Dtype::f16) return load16(reinterpret_cast<const f16*>(x.address) + at);
  return load16(reinterpret_cast<const float*>(x.address) + at);
}

template <int K>
struct SceDeltas {
  __m512 base, delta[K];
};
template <int K>
FM_WIDE SceDeltas<K> sce_load(const Array& base, const Array* model, std::int64_t at) {
  SceDeltas<K> x;
  x.base = load16_of(base, at);
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) x.delta[k] = _mm512_sub_ps(load16_of(model[k], at), x.base);
  return x;
}

template <int K>
FM_WIDE __m512 divided(__m512 x) {
  if (K == 1) return x;
  if ((K & (K - 1)) == 0) return _mm512_mul_ps(x, _mm512_set1_ps(1.0f / K));
  return _mm512_div_ps(x, _mm512_set1_ps(static_cast<float>(K)));
}
template <int K>
FM_WIDE __m512 sce_variance16(const SceDeltas<K>& x) {
  __m512 mean = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int k = 1; k < K; ++k) mean = _mm512_add_ps(mean, _mm512_sub_ps(x.delta[k], x.delta[0]));
  mean = divided<K>(mean);
  __m512 v = _mm512_mul_ps(mean, mean);
#pragma GCC unroll 8
  for (int k = 1; k < K; ++k) {
    const __m512 s = _mm512_sub_ps(_mm512_sub_ps(x.delta[k], x.delta[0]), mean);
    v = _mm512_add_ps(v, _mm512_mul_ps(s, s));
  }
  return divided<K>(v);
}

// A rule on vectors that its index may lie in.
struct SceRule {
  bool selects;
  std::int64_t index;
  __m512i upto, after;  // bounds of the elements up to index, and of those behind it
};
FM_WIDE SceRule sce_rule(bool selects, const Rule& r) {
  if (!selects) return {false, 0, _mm512_setzero_si512(), _mm512_setzero_si512()};
  const std::int64_t behind = r.index == INT64_MAX ? r.index : r.index + 1;
  return {true, r.index, _mm512_set1_epi32(bound_at<float>(r, r.index)), _mm512_set1_epi32(bound_at<float>(r, behind))};
}
FM_WIDE __mmask16 sce_kept(const SceRule& r, __m512 variance, std::int64_t position) {
  const __m512i key = _mm512_and_si512(_mm512_castps_si512(variance), _mm512_set1_epi32(0x7fffffff));
  const std::int64_t ties = r.index - position;  // the last element of the vector that the rule's ties reach
  const auto first = static_cast<__mmask16>(ties < 0 ? 0 : ties >= 15 ? 0xffff : (2u << ties) - 1);
  return static_cast<__mmask16>(_mm512_cmpgt_epi32_mask(key, r.after) |
                                _mm512_mask_cmpgt_epi32_mask(first, key, r.upto));
}

struct SceCall {
  const Array* base;
  const Array* model;
  bool selects;
  Rule rule;
  std::int64_t offset;  // of element 0 within the whole tensor
  const float* weight;
};

// Variances of [begin, end), whose length is a multiple of 16.
template <int K>
FM_AVX512 void sce_variances(const SceCall& c, std::int64_t begin, std::int64_t end, float* out) {
  for (std::int64_t i = begin; i < end; i += 16)
    _mm512_storeu_ps(out + i, sce_variance16<K>(sce_load<K>(*c.base, c.model, i)));
}

// Adds the squares of the kept deltas of [begin, end) to each model's 16 lanes.
template <int K>
FM_AVX512 void sce_energies(const SceCall& c, std::int64_t begin, std::int64_t end, double* lanes) {
  const SceRule rule = sce_rule(c.selects, c.rule);
  __m512d low[K], high[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    low[k] = _mm512_loadu_pd(lanes + k * kSceLanes);
    high[k] = _mm512_loadu_pd(lanes + k * kSceLanes + 8);
  }
  for (std::int64_t i = begin; i < end; i += 16) {
    const auto x = sce_load<K>(*c.base, c.model, i);
    const __mmask16 kept = rule.selects ? sce_kept(rule, sce_variance16<K>(x), c.offset + i) : __mmask16{0xffff};
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x.delta[k])),
                    b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.delta[k], 1));
      // What is left out would add +0 to a sum that is never -0.
      low[k] = _mm512_mask_add_pd(low[k], static_cast<__mmask8>(kept), low[k], _mm512_mul_pd(a, a));
      high[k] = _mm512_mask_add_pd(high[k], static_cast<__mmask8>(kept >> 8), high[k], _mm512_mul_pd(b, b));
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    _mm512_storeu_pd(lanes + k * kSceLanes, low[k]);
    _mm512_storeu_pd(lanes + k * kSceLanes + 8, high[k]);
  }
}

template <int K>
FM_WIDE __m512 sce_merge16(const SceCall& c, const SceRule& rule, const __m512* weight, std::int64_t i) {
  const auto x = sce_load<K>(*c.base, c.model, i);
  const __m512 zero = _mm512_setzero_ps(), least = _mm512_set1_ps(1e-6f);
  __m512 total = x.delta[0], above = zero, below = zero;
#pragma GCC unroll 8
  for (int k = 1; k < K; ++k) total = _mm512_add_ps(total, x.delta[k]);
  // A delta agrees unless, turned to the elected side, it is <= 0; NaN agrees. What does not would add +0 to sums that
  // are never -0.
  const __m512i flip =
      _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(total, zero, _CMP_NGE_UQ), static_cast<int>(0x80000000u));
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const __m512 turned = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x.delta[k]), flip));
    const __mmask16 agrees = _mm512_cmp_ps_mask(turned, zero, _CMP_NLE_UQ);
    above = _mm512_mask_add_ps(above, agrees, above, _mm512_mul_ps(x.delta[k], weight[k]));
    below = _mm512_mask_add_ps(below, agrees, below, weight[k]);
  }
  __m512 merged = _mm512_div_ps(above, _mm512_mask_mov_ps(below, _mm512_cmp_ps_mask(below, least, _CMP_LT_OQ), least));
  if (rule.selects) merged = _mm512_maskz_mov_ps(sce_kept(rule, sce_variance16<K>(x), c.offset + i), merged);
  return _mm512_add_ps(x.base, merged);
}

// [begin, end), a multiple of 32 elements, into `to`, where element `begin` goes first.
template <int K, class T>
FM_AVX512 void sce_merges(const SceCall& c, std::int64_t begin, std::int64_t end, T* to, bool stream) {
  const SceRule rule = sce_rule(c.selects, c.rule);
  __m512 weight[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) weight[k] = _mm512_set1_ps(c.weight[k]);
  for (std::int64_t i = begin; i < end; i += 32)
    store32(to + (i - begin), sce_merge16<K>(c, rule, weight, i), sce_merge16<K>(c, rule, weight, i + 16), stream);
}

// f(std::integral_constant<int, K>{}) for K models, at most kSceModels.
template <int K = 1, class F>
void with_models(std::size_t models, const F& f) {
  if (models == K) return f(std::integral_constant<int, K>{});
  if constexpr (K < static_cast<int>(kSceModels)) with_models<K + 1>(models, f);
}

}  // namespace fastmerge::detail
#endif
