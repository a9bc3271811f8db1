// delta_l1: per model the L1 norms of its delta and of the trimmed delta, as sums over fixed blocks.
//
// Story: the sums must not depend on threads, chunks or workers. A block is 65536 elements at a multiple of 65536 of
// the whole tensor's flat index; within it 16 lanes add their elements in order in float64, the lanes are added in
// order, and the caller adds the blocks in order. One block is one piece of work, so nothing is ever combined across
// threads here.
#include "common/consensus.h"
#include "common/export.h"
#include "common/wide.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kSumBlock = 65536, kLanes = 16;

FM_SIMD void add_lanes(const float* d, const std::uint8_t* keep, double* whole, double* kept, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes)
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const double v = float_of(raw_key(d[i + j]));
      whole[j] += v;
      kept[j] += keep[i + j] ? v : 0.0;
    }
}
FM_SIMD void add_lanes(const double* d, const std::uint8_t* keep, double* whole, double* kept, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes)
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const double v = d[i + j] < 0 ? -d[i + j] : d[i + j];
      whole[j] += v;
      kept[j] += keep[i + j] ? v : 0.0;
    }
}
FM_SIMD void keep_rule(const float* d, std::int32_t lo, std::int32_t hi, std::uint8_t* keep, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<std::int32_t>(raw_key(d[i]));
    keep[i] = (key > lo) & (key <= hi);
  }
}
FM_SIMD void keep_rule(const double* d, std::int64_t lo, std::int64_t hi, std::uint8_t* keep, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<std::int64_t>(raw_key(d[i]));
    keep[i] = (key > lo) & (key <= hi);
  }
}

#ifdef FASTMERGE_AVX512
// add_lanes with a bit per element: what is left out would add +0 to a sum that is never -0.
FM_AVX512 void add_lanes_wide(const float* d, const std::uint64_t* keep, double* whole, double* kept, std::int64_t n) {
  __m512d w0 = _mm512_loadu_pd(whole), w1 = _mm512_loadu_pd(whole + 8);
  __m512d k0 = _mm512_loadu_pd(kept), k1 = _mm512_loadu_pd(kept + 8);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const __m512 v = _mm512_abs_ps(_mm512_loadu_ps(d + i));
    const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    const auto mask = static_cast<__mmask16>(keep[i >> 6] >> (i & 63));
    w0 = _mm512_add_pd(w0, lo);
    w1 = _mm512_add_pd(w1, hi);
    k0 = _mm512_mask_add_pd(k0, static_cast<__mmask8>(mask), k0, lo);
    k1 = _mm512_mask_add_pd(k1, static_cast<__mmask8>(mask >> 8), k1, hi);
  }
  _mm512_storeu_pd(whole, w0);
  _mm512_storeu_pd(whole + 8, w1);
  _mm512_storeu_pd(kept, k0);
  _mm512_storeu_pd(kept + 8, k1);
}
#endif

#ifdef FASTMERGE_AVX512
// A random trim's bits of [at, at + n), which may lie in several rows.
void keep_words(const Merge& m, Trimmer<float>& trimmer, std::size_t k, std::int64_t at, std::int64_t n,
                std::uint64_t* words) {
  if (m.cut(at, at + n) == at + n) return trimmer.bits(k, at, n, words);
  alignas(64) std::uint8_t keep[kTermBlock + 64];
  for (std::int64_t i = at, stop; i < at + n; i = stop) {
    stop = m.cut(i, at + n);
    std::memcpy(keep + (i - at), trimmer.keep(k, i, stop - i), static_cast<std::size_t>(stop - i));
  }
  for (std::int64_t i = 0; i < n; i += 64) words[i / 64] = detail::bits_of_bytes(keep + i);
}
#endif

// The keep bytes of a rule on [at, at + n), d being the deltas there.
template <class C>
void rule_bytes(const Merge& m, const Trim& t, const C* d, std::int64_t at, std::int64_t n, std::uint8_t* keep) {
  for (std::int64_t i = at, stop; i < at + n; i = stop) {
    stop = fastmerge::cut(t.high, m.offset + i, fastmerge::cut(t.low, m.offset + i, m.offset + at + n)) - m.offset;
    keep_rule(d + (i - at), bound_at<C>(t.low, m.offset + i), bound_at<C>(t.high, m.offset + i), keep + (i - at),
              stop - i);
  }
}

