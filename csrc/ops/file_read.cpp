// Pieces of files into memory: all inputs of a chunk, or many short spans of one file, in one call without the
// interpreter lock. A merge reads thousands of them, and asking for each from Python costs more than a short one takes.
#include <tuple>

#include "common/export.h"
#include "common/file_read.h"

namespace fastmerge {
namespace {

constexpr std::size_t kSpansAhead = 256;  // spans asked for before the first of them is read

using Place = std::tuple<int, std::int64_t, std::int64_t>;  // file, position, bytes

// {index, code} of the first piece that could not be read whole (code as of read_file), or {-1, 0}.
std::pair<std::int64_t, int> read_pieces(const std::vector<Place>& places,
                                         const std::vector<std::uintptr_t>& addresses) {
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto& [fd, position, size] = places[i];
    if (const int code = read_file(fd, position, size, pointer(addresses[i])))
      return {static_cast<std::int64_t>(i), code};
  }
  return {-1, 0};
}

// Spans of `size` bytes at each position, one after the other from `address` on.
std::pair<std::int64_t, int> read_spans(int fd, const std::vector<std::int64_t>& positions, std::int64_t size,
                                        std::uintptr_t address) {
  auto* to = pointer<char>(address);
  for (std::size_t first = 0; first < positions.size(); first += kSpansAhead) {
    const std::size_t stop = std::min(positions.size(), first + kSpansAhead);
#ifdef POSIX_FADV_WILLNEED
    for (std::size_t i = first; i < stop; ++i) posix_fadvise(fd, positions[i], size, POSIX_FADV_WILLNEED);
#endif
    for (std::size_t i = first; i < stop; ++i, to += size)
      if (const int code = read_whole(fd, positions[i], size, to)) return {static_cast<std::int64_t>(i), code};
  }
  return {-1, 0};
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("read_pieces", &read_pieces, NoGil());
  m.def("read_spans", &read_spans, NoGil());
}
}  // namespace fastmerge
