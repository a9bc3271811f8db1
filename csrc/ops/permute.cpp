// permute: out[i, j, ...] = x[perm0[i], perm1[j], ...], in place too; and the check that an index is a permutation.
//
// Story: a copy with another order of rows runs at copy speed when rows are long; permuted columns are picked out of
// several rows at once (common/tiles.h), collected in an L1 buffer and streamed out. In place, a slice moves along its
// cycle through one buffer; permuted columns need one row of workspace.
#include "common/export.h"
#include "common/gather.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kBuffer = 16 * 1024;  // bytes of a slice moved at a time, in place
constexpr std::int64_t kSlab = 4 << 20;      // bytes: a smaller slab is permuted through a copy of itself

// `stream`: the result is part of more than a cache holds, write it past the caches.
void permute(std::uintptr_t out, std::uintptr_t in, std::int64_t element, std::int64_t n, const Axes& axes, bool stream,
             int threads) {
  auto* to = pointer<unsigned char>(out);
  gather_all(Gather(axes, element), in, element, n, threads,
             [&](std::int64_t at, const void* source, std::int64_t m, std::int64_t) {
               if (stream) stream_out(to + at * element, source, m * element);
               else std::memcpy(to + at * element, source, m * element);
             });
}

// One axis of [outer, n, inner] in place; `inner` counts bytes.
void permute_axis(std::uintptr_t address, std::int64_t outer, std::int64_t n, std::int64_t inner, std::uintptr_t index,
                  int threads) {
  auto* x = pointer<unsigned char>(address);
  const auto* from = pointer<const std::int64_t>(index);
  const std::int64_t slab = n * inner;
  if (slab <= kSlab) {
    parallel_blocks(outer, threads, [&](std::int64_t o) {
      unsigned char* row = x + o * slab;
      const std::vector<unsigned char> copy(row, row + slab);
      switch (inner) {
        case 2:
          for (std::int64_t i = 0; i < n; ++i) std::memcpy(row + i * 2, copy.data() + from[i] * 2, 2);
          break;
        case 4:
          for (std::int64_t i = 0; i < n; ++i) std::memcpy(row + i * 4, copy.data() + from[i] * 4, 4);
          break;
        case 8:
          for (std::int64_t i = 0; i < n; ++i) std::memcpy(row + i * 8, copy.data() + from[i] * 8, 8);
          break;
        default:
          for (std::int64_t i = 0; i < n; ++i) std::memcpy(row + i * inner, copy.data() + from[i] * inner, inner);
      }
    });
    return;
  }
  // Cycles: one start per cycle, found once; each worker moves its own range of bytes of every slice.
  std::vector<std::int64_t> starts;
  std::vector<bool> seen(n, false);
  for (std::int64_t i = 0; i < n; ++i) {
    if (seen[i] || from[i] == i) continue;
    starts.push_back(i);
    for (std::int64_t j = i; !seen[j]; j = from[j]) seen[j] = true;
  }
  const std::int64_t pieces = ceil_div(inner, kBuffer);
  parallel_blocks(outer * pieces, threads, [&](std::int64_t task) {
    alignas(64) unsigned char first[kBuffer];
    const std::int64_t c = task % pieces * kBuffer, m = std::min(kBuffer, inner - c);
    unsigned char* base = x + task / pieces * slab + c;
    for (const std::int64_t start : starts) {
      std::memcpy(first, base + start * inner, m);
      std::int64_t i = start;
      for (; from[i] != start; i = from[i]) std::memcpy(base + i * inner, base + from[i] * inner, m);
      std::memcpy(base + i * inner, first, m);
    }
  });
}

// The first entry of `index` that is out of range or repeats an earlier one; -1 when it is a permutation.
std::int64_t check_permutation(std::uintptr_t index, std::int64_t n) {
  const auto* p = pointer<const std::int64_t>(index);
  std::vector<bool> seen(n, false);
  for (std::int64_t i = 0; i < n; ++i) {
    if (p[i] < 0 || p[i] >= n || seen[p[i]]) return i;
    seen[p[i]] = true;
  }
  return -1;
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("permute", &permute, NoGil());
  m.def("permute_axis", &permute_axis, NoGil());
  m.def("check_permutation", &check_permutation, NoGil());
}
}  // namespace fastmerge
