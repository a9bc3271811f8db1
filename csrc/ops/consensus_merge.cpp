// consensus_merge: trim K deltas, elect a sign per element, add those that agree to the base.
//
// Story: once thresholds are known everything is elementwise, so the whole merge is one pass that reads K + 1 streams
// and writes one. The common case, up to eight models of one dtype trimmed by thresholds or at random, is a single loop
// that keeps all K terms in registers (common/consensus_wide.h with AVX-512, `fused` below elsewhere): the engine's hot
// spot. Everything else (mixed dtypes, float64, trims by window, elections by count, more models) goes
// through blocks that stay in L1: one buffer of terms per model, then the election over the buffers. Trims by threshold
// are one or two integer compares (common/keys.h); blocks are cut at the last kept tie of each model, so ties cost
// nothing. Both paths do the same arithmetic in the same order.
#include "common/consensus.h"
#include "common/consensus_wide.h"
#include "common/export.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace fastmerge {
namespace {

FM_SIMD void term_all(const float* d, float c, float* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) u[i] = d[i] * c;
}
FM_SIMD void term_all(const double* d, double c, double* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) u[i] = d[i] * c;
}
FM_SIMD void term_rule(const float* d, float c, std::int32_t lo, std::int32_t hi, float* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<std::int32_t>(raw_key(d[i]));
    u[i] = (key > lo) & (key <= hi) ? d[i] * c : 0.0f;
  }
}
FM_SIMD void term_rule(const double* d, double c, std::int64_t lo, std::int64_t hi, double* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<std::int64_t>(raw_key(d[i]));
    u[i] = (key > lo) & (key <= hi) ? d[i] * c : 0.0;
  }
}
FM_SIMD void term_mask(const float* d, float c, const std::uint8_t* keep, float* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) u[i] = keep[i] ? d[i] * c : 0.0f;
}
FM_SIMD void term_mask(const double* d, double c, const std::uint8_t* keep, double* u, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) u[i] = keep[i] ? d[i] * c : 0.0;
}

FM_SIMD void count_votes(const float* u, float* vote, bool first, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    vote[i] = (first ? 0.0f : vote[i]) + (static_cast<float>(u[i] > 0.0f) - static_cast<float>(u[i] < 0.0f));
}
FM_SIMD void count_votes(const double* u, double* vote, bool first, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    vote[i] = (first ? 0.0 : vote[i]) + (static_cast<double>(u[i] > 0.0) - static_cast<double>(u[i] < 0.0));
}
FM_SIMD void join(const float* u, const float* vote, float w, float* total, float* divisor, bool first,
                  std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const bool agrees = vote[i] >= 0.0f ? !(u[i] <= 0.0f) : !(u[i] >= 0.0f);
    const float part = agrees ? u[i] : 0.0f, share = agrees ? w : 0.0f;
    total[i] = first ? part : total[i] + part;
    divisor[i] = first ? share : divisor[i] + share;
  }
}
FM_SIMD void join(const double* u, const double* vote, double w, double* total, double* divisor, bool first,
                  std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const bool agrees = vote[i] >= 0.0 ? !(u[i] <= 0.0) : !(u[i] >= 0.0);
    const double part = agrees ? u[i] : 0.0, share = agrees ? w : 0.0;
    total[i] = first ? part : total[i] + part;
    divisor[i] = first ? share : divisor[i] + share;
  }
}
FM_SIMD void divide(float* total, const float* divisor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) total[i] /= divisor[i] == 0.0f ? 1.0f : divisor[i];
}
FM_SIMD void divide(double* total, const double* divisor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) total[i] /= divisor[i] == 0.0 ? 1.0 : divisor[i];
}

FM_INLINE std::uint32_t mask_of(bool b) { return -static_cast<std::uint32_t>(b); }

