// The weighted sum of models, or of their deltas, over a range of elements: shared by weighted_sum and by the kernels
// that use the sum while it is in cache, so that all of them have its bits.
#pragma once
#include "block.h"
#include "stream.h"
#include "wide.h"

namespace fastmerge {

// One model into the sum, read in its own dtype T; the compute type C is float, or double where an input is double.
#define FASTMERGE_FOLD(T, C, WIDE)                                                                     \
  FM_SIMD inline void fold_delta(C* acc, const T* x, const C* base, C w, bool first, std::int64_t n) { \
    if (first)                                                                                         \
      for (std::int64_t i = 0; i < n; ++i) acc[i] = (WIDE(x[i]) - base[i]) * w;                        \
    else                                                                                               \
      for (std::int64_t i = 0; i < n; ++i) acc[i] += (WIDE(x[i]) - base[i]) * w;                       \
  }                                                                                                    \
  FM_SIMD inline void fold(C* acc, const T* x, C w, bool first, std::int64_t n) {                      \
    if (first)                                                                                         \
      for (std::int64_t i = 0; i < n; ++i) acc[i] = WIDE(x[i]) * w;                                    \
    else                                                                                               \
      for (std::int64_t i = 0; i < n; ++i) acc[i] += WIDE(x[i]) * w;                                   \
  }
FASTMERGE_FOLD(float, float, to_float)
FASTMERGE_FOLD(bf16, float, to_float)
FASTMERGE_FOLD(f16, float, to_float)
FASTMERGE_FOLD(float, double, to_float)
FASTMERGE_FOLD(bf16, double, to_float)
FASTMERGE_FOLD(f16, double, to_float)
FASTMERGE_FOLD(double, double, )

struct Sum {
  std::uintptr_t out;
  Dtype out_type;
  const std::vector<std::uintptr_t>& in;  // the base first, if there is one
  const std::vector<Dtype>& types;
  bool has_base, add_base, normalize;
  const std::vector<double>& weight;
  double divisor, scale;
};

#ifdef FASTMERGE_AVX512
// Two registers of one input, whatever its dtype: the switch always goes the same way, so it costs next to nothing.
FM_WIDE void load32(Dtype t, std::uintptr_t address, std::int64_t at, __m512& a, __m512& b) {
  if (t == Dtype::bf16) {
    a = load16(reinterpret_cast<const bf16*>(address) + at);
    b = load16(reinterpret_cast<const bf16*>(address) + at + 16);
  } else if (t == Dtype::f16) {
    a = load16(reinterpret_cast<const f16*>(address) + at);
    b = load16(reinterpret_cast<const f16*>(address) + at + 16);
  } else {
    a = load16(reinterpret_cast<const float*>(address) + at);
    b = load16(reinterpret_cast<const float*>(address) + at + 16);
  }
}

// Elements [begin, end), a multiple of 64 of them.
template <class T, bool kBase>
FM_AVX512 inline void sum_avx512(const Sum& s, std::int64_t begin, std::int64_t end, bool stream) {
  const std::size_t models = s.weight.size();
  const std::uintptr_t* in = s.in.data() + (kBase ? 1 : 0);
  const Dtype* type = s.types.data() + (kBase ? 1 : 0);
  const __m512 divisor = _mm512_set1_ps(static_cast<float>(s.divisor)),
               scale = _mm512_set1_ps(static_cast<float>(s.scale));
  const bool divides = s.normalize && s.divisor != 1.0, scales = s.scale != 1.0, adds = kBase && s.add_base;
  T* out = reinterpret_cast<T*>(s.out);
  stream = stream && (reinterpret_cast<std::uintptr_t>(out + begin) & 63) == 0;
  for (std::int64_t i = begin; i < end; i += 64) {
    __m512 base[4], sum[4];
    if (kBase) {
      load32(s.types[0], s.in[0], i, base[0], base[1]);
      load32(s.types[0], s.in[0], i + 32, base[2], base[3]);
    }
    for (std::size_t k = 0; k < models; ++k) {
      const __m512 w = _mm512_set1_ps(static_cast<float>(s.weight[k]));
      __m512 x[4];
      load32(type[k], in[k], i, x[0], x[1]);
      load32(type[k], in[k], i + 32, x[2], x[3]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 term = _mm512_mul_ps(kBase ? _mm512_sub_ps(x[j], base[j]) : x[j], w);
        sum[j] = k == 0 ? term : _mm512_add_ps(sum[j], term);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (divides) sum[j] = _mm512_div_ps(sum[j], divisor);
      if (scales) sum[j] = _mm512_mul_ps(sum[j], scale);
      if (adds) sum[j] = _mm512_add_ps(base[j], sum[j]);
    }
    store32(out + i, sum[0], sum[1], stream);
    store32(out + i + 32, sum[2], sum[3], stream);
  }
}

// How far from `begin` on the registers' version went.
inline std::int64_t sum_wide(const Sum& s, std::int64_t begin, std::int64_t end, bool stream) {
  if (!has_avx512() || s.out_type == Dtype::f64) return begin;
  const std::int64_t stop = begin + (end - begin) / 64 * 64;
  dispatch(s.out_type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>)
      (s.has_base ? sum_avx512<T, true> : sum_avx512<T, false>)(s, begin, stop, stream);
  });
  return stop;
}
#endif

// Elements [begin, end) by one thread; C is the compute type. `stream` writes past the cache.
template <class C>
void sum_range(const Sum& s, std::int64_t begin, std::int64_t end, bool stream) {
  alignas(64) C base[kBlock], acc[kBlock];
  alignas(64) unsigned char rounded[kBlock * sizeof(double)];
#ifdef FASTMERGE_AVX512
  if constexpr (std::is_same_v<C, float>) begin = sum_wide(s, begin, end, stream);
#endif
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t m = std::min<std::int64_t>(kBlock, end - at);
    const C* b = s.has_base ? load_block(s.types[0], s.in[0], at, m, base) : nullptr;
    for (std::size_t k = 0; k < s.weight.size(); ++k) {
      const std::size_t i = k + (s.has_base ? 1 : 0);
      const C w = static_cast<C>(s.weight[k]);
      dispatch(s.types[i], [&](auto zero) {
        using T = decltype(zero);
        if constexpr (!(std::is_same_v<C, float> && std::is_same_v<T, double>)) {
          const T* x = reinterpret_cast<const T*>(s.in[i]) + at;
          s.has_base ? fold_delta(acc, x, b, w, k == 0, m) : fold(acc, x, w, k == 0, m);
        }
      });
    }
    if (s.normalize) divide_block(acc, static_cast<C>(s.divisor), m);
    if (s.scale != 1.0) scale_block(acc, static_cast<C>(s.scale), m);
    if (s.has_base && s.add_base) add_block(acc, b, m);
    if (stream) {
      store_block(s.out_type, reinterpret_cast<std::uintptr_t>(rounded), 0, m, acc);
      stream_out(reinterpret_cast<unsigned char*>(s.out) + at * size_of(s.out_type), rounded, m * size_of(s.out_type));
    } else {
      store_block(s.out_type, s.out, at, m, acc);
    }
  }
  if (stream) stream_fence();
}

}  // namespace fastmerge
