// permute_merge: out = (1 - w) * base + w * other[perm0, perm1, ...] in one pass over the three tensors.
//
// Story: the same walk as permute's; a block of the other model's source elements is collected in L1, widened, combined
// with the base's block, rounded once and streamed out. The base and the result are read and written in order.
#include "common/avx512.h"
#include "common/block.h"
#include "common/export.h"
#include "common/gather.h"

namespace fastmerge {
namespace {

FM_SIMD void combine(const float* b, const float* x, float wb, float wx, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = b[i] * wb + x[i] * wx;
}
FM_SIMD void combine(const double* b, const double* x, double wb, double wx, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = b[i] * wb + x[i] * wx;
}

FM_SIMD void combine(const bf16* b, const bf16* x, float wb, float wx, bf16* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = from_float<bf16>(to_float(b[i]) * wb + to_float(x[i]) * wx);
}
FM_SIMD void combine(const f16* b, const f16* x, float wb, float wx, f16* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = from_float<f16>(to_float(b[i]) * wb + to_float(x[i]) * wx);
}
#ifdef FASTMERGE_AVX512
// The conversions that the plain loop spells out in integers are one instruction each.
FM_AVX512 void combine_f16(const f16* b, const f16* x, float wb, float wx, f16* y, std::int64_t n) {
  const __m512 left = _mm512_set1_ps(wb), right = _mm512_set1_ps(wx);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 p = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
    const __m512 q = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
    const __m512 sum = _mm512_add_ps(_mm512_mul_ps(p, left), _mm512_mul_ps(q, right));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
  }
  combine(b + i, x + i, wb, wx, y + i, n - i);
}

// to_float and from_float<bf16> of common/dtype.h on both halves of each 32-bit word: no widening, no packing.
FM_AVX512 inline __m512i rounded_bf16(__m512 r) {
  const __m512i u = _mm512_castps_si512(r), one = _mm512_set1_epi32(1);
  const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
  const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(_mm512_add_epi32(u, half), nan, u, _mm512_set1_epi32(0x00400000));
}
FM_AVX512 void combine_bf16(const bf16* b, const bf16* x, float wb, float wx, bf16* y, std::int64_t n) {
  const __m512 left = _mm512_set1_ps(wb), right = _mm512_set1_ps(wx);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i v = _mm512_loadu_si512(b + i), u = _mm512_loadu_si512(x + i);
    const __m512 even = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), left),
                                      _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)), right));
    const __m512 odd = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(v, high)), left),
                                     _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(u, high)), right));
    const __m512i low = _mm512_srli_epi32(rounded_bf16(even), 16);
    _mm512_storeu_si512(y + i, _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_bf16(odd)));
  }
  combine(b + i, x + i, wb, wx, y + i, n - i);
}
#endif

inline void combine_halves(const f16* b, const f16* x, float wb, float wx, f16* y, std::int64_t n) {
#ifdef FASTMERGE_AVX512
  if (has_avx512()) return combine_f16(b, x, wb, wx, y, n);
#endif
  combine(b, x, wb, wx, y, n);
}
inline void combine_halves(const bf16* b, const bf16* x, float wb, float wx, bf16* y, std::int64_t n) {
#ifdef FASTMERGE_AVX512
  if (has_avx512()) return combine_bf16(b, x, wb, wx, y, n);
#endif
  combine(b, x, wb, wx, y, n);
}

// One step where the three tensors share a dtype of 16 or 32 bits: nothing is copied between.
inline bool combine_same(Dtype type, const void* base, const void* other, float wb, float wx, void* y, std::int64_t n) {
  switch (type) {
    case Dtype::bf16:
      combine_halves(static_cast<const bf16*>(base), static_cast<const bf16*>(other), wb, wx, static_cast<bf16*>(y), n);
      return true;
    case Dtype::f16:
      combine_halves(static_cast<const f16*>(base), static_cast<const f16*>(other), wb, wx, static_cast<f16*>(y), n);
      return true;
    case Dtype::f32:
      combine(static_cast<const float*>(base), static_cast<const float*>(other), wb, wx, static_cast<float*>(y), n);
      return true;
    case Dtype::f64: break;
  }
  return false;
}

template <class C>
void run(std::uintptr_t out, Dtype out_type, std::uintptr_t base, Dtype base_type, std::uintptr_t other,
         Dtype other_type, std::int64_t n, const Axes& axes, double weight, bool stream, int threads) {
  const std::int64_t narrow = size_of(base_type), wide = size_of(out_type);
  const C wb = static_cast<C>(1.0 - weight), wx = static_cast<C>(weight);
  const bool same = base_type == out_type && other_type == out_type;
  const Gather from(axes, size_of(other_type));
  gather_all(from, other, size_of(other_type), n, threads,
             [&](std::int64_t at, const void* source, std::int64_t m, std::int64_t soon) {
               alignas(64) unsigned char rounded[kStep * sizeof(double)];
               alignas(64) C b[kStep], x[kStep];
               auto* target = pointer<unsigned char>(out) + at * wide;
               const auto* left = pointer<const unsigned char>(base) + at * narrow;
               void* y = stream ? rounded : target;
               prefetch_range(pointer<const unsigned char>(base) + soon * narrow, m * narrow);
               if (!(same && combine_same(out_type, left, source, wb, wx, y, m))) {
                 const auto address = reinterpret_cast<std::uintptr_t>(source);
                 combine(load_block(base_type, base, at, m, b), load_block(other_type, address, 0, m, x), wb, wx, b, m);
                 store_block(out_type, reinterpret_cast<std::uintptr_t>(y), 0, m, b);
               }
               if (stream) stream_out(target, rounded, m * wide);
             });
}

void permute_merge(std::uintptr_t out, int out_type, std::uintptr_t base, int base_type, std::uintptr_t other,
                   int other_type, std::int64_t n, const Axes& axes, double weight, bool stream, int threads) {
  const auto o = static_cast<Dtype>(out_type), b = static_cast<Dtype>(base_type), x = static_cast<Dtype>(other_type);
  (any_f64({b, x}) ? run<double> : run<float>)(out, o, base, b, other, x, n, axes, weight, stream && out != base,
                                               threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("permute_merge", &permute_merge, NoGil()); }
}  // namespace fastmerge
