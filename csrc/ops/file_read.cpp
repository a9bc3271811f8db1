// Pieces of files into memory: all inputs of a chunk, or many short spans of one file, in one call without the
// interpreter lock. A merge reads thousands of them, and asking for each from Python costs more than a short one takes.
// NaN and Inf are counted on the way, while what was read is still in the core's own cache.
#include <tuple>

#include "common/export.h"
#include "common/file_read.h"
#include "common/nonfinite.h"

namespace fastmerge {
namespace {

constexpr std::int64_t kCounted = 256 << 10;  // bytes that are read before they are looked at
constexpr std::size_t kSpansAhead = 256;      // spans asked for before the first of them is read

using Place = std::tuple<int, std::int64_t, std::int64_t>;  // file, position, bytes

struct Found {
  std::int64_t failed = -1;  // the first piece that could not be read whole
  int code = 0;              // why, as of read_file
  std::vector<std::int64_t> nonfinite;
};

// types: of elements to look at, or -1 not to.
Found read_pieces(const std::vector<Place>& places, const std::vector<std::uintptr_t>& addresses,
                  const std::vector<int>& types) {
  Found found;
  found.nonfinite.resize(places.size());
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto& [fd, position, size] = places[i];
    const std::int64_t step = types[i] < 0 ? size : kCounted;
    for (std::int64_t at = 0; at < size; at += step) {
      const std::int64_t n = std::min(step, size - at);
      if (const int code = read_file(fd, position + at, n, pointer<char>(addresses[i]) + at)) {
        found.failed = static_cast<std::int64_t>(i);
        found.code = code;
        return found;
      }
      if (types[i] >= 0)
        found.nonfinite[i] += count_nonfinite(addresses[i] + at, types[i], n / size_of(static_cast<Dtype>(types[i])));
    }
  }
  return found;
}

// Spans of `size` bytes at each position, one after the other from `address` on; {index, code} of the first that could
// not be read, or {-1, 0}.
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
  m.def("read_pieces", [](const std::vector<Place>& places, const std::vector<std::uintptr_t>& addresses,
                          const std::vector<int>& types) {
    Found found;
    {
      py::gil_scoped_release free;
      found = read_pieces(places, addresses, types);
    }
    return py::make_tuple(found.failed, found.code, std::move(found.nonfinite));
  });
  m.def("read_spans", &read_spans, NoGil());
}
}  // namespace fastmerge
