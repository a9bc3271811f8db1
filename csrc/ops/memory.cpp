// Huge pages for large new arrays: the first touch of 4 KiB pages runs at a fraction of the memory's bandwidth.
#include "common/export.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmerge {
namespace {

// Asks for huge pages on the whole 2 MiB pages within [address, address + bytes); a kernel that has none says no.
void advise_huge(std::uintptr_t address, std::uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (address + kPage - 1) & ~(kPage - 1), end = (address + bytes) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

}  // namespace

FASTMERGE_EXPORT(m) { m.def("advise_huge", &advise_huge); }
}  // namespace fastmerge
