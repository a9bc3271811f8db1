// A tile's results into the output.
#pragma once
#include "block.h"
#include "stream.h"

namespace fastmerge {

// n <= kBlock values into elements [at, at + n) of an output of type t, rounded. With `stream` they go past the cache,
// and stream_fence() is due after a thread's last tile.
template <class C>
inline void put_block(Dtype t, std::uintptr_t out, std::int64_t at, std::int64_t n, const C* x, bool stream) {
  if (!stream) return store_block(t, out, at, n, x);
  alignas(64) unsigned char rounded[kBlock * sizeof(double)];
  store_block(t, reinterpret_cast<std::uintptr_t>(rounded), 0, n, x);
  stream_out(reinterpret_cast<unsigned char*>(out) + at * size_of(t), rounded, n * size_of(t));
}

}  // namespace fastmerge
