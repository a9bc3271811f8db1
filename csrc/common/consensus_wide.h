// The merge loops of consensus_merge in AVX-512 registers: the same arithmetic in the same order as the plain ones.
//
// Story: what is trimmed, what agrees and what is summed are mask registers, so an element and model cost one
// conversion, one difference, one product, two compares and three masked additions. A model's trim is a compare with
// its bound, or a word of bits for 64 elements (random trims).
#pragma once
#include "consensus.h"
#include "wide.h"

#ifdef FASTMERGE_AVX512
namespace fastmerge::detail {

// A half of the 32 elements from i on: in order where bits say what is kept, in the cheapest order otherwise.
template <bool kBits, int kHalf, class T>
FM_WIDE __m512 half16(const T* x, std::int64_t i) {
  if constexpr (kBits) return load16(x + i + 16 * kHalf);
  else return load_half<kHalf>(x + i);
}
template <bool kBits, class T>
FM_WIDE void store_both(T* to, __m512 first, __m512 second, bool stream) {
  if constexpr (kBits) store32(to, first, second, stream);
  else store_halves(to, first, second, stream);
}
// Which of them a model keeps, d being their deltas.
template <bool kBits, int kHalf>
FM_WIDE __mmask16 kept16(const std::uint64_t* keep, __m512i bound, __m512 d, std::int64_t i) {
  if (kBits) return static_cast<__mmask16>(keep[i >> 6] >> ((i & 63) + 16 * kHalf));
  return _mm512_cmpgt_epi32_mask(_mm512_and_si512(_mm512_castps_si512(d), _mm512_set1_epi32(0x7fffffff)), bound);
}

// What stays the same over a block, in registers: stores through `out` could otherwise change it, for all the compiler
// knows.
template <int K, class T>
struct Held {
  const T* base;
  const T* model[K];
  const std::uint64_t* keep[K];
  __m512 coefficient[K], weight[K], scale;
  __m512i bound[K];
};

template <int K, bool kNormalize, bool kBits, int kHalf, class T>
FM_WIDE __m512 elect16(const Held<K, T>& h, std::int64_t i) {
  const __m512 b = half16<kBits, kHalf>(h.base, i), zero = _mm512_setzero_ps();
  __m512 u[K], vote = zero, total = zero, divisor = zero;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const __m512 d = _mm512_sub_ps(half16<kBits, kHalf>(h.model[k], i), b);
    u[k] = _mm512_maskz_mul_ps(kept16<kBits, kHalf>(h.keep[k], h.bound[k], d, i), d, h.coefficient[k]);
    vote = k == 0 ? u[k] : _mm512_add_ps(vote, u[k]);
  }
  // A term agrees unless, turned to the elected side, it is <= 0; NaN agrees. What is left out would add +0 to a sum
  // that is never -0, so leaving it out changes nothing.
  const __mmask16 negative = _mm512_cmp_ps_mask(vote, zero, _CMP_NGE_UQ);
  const __m512i flip = _mm512_maskz_set1_epi32(negative, static_cast<int>(0x80000000u));
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const __m512 turned = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(u[k]), flip));
    const __mmask16 agrees = _mm512_cmp_ps_mask(turned, zero, _CMP_NLE_UQ);
    total = k == 0 ? _mm512_maskz_mov_ps(agrees, u[k]) : _mm512_mask_add_ps(total, agrees, total, u[k]);
    if (kNormalize)
      divisor =
          k == 0 ? _mm512_maskz_mov_ps(agrees, h.weight[k]) : _mm512_mask_add_ps(divisor, agrees, divisor, h.weight[k]);
  }
  if (kNormalize) {
    divisor = _mm512_mask_mov_ps(divisor, _mm512_cmp_ps_mask(divisor, zero, _CMP_EQ_OQ), _mm512_set1_ps(1.0f));
    total = _mm512_div_ps(total, divisor);
  }
  return _mm512_add_ps(b, _mm512_mul_ps(total, h.scale));
}

template <int K, bool kNormalize, bool kBits, class T>
FM_AVX512 void elect_wide(const Hot<T>& hot, std::int64_t n, bool stream) {
  Held<K, T> h;
  h.base = hot.base;
  h.scale = _mm512_set1_ps(hot.scale);
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    h.model[k] = hot.model[k];
    h.keep[k] = hot.keep[k];
    h.coefficient[k] = _mm512_set1_ps(hot.coefficient[k]);
    h.weight[k] = _mm512_set1_ps(hot.weight[k]);
    h.bound[k] = _mm512_set1_epi32(hot.bound[k]);
  }
  T* out = hot.out;
  for (std::int64_t i = 0; i < n; i += 32)
    store_both<kBits>(out + i, elect16<K, kNormalize, kBits, 0>(h, i), elect16<K, kNormalize, kBits, 1>(h, i), stream);
}

