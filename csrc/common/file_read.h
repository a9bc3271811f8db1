// Positional reads of whole pieces. What is in the page cache is copied at once; what is not is asked for well ahead,
// so that a thread waits for the disk once in kAhead bytes, and pays nothing for asking where everything is cached.
#pragma once
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace fastmerge {

constexpr std::int64_t kAhead = 8 << 20;  // bytes

// Fills `to` with `bytes` bytes from `position` of a file; 0, an errno, or -1 when the file ends before.
inline int read_whole(int fd, std::int64_t position, std::int64_t bytes, void* to) {
  auto* out = static_cast<char*>(to);
  for (std::int64_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd, out + done, bytes - done, position + done);
    if (got == 0) return -1;
    if (got < 0 && errno != EINTR) return errno;
    if (got > 0) done += got;
  }
  return 0;
}

// The same for a piece of a file that is read from front to back.
inline int read_file(int fd, std::int64_t position, std::int64_t bytes, void* to) {
  auto* out = static_cast<char*>(to);
  std::int64_t done = 0;
#if defined(RWF_NOWAIT) && defined(POSIX_FADV_WILLNEED)
  while (done < bytes) {
    const iovec rest{out + done, static_cast<std::size_t>(bytes - done)};
    const ssize_t got = preadv2(fd, &rest, 1, position + done, RWF_NOWAIT);
    if (got <= 0) break;  // not cached, or a kernel or file system that can not tell: the loop below finds out
    done += got;
  }
  if (done < bytes) posix_fadvise(fd, position + done, kAhead, POSIX_FADV_WILLNEED);
#endif
  return read_whole(fd, position + done, bytes - done, out + done);
}

}  // namespace fastmerge