// The single loop, without a branch, or it does not vectorise. Aliasing of `out` with an input is of equal indices
// only, which ivdep allows.
template <int K, bool kNormalize, class T>
FM_INLINE void fused(const Hot<T>& h, std::int64_t n) {
  const T* base = h.base;
  T* out = h.out;
  const T* x[K];
  float c[K], w[K];
  std::int32_t lo[K];
  for (int k = 0; k < K; ++k) {
    x[k] = h.model[k];
    c[k] = h.coefficient[k];
    w[k] = h.weight[k];
    lo[k] = h.bound[k];
  }
  const float scale = h.scale;
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    const float b = to_float(base[i]);
    std::uint32_t u[K];
    float vote = 0.0f;
    for (int k = 0; k < K; ++k) {
      const float d = to_float(x[k][i]) - b;
      u[k] = bits_of(d * c[k]) & mask_of(static_cast<std::int32_t>(raw_key(d)) > lo[k]);
      vote = k == 0 ? float_of(u[k]) : vote + float_of(u[k]);
    }
    // A term agrees unless, turned to the elected side, it is <= 0; NaN agrees.
    const std::uint32_t flip = ~mask_of(vote >= 0.0f) & 0x80000000u;
    float total = 0.0f, divisor = 0.0f;
    for (int k = 0; k < K; ++k) {
      const std::uint32_t agrees = ~mask_of(float_of(u[k] ^ flip) <= 0.0f);
      const float part = float_of(u[k] & agrees);
      total = k == 0 ? part : total + part;
      if (kNormalize) {
        const float share = float_of(bits_of(w[k]) & agrees);
        divisor = k == 0 ? share : divisor + share;
      }
    }
    if (kNormalize) {
      const std::uint32_t zero = mask_of(divisor == 0.0f);
      total /= float_of((bits_of(divisor) & ~zero) | (bits_of(1.0f) & zero));
    }
    out[i] = from_float<T>(b + total * scale);
  }
}

#define FASTMERGE_FUSED(K, T)                                                              \
  FM_SIMD void fused_##K##_##T(const Hot<T>& h, std::int64_t n) { fused<K, false>(h, n); } \
  FM_SIMD void fused_##K##_##T##_normalized(const Hot<T>& h, std::int64_t n) { fused<K, true>(h, n); }
