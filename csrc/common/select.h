// The r-th largest of keys in memory: what is left of a selection once a bracket has been collected.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "tally.h"

namespace fastmerge {

// Memory of finished selections, kept for the next one: first touch of fresh pages costs more than what is written
// there.
class Spares {
 public:
  // At least `bytes` (updated to what it is).
  void* take(std::int64_t& bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = held_.end();
      for (auto i = held_.begin(); i != held_.end(); ++i)
        if (i->second >= bytes && i->second <= 4 * bytes && (best == held_.end() || i->second < best->second)) best = i;
      if (best != held_.end()) {
        void* memory = best->first;
        bytes = best->second;
        total_ -= bytes;
        held_.erase(best);
        return memory;
      }
    }
    void* memory = std::malloc(static_cast<std::size_t>(bytes));
    if (!memory) throw std::bad_alloc();
    return memory;
  }
  void give(void* memory, std::int64_t bytes) {
    if (memory && bytes >= kLeast) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (total_ + bytes <= kMost) {
        held_.emplace_back(memory, bytes);
        total_ += bytes;
        return;
      }
    }
    std::free(memory);
  }

 private:
  static constexpr std::int64_t kLeast = 64 << 10, kMost = 32 << 20;
  std::mutex mutex_;
  std::vector<std::pair<void*, std::int64_t>> held_;
  std::int64_t total_ = 0;
};
inline Spares& spares() {
  static Spares* all = new Spares;  // never destroyed: threads may outlive static objects
  return *all;
}

// A growing array that leaves new elements unwritten, so that memory is touched only where entries land.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Buffer() { spares().give(data_, bytes_); }
  void reserve(std::int64_t n) {
    constexpr std::int64_t kItem = sizeof(T);
    if (n * kItem <= bytes_) return;
    std::int64_t bytes = std::max(n * kItem, bytes_ + bytes_ / 2);
    T* grown = static_cast<T*>(spares().take(bytes));
    if (data_) std::memcpy(grown, data_, static_cast<std::size_t>(bytes_));
    spares().give(std::exchange(data_, grown), std::exchange(bytes_, bytes));
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

// Ascending, by radix: a sample's ranks without a branch that can be mispredicted.
template <class K>
void sort_keys(std::vector<K>& keys) {
  constexpr int kBits = 11, kBuckets = 1 << kBits, kPasses = (8 * sizeof(K) - 1 + kBits - 1) / kBits;
  std::vector<K> other(keys.size());
  std::vector<std::uint32_t> count(static_cast<std::size_t>(kPasses) * kBuckets, 0);
  for (const K v : keys)
    for (int p = 0; p < kPasses; ++p) ++count[p * kBuckets + ((v >> (p * kBits)) & (kBuckets - 1))];
  for (int p = 0; p < kPasses; ++p) {
    std::uint32_t* c = count.data() + p * kBuckets;
    std::uint32_t sum = 0;
    for (int v = 0; v < kBuckets; ++v) {
      const std::uint32_t here = c[v];
      c[v] = sum;
      sum += here;
    }
    for (const K v : keys) other[c[(v >> (p * kBits)) & (kBuckets - 1)]++] = v;
    keys.swap(other);
  }
}

template <class K>
struct KeyPiece {
  const K* key;
  std::int64_t n;
};

// A bracket [lo, hi] for the rank `r` (0 = largest) of a sample, `reach` ranks to either side; reorders the sample.
template <class K>
void bracket_ranks(K* sample, std::int64_t s, std::int64_t r, std::int64_t reach, K top, K* lo, K* hi) {
  const std::int64_t up = r - reach, down = r + reach;
  *hi = top;
  *lo = 0;
  std::int64_t from = 0;
  if (up >= 0 && up < s) {
    std::nth_element(sample, sample + up, sample + s, std::greater<K>());
    *hi = sample[up];
    from = up;
  }
  if (down < s) {
    std::nth_element(sample + from, sample + down, sample + s, std::greater<K>());
    *lo = sample[down];
  }
}

// The r-th largest (0 = largest) over pieces. Expected time: one pass over them (Floyd, Rivest 1975).
template <class K>
K select_largest(const std::vector<KeyPiece<K>>& pieces, std::int64_t r) {
  std::int64_t n = 0;
  for (const auto& p : pieces) n += p.n;
  Buffer<K> inside;
  if (n > 1024) {
    const std::int64_t step = std::max<std::int64_t>(8, static_cast<std::int64_t>(std::cbrt(static_cast<double>(n))));
    std::vector<K> sample;
    for (const auto& p : pieces)
      for (std::int64_t i = 0; i < p.n; i += step) sample.push_back(p.key[i]);
    const auto s = static_cast<std::int64_t>(sample.size());
    const double q = static_cast<double>(r) / static_cast<double>(n);
    const auto reach = static_cast<std::int64_t>(4.0 * std::sqrt(s * q * (1.0 - q))) + 4;
    K lo, hi;
    bracket_ranks(sample.data(), s, static_cast<std::int64_t>(q * s), reach, static_cast<K>(static_cast<K>(-1) >> 1),
                  &lo, &hi);
    Buffer<std::uint32_t> where;
    std::int64_t above = 0, count = 0;
    for (const auto& p : pieces)
      for (std::int64_t at = 0; at < p.n; at += 2048) {
        const std::int64_t m = std::min<std::int64_t>(2048, p.n - at);
        inside.reserve(count + m + kSlack);
        where.reserve(m + kSlack);
        count +=
            collect(p.key + at, m, lo, static_cast<K>(hi - lo + 1), 0, inside.data() + count, where.data(), hi, above);
      }
    if (r >= above && r < above + count) {
      if (lo == hi) return lo;
      if (count < n) {
        const std::vector<KeyPiece<K>> rest{{inside.data(), count}};
        return select_largest(rest, r - above);
      }
    }
  }
  std::vector<K> all;
  all.reserve(n);
  for (const auto& p : pieces) all.insert(all.end(), p.key, p.key + p.n);
  std::nth_element(all.begin(), all.begin() + r, all.end(), std::greater<K>());
  return all[r];
}

}  // namespace fastmerge
