// random_mask: keep each element with a probability, the same for all or by its rank within the row.
//
// Story: the draws are counter-based (common/philox.h), so any piece of the mask is computed on its own, one Philox
// call for eight elements. By rank (DELLA), a row's keys are sorted once by radix and each element gets the limit of
// its rank.
#include "common/export.h"
#include "common/keys.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/rank.h"
#include "common/stream.h"

namespace fastmerge {
namespace {

void random_mask(std::uintptr_t out, std::int64_t n, std::uint64_t limit, std::uint32_t k0, std::uint32_t k1,
                 std::uint32_t stream, std::int64_t offset, int threads) {
  std::uint8_t* to = pointer<std::uint8_t>(out);
  const DrawKey key{k0, k1, stream};
#ifdef FASTMERGE_AVX512
  const bool wide = has_avx512(), past = n >= kStreamBytes && out % 64 == 0;
#endif
  parallel_for(n, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
#ifdef FASTMERGE_AVX512
    for (; wide && begin + kDraws <= end; begin += kDraws) {
      std::uint64_t bits[kBitWords];
      random_bits(key, offset + begin, kDraws, limit, bits);
      detail::bytes_of_bits(bits, kDraws / 64, to + begin, past);
    }
    if (past) stream_fence();
#endif
    for (std::int64_t at = begin; at < end; at += kDraws)
      random_keep(key, offset + at, std::min(kDraws, end - at), limit, to + at);
  });
}

void rank_mask(std::uintptr_t out, std::uintptr_t x, int type, std::int64_t rows, std::int64_t length,
               std::uint64_t first, std::uint64_t span, std::uint64_t divisor, std::uint32_t k0, std::uint32_t k1,
               std::uint32_t stream, std::int64_t offset, int threads) {
  const Deltas d = make_deltas(0, 0, {x}, {type});
  std::uint8_t* to = pointer<std::uint8_t>(out);
  const DrawKey key{k0, k1, stream};
  const RankLimits limits{first, span, divisor};
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    parallel_for(rows, std::max<std::int64_t>(1, kGrain / length), threads, [&](std::int64_t begin, std::int64_t end) {
      Ranker<C> ranker(length);
      for (std::int64_t r = begin; r < end; ++r)
        ranker.keep(d, 0, r * length, limits, key, offset + r * length, to + r * length);
    });
  };
  d.f64() ? run(double{}) : run(float{});
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("random_mask", &random_mask, NoGil());
  m.def("rank_mask", &rank_mask, NoGil());
}
}  // namespace fastmerge