// Sums of [begin, end), at most one block; out[k] = {whole, kept}. Pieces of kTermBlock start at multiples of it, so
// lanes keep their places; a piece that ends early is filled up with zeros.
template <class C>
void sum_block(const Merge& m, Trimmer<C>& trimmer, std::int64_t begin, std::int64_t end, double* out) {
  alignas(64) C base[kTermBlock], buffer[kTermBlock + kLanes];
  alignas(64) std::uint8_t keep[kTermBlock + 64];
  const std::size_t models = m.trims.size();
  std::vector<double> lanes(2 * kLanes * models, 0.0);
  for (std::int64_t at = begin; at < end; at += kTermBlock) {
    const std::int64_t n = std::min(kTermBlock, end - at), full = ceil_div(n, kLanes) * kLanes;
    const C* b = m.deltas.origin(at, n, base);
    for (std::size_t k = 0; k < models; ++k) {
      const Trim& t = m.trims[k];
      double *whole = lanes.data() + 2 * kLanes * k, *kept = whole + kLanes;
      const C* d = m.deltas.values(k, b, at, n, buffer);
      if (full != n) {
        if (d != buffer) std::copy(d, d + n, buffer);
        std::fill(buffer + n, buffer + full, C{0});
        d = buffer;
      }
#ifdef FASTMERGE_AVX512
      if constexpr (std::is_same_v<C, float>) {
        if (has_avx512()) {
          std::uint64_t words[kTermBlock / 64 + 8];
          if (t.kind == TrimKind::rule) {
            rule_bytes(m, t, d, at, n, keep);
            for (std::int64_t i = 0; i < n; i += 64) words[i / 64] = detail::bits_of_bytes(keep + i);
          } else {
            keep_words(m, trimmer, k, at, n, words);
          }
          add_lanes_wide(d, words, whole, kept, full);
          continue;
        }
      }
#endif
      if (t.kind == TrimKind::rule) rule_bytes(m, t, d, at, n, keep);
      else
        for (std::int64_t i = at, stop; i < at + n; i = stop) {
          stop = m.cut(i, at + n);
          std::memcpy(keep + (i - at), trimmer.keep(k, i, stop - i), static_cast<std::size_t>(stop - i));
        }
      std::fill(keep + n, keep + full, std::uint8_t{0});
      add_lanes(d, keep, whole, kept, full);
    }
  }
  for (std::size_t k = 0; k < 2 * models; ++k) {
    out[k] = 0;
    for (std::int64_t j = 0; j < kLanes; ++j) out[k] += lanes[k * kLanes + j];
  }
}

// out: double [blocks][models][2]. `offset` is a multiple of 65536.
void delta_l1(std::uintptr_t out, std::uintptr_t base, int base_type, const std::vector<std::uintptr_t>& models,
              const std::vector<int>& types, std::int64_t n, const std::vector<TrimArguments>& trims, std::int64_t row,
              std::uint32_t k0, std::uint32_t k1, std::int64_t offset, int threads) {
  if (offset % kSumBlock) throw std::invalid_argument("delta_l1: the offset is not a multiple of 65536");
  Merge m;
  m.deltas = make_deltas(base, base_type, models, types);
  m.n = n;
  m.trims = make_trims(trims);
  m.row = row;
  m.k0 = k0;
  m.k1 = k1;
  m.offset = offset;
  double* sums = pointer_of<double>(out);
  const std::int64_t blocks = ceil_div(n, kSumBlock), each = 2 * static_cast<std::int64_t>(trims.size());
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    // A row that two blocks share is ranked for each: neighbouring blocks go to one thread, which remembers its last
    // row.
    const std::int64_t team = std::min<std::int64_t>(std::max(threads, 1), std::max<std::int64_t>(blocks, 1));
    parallel_blocks(team, threads, [&](std::int64_t t) {
      Trimmer<C> trimmer(m);
      for (std::int64_t b = blocks * t / team; b < blocks * (t + 1) / team; ++b)
        sum_block<C>(m, trimmer, b * kSumBlock, std::min(n, (b + 1) * kSumBlock), sums + b * each);
    });
  };
  m.deltas.f64() ? run(double{}) : run(float{});
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("delta_l1", &delta_l1, NoGil()); }
}  // namespace fastmerge