// Without an election, for any number of models: 32 elements at a time.
template <bool kBits, class T>
FM_AVX512 void sum_wide(const Hot<T>& h, int models, bool divides, std::int64_t n, bool stream) {
  const __m512 scale = _mm512_set1_ps(h.scale), divisor = _mm512_set1_ps(h.divisor);
  const T* base = h.base;
  T* out = h.out;
  for (std::int64_t i = 0; i < n; i += 32) {
    const __m512 b0 = half16<kBits, 0>(base, i), b1 = half16<kBits, 1>(base, i);
    __m512 t0 = _mm512_setzero_ps(), t1 = t0;
    for (int k = 0; k < models; ++k) {
      const __m512 c = _mm512_set1_ps(h.coefficient[k]);
      const __m512i bound = _mm512_set1_epi32(h.bound[k]);
      const __m512 d0 = _mm512_sub_ps(half16<kBits, 0>(h.model[k], i), b0),
                   d1 = _mm512_sub_ps(half16<kBits, 1>(h.model[k], i), b1);
      const __m512 u0 = _mm512_maskz_mul_ps(kept16<kBits, 0>(h.keep[k], bound, d0, i), d0, c),
                   u1 = _mm512_maskz_mul_ps(kept16<kBits, 1>(h.keep[k], bound, d1, i), d1, c);
      t0 = k == 0 ? u0 : _mm512_add_ps(t0, u0);
      t1 = k == 0 ? u1 : _mm512_add_ps(t1, u1);
    }
    if (divides) {
      t0 = _mm512_div_ps(t0, divisor);
      t1 = _mm512_div_ps(t1, divisor);
    }
    store_both<kBits>(out + i, _mm512_add_ps(b0, _mm512_mul_ps(t0, scale)), _mm512_add_ps(b1, _mm512_mul_ps(t1, scale)),
                      stream);
  }
}

// n a multiple of 32; stream needs `out` aligned to 64 bytes.
template <bool kBits, class T>
void merge_wide(const Hot<T>& h, int models, Elect elect, bool normalize, std::int64_t n, bool stream) {
  using F = void (*)(const Hot<T>&, std::int64_t, bool);
  static constexpr F plain[] = {elect_wide<1, false, kBits, T>, elect_wide<2, false, kBits, T>,
                                elect_wide<3, false, kBits, T>, elect_wide<4, false, kBits, T>,
                                elect_wide<5, false, kBits, T>, elect_wide<6, false, kBits, T>,
                                elect_wide<7, false, kBits, T>, elect_wide<8, false, kBits, T>};
  static constexpr F divided[] = {elect_wide<1, true, kBits, T>, elect_wide<2, true, kBits, T>,
                                  elect_wide<3, true, kBits, T>, elect_wide<4, true, kBits, T>,
                                  elect_wide<5, true, kBits, T>, elect_wide<6, true, kBits, T>,
                                  elect_wide<7, true, kBits, T>, elect_wide<8, true, kBits, T>};
  if (elect == Elect::none) sum_wide<kBits>(h, models, normalize, n, stream);
  else (normalize ? divided : plain)[models - 1](h, n, stream);
}

}  // namespace fastmerge::detail

namespace fastmerge {

// Any n up to kBlock: what is left of the last 32 elements goes through padded copies.
template <class T>
void run_wide(const Hot<T>& h, int models, bool bits, Elect elect, bool normalize, std::int64_t n, bool stream) {
  const auto run = [&](const Hot<T>& part, std::int64_t m, bool past) {
    (bits ? detail::merge_wide<true, T> : detail::merge_wide<false, T>)(part, models, elect, normalize, m, past);
  };
  stream = stream && (reinterpret_cast<std::uintptr_t>(h.out) & 63) == 0;
  const std::int64_t whole = n / 32 * 32, rest = n - whole;
  if (whole) run(h, whole, stream);
  if (!rest) return;
  T copy[kHotModels + 2][32] = {};
  Hot<T> last = h;
  std::uint64_t word[kHotModels];
  std::copy(h.base + whole, h.base + n, copy[models]);
  last.base = copy[models];
  last.out = copy[models + 1];
  for (int k = 0; k < models; ++k) {
    std::copy(h.model[k] + whole, h.model[k] + n, copy[k]);
    last.model[k] = copy[k];
    if (bits) {
      word[k] = h.keep[k][whole >> 6] >> (whole & 63);
      last.keep[k] = &word[k];
    }
  }
  run(last, 32, false);
  std::copy(last.out, last.out + rest, h.out + whole);
}

}  // namespace fastmerge
#endif