// clang-format off
#define FASTMERGE_FUSED_ALL(T)                                                                                \
  FASTMERGE_FUSED(1, T) FASTMERGE_FUSED(2, T) FASTMERGE_FUSED(3, T) FASTMERGE_FUSED(4, T)                     \
  FASTMERGE_FUSED(5, T) FASTMERGE_FUSED(6, T) FASTMERGE_FUSED(7, T) FASTMERGE_FUSED(8, T)                     \
  void run_fused(const Hot<T>& h, std::size_t models, bool normalize, std::int64_t n) {                       \
    using F = void (*)(const Hot<T>&, std::int64_t);                                                          \
    static const F plain[] = {fused_1_##T, fused_2_##T, fused_3_##T, fused_4_##T,                             \
                              fused_5_##T, fused_6_##T, fused_7_##T, fused_8_##T};                            \
    static const F divided[] = {fused_1_##T##_normalized, fused_2_##T##_normalized, fused_3_##T##_normalized, \
                                fused_4_##T##_normalized, fused_5_##T##_normalized, fused_6_##T##_normalized, \
                                fused_7_##T##_normalized, fused_8_##T##_normalized};                          \
    (normalize ? divided : plain)[models - 1](h, n);                                                          \
  }
// clang-format on
FASTMERGE_FUSED_ALL(float)
FASTMERGE_FUSED_ALL(bf16)
FASTMERGE_FUSED_ALL(f16)

bool is_hot(const Merge& m) {
  const Deltas& d = m.deltas;
  if (!d.has_base() || d.models.size() > kHotModels || m.elect == Elect::count || m.out_type != d.base.type || d.f64())
    return false;
#ifdef FASTMERGE_AVX512
  const bool wide = has_avx512();
#else
  const bool wide = false;
#endif
  const TrimKind kind = m.trims[0].kind;
  if (!wide && (m.elect != Elect::sum || kind != TrimKind::rule)) return false;
  for (std::size_t k = 0; k < d.models.size(); ++k) {
    const Trim& t = m.trims[k];
    if (d.models[k].type != d.base.type || t.kind != kind) return false;
    if (t.kind == TrimKind::rule && t.high.key != kNoneKey) return false;
  }
  return true;
}

template <class T>
void run_hot(const Merge& m, std::int64_t begin, std::int64_t end) {
  const bool stream = m.n * m.out_size() >= kStreamBytes, bits = m.trims[0].kind != TrimKind::rule;
  T* out = pointer_of<T>(m.out);
  const std::size_t models = m.trims.size();
  alignas(64) T block[kBlock];
  alignas(64) std::uint64_t words[kHotModels][kBlock / 64 + 8];  // rounded up from kBitWords
  [[maybe_unused]] Trimmer<float> trimmer(m);
  Hot<T> h{};
  h.scale = static_cast<float>(m.scale);
  h.divisor = static_cast<float>(m.divisor);
  for (std::size_t k = 0; k < models; ++k) {
    h.coefficient[k] = static_cast<float>(m.trims[k].coefficient);
    h.weight[k] = static_cast<float>(m.trims[k].weight);
    h.keep[k] = words[k];
  }
  for (std::int64_t at = begin, stop; at < end; at = stop) {
    stop = m.cut(at, std::min(end, at + kBlock));
    h.base = pointer_of<T>(m.deltas.base.address) + at;
    for (std::size_t k = 0; k < models; ++k) {
      h.model[k] = pointer_of<T>(m.deltas.models[k].address) + at;
      if (!bits) h.bound[k] = bound_at<float>(m.trims[k].low, m.offset + at);
    }
#ifdef FASTMERGE_AVX512
    if (has_avx512()) {
      for (std::size_t k = 0; bits && k < models; ++k) trimmer.bits(k, at, stop - at, words[k]);
      h.out = out + at;
      run_wide(h, static_cast<int>(models), bits, m.elect, m.normalize, stop - at, stream);
      continue;
    }
#endif
    h.out = stream ? block : out + at;
    run_fused(h, models, m.normalize, stop - at);
    if (stream) stream_out(out + at, block, (stop - at) * static_cast<std::int64_t>(sizeof(T)));
  }
  if (stream) stream_fence();
}

template <class C>
void run_blocks(const Merge& m, std::int64_t begin, std::int64_t end) {
  const std::size_t models = m.trims.size();
  alignas(64) C base[kTermBlock], buffer[kTermBlock], vote[kTermBlock], total[kTermBlock], divisor[kTermBlock];
  std::vector<C> terms(models * kTermBlock);
  Trimmer<C> trimmer(m);
  for (std::int64_t at = begin, stop; at < end; at = stop) {
    stop = m.cut(at, std::min(end, at + kTermBlock));
    const std::int64_t n = stop - at;
    const C* b = m.deltas.origin(at, n, base);
    for (std::size_t k = 0; k < models; ++k) {
      const Trim& t = m.trims[k];
      C* u = terms.data() + k * kTermBlock;
      const C* d = m.deltas.values(k, b, at, n, buffer);
      const C c = static_cast<C>(t.coefficient);
      if (t.kind == TrimKind::rule) {
        const auto lo = bound_at<C>(t.low, m.offset + at);
        if (lo < 0 && t.high.key == kNoneKey) term_all(d, c, u, n);
        else term_rule(d, c, lo, bound_at<C>(t.high, m.offset + at), u, n);
      } else {
        term_mask(d, c, trimmer.keep(k, at, n), u, n);
      }
      if (m.elect == Elect::count) {
        count_votes(u, vote, k == 0, n);
      } else {
        if (k == 0) std::copy(u, u + n, vote);
        else add_block(vote, u, n);
      }
    }
    C* sum = vote;
    if (m.elect != Elect::none) {
      for (std::size_t k = 0; k < models; ++k)
        join(terms.data() + k * kTermBlock, vote, static_cast<C>(m.trims[k].weight), total, divisor, k == 0, n);
      sum = total;
    }
    if (m.normalize) {
      if (m.elect == Elect::none) divide_block(sum, static_cast<C>(m.divisor), n);
      else divide(sum, divisor, n);
    }
    if (m.scale != 1.0) scale_block(sum, static_cast<C>(m.scale), n);
    if (b) add_block(sum, b, n);
    store_block(m.out_type, m.out, at, n, sum);
  }
}

// By rank whole rows are needed at once: pieces are rows then.
template <class C>
void run(const Merge& m, int threads) {
  const bool hot = std::is_same_v<C, float> && is_hot(m);
  parallel_for(m.n, m.grain(), threads, [&](std::int64_t begin, std::int64_t end) {
    if (!hot) return run_blocks<C>(m, begin, end);
    dispatch(m.out_type, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (!std::is_same_v<T, double>) run_hot<T>(m, begin, end);
    });
  });
}

void consensus_merge(std::uintptr_t out, int out_type, std::uintptr_t base, int base_type,
                     const std::vector<std::uintptr_t>& models, const std::vector<int>& types, std::int64_t n,
                     const std::vector<TrimArguments>& trims, std::int64_t row, std::uint32_t k0, std::uint32_t k1,
                     int elect, bool normalize, double divisor, double scale, std::int64_t offset, int threads) {
  Merge m;
  m.deltas = make_deltas(base, base_type, models, types);
  m.out = out;
  m.out_type = static_cast<Dtype>(out_type);
  m.n = n;
  m.trims = make_trims(trims);
  m.row = row;
  m.k0 = k0;
  m.k1 = k1;
  m.elect = static_cast<Elect>(elect);
  m.normalize = normalize;
  m.divisor = divisor;
  m.scale = scale;
  m.offset = offset;
  m.deltas.f64() ? run<double>(m, threads) : run<float>(m, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("consensus_merge", &consensus_merge, NoGil()); }
}  // namespace fastmerge
