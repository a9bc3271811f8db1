// expert_scatter: x[index] += scale * value, or = scale * value, keeping the overwritten elements.
//
// Story: the cost is one cache line and often one page-table walk per touched element; everything else is small. A
// block of positions is prefetched while the one before is worked on: old elements are collected (they are the result),
// the new ones computed with SIMD, and written back to lines that are in L1 now. Positions are distinct, so blocks are
// free to run in parallel.
#include "common/block.h"
#include "common/export.h"
#include "common/parallel.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kGroup = 512;          // positions; their lines fit L1
constexpr std::int64_t kScatterGrain = 8192;  // positions: each is worth many streamed elements

template <class Index>
std::int64_t first_not_increasing(const Index* p, std::int64_t n) {
  for (std::int64_t begin = 0; begin + 1 < n; begin += 4096) {
    const std::int64_t end = std::min(n - 1, begin + 4096);
    bool wrong = false;
    for (std::int64_t i = begin; i < end; ++i) wrong |= p[i + 1] <= p[i];
    if (wrong) return begin;
  }
  return -1;
}

// False unless positions are strictly increasing within [0, size).
bool check_positions(std::uintptr_t index, bool wide, std::int64_t n, std::int64_t size) {
  if (n == 0) return true;
  const auto ok = [&](const auto* p) { return first_not_increasing(p, n) < 0 && p[0] >= 0 && p[n - 1] < size; };
  return wide ? ok(pointer<const std::int64_t>(index)) : ok(pointer<const std::int32_t>(index));
}

FM_SIMD void scale_terms(const float* v, float s, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = v[i] * s;
}
FM_SIMD void scale_terms(const double* v, double s, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = v[i] * s;
}

template <class Word, class Index>
void gather_old(const Word* x, const Index* at, std::int64_t n, std::int64_t ahead, Word* old) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (i < ahead) __builtin_prefetch(x + at[n + i], 1);
    old[i] = x[at[i]];
  }
}
template <class Word, class Index>
void put(Word* x, const Index* at, std::int64_t n, const Word* y) {
  for (std::int64_t i = 0; i < n; ++i) x[at[i]] = y[i];
}

template <class C, class Word, class Index>
void run(Word* x, Dtype x_type, const Index* at, std::uintptr_t value, Dtype value_type, Word* saved, std::int64_t n,
         double scale, bool add, int threads) {
  const bool copy = !add && scale == 1.0 && value_type == x_type;
  parallel_for(n, kScatterGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) C v[kGroup], y[kGroup], o[kGroup];
    alignas(64) Word rounded[kGroup];
    for (std::int64_t i = begin; i < end; i += kGroup) {
      const std::int64_t m = std::min(kGroup, end - i), ahead = std::min(m, end - i - m);
      gather_old(x, at + i, m, ahead, saved + i);
      if (copy) {
        put(x, at + i, m, reinterpret_cast<const Word*>(value) + i);
        continue;
      }
      scale_terms(load_block(value_type, value, i, m, v), static_cast<C>(scale), y, m);
      if (add) add_block(y, load_block(x_type, reinterpret_cast<std::uintptr_t>(saved), i, m, o), m);
      store_block(x_type, reinterpret_cast<std::uintptr_t>(rounded), 0, m, y);
      put(x, at + i, m, rounded);
    }
  });
}

template <class Word>
void by_index(std::uintptr_t x, Dtype x_type, std::uintptr_t index, bool wide, std::uintptr_t value, Dtype value_type,
              std::uintptr_t saved, std::int64_t n, double scale, bool add, int threads) {
  const bool f64 = x_type == Dtype::f64 || value_type == Dtype::f64;
  const auto go = [&](const auto* at) {
    f64 ? run<double>(pointer<Word>(x), x_type, at, value, value_type, pointer<Word>(saved), n, scale, add, threads)
        : run<float>(pointer<Word>(x), x_type, at, value, value_type, pointer<Word>(saved), n, scale, add, threads);
  };
  wide ? go(pointer<const std::int64_t>(index)) : go(pointer<const std::int32_t>(index));
}

void expert_scatter(std::uintptr_t x, int x_type, std::uintptr_t index, bool wide, std::uintptr_t value, int value_type,
                    std::uintptr_t saved, std::int64_t n, double scale, bool add, int threads) {
  const auto t = static_cast<Dtype>(x_type), v = static_cast<Dtype>(value_type);
  const auto go = size_of(t) == 8   ? by_index<std::uint64_t>
                  : size_of(t) == 4 ? by_index<std::uint32_t>
                                    : by_index<std::uint16_t>;
  go(x, t, index, wide, value, v, saved, n, scale, add, threads);
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("expert_scatter", &expert_scatter, NoGil());
  m.def("check_positions", &check_positions, NoGil());
}
}  // namespace fastmerge
