// Ranks by magnitude within a row, turned into keep decisions (DELLA).
//
// What is wanted of an element is not its rank but whether its draw is below the limit of its rank, and the first 16
// bits of the draw with a rough rank settle that for nearly all of them. So a row is not sorted: its keys are counted
// in up to 1024 buckets that grow with the key, which bounds each rank from both sides, and where the draw lies between
// the limits of the two bounds, or on one, the exact rank is counted for that element alone. Rows of a few equal values
// or wild distributions, where that happens often, are sorted by radix. Buckets decide the work, never the result.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "keys.h"
#include "philox.h"

namespace fastmerge {

// The element of rank r (0 = smallest) is kept when its draw is below first + floor(r * span / divisor), all below
// 2^32.
struct RankLimits {
  std::uint64_t first, span, divisor;

  std::uint32_t of(std::uint64_t rank) const { return static_cast<std::uint32_t>(first + rank * span / divisor); }
};

namespace detail {
constexpr int kRankBuckets = 1024;  // at most

// 0 for a zero, else 1 + floor(|x| scale) up to buckets - 1: never falls while |x| grows.
FM_SIMD inline void rank_buckets(const std::uint32_t* key, float scale, std::uint16_t* bucket, int buckets,
                                 std::int64_t n) {
  const float last = static_cast<float>(buckets - 2);
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = float_of(key[i]) * scale, held = x < last ? x : last;  // NaN too goes last
    const std::int32_t b = static_cast<std::int32_t>(held) + 1;
    bucket[i] = static_cast<std::uint16_t>(key[i] == 0 ? 0 : b);
  }
}
FM_SIMD inline void rank_buckets(const std::uint64_t* key, float scale, std::uint16_t* bucket, int buckets,
                                 std::int64_t n) {
  const float last = static_cast<float>(buckets - 2);
  for (std::int64_t i = 0; i < n; ++i) {
    double wide;
    std::memcpy(&wide, &key[i], 8);
    const float x = static_cast<float>(wide) * scale, held = x < last ? x : last;
    bucket[i] = static_cast<std::uint16_t>(key[i] == 0 ? 0 : static_cast<std::int32_t>(held) + 1);
  }
}

FM_SIMD inline std::int64_t count_below_plain(const std::uint32_t* key, std::int64_t n, std::uint32_t k) {
  std::int32_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) found += key[i] < k;
  return found;
}
#ifdef FASTMERGE_AVX512
// n a multiple of 64.
FM_AVX512 inline std::int64_t count_below_wide(const std::uint32_t* key, std::int64_t n, std::uint32_t k) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(k));
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < n; i += 64) {
    std::uint64_t bits = 0;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      bits |= static_cast<std::uint64_t>(_mm512_cmplt_epu32_mask(_mm512_loadu_si512(key + i + 16 * j), limit))
              << 16 * j;
    found += __builtin_popcountll(bits);
  }
  return found;
}
#endif
inline std::int64_t count_below(const std::uint32_t* key, std::int64_t n, std::uint32_t k) {
#ifdef FASTMERGE_AVX512
  const std::int64_t whole = has_avx512() ? n / 64 * 64 : 0;
  return (whole ? count_below_wide(key, whole, k) : 0) + count_below_plain(key + whole, n - whole, k);
#else
  return count_below_plain(key, n, k);
#endif
}
FM_SIMD inline std::int64_t count_below(const std::uint64_t* key, std::int64_t n, std::uint64_t k) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) found += static_cast<std::int64_t>(key[i]) < static_cast<std::int64_t>(k);
  return found;
}
FM_SIMD inline std::int64_t count_same(const std::uint32_t* key, std::int64_t n, std::uint32_t k) {
  std::int32_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) found += key[i] == k;
  return found;
}
FM_SIMD inline std::int64_t count_same(const std::uint64_t* key, std::int64_t n, std::uint64_t k) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) found += key[i] == k;
  return found;
}

// Per bucket of elements of ranks [start[b], start[b + 1]): a first digit below `surely` is kept, one above `perhaps`
// is not. Slightly wide, so that float32 serves.
FM_SIMD inline void rank_bounds(const std::int32_t* start, float first, float step, std::uint32_t* bounds,
                                std::int64_t n) {
  for (std::int64_t b = 0; b < n; ++b) {
    const float low = first + static_cast<float>(start[b]) * step - 0.05f;
    const float high = first + static_cast<float>(start[b + 1]) * step + 0.05f;
    const std::int32_t surely = static_cast<std::int32_t>(low < 0.0f ? 0.0f : low);
    const std::int32_t perhaps = static_cast<std::int32_t>(high < 65535.0f ? high : 65535.0f);
    bounds[b] = static_cast<std::uint32_t>(surely) | static_cast<std::uint32_t>(perhaps) << 16;
  }
}
}  // namespace detail

template <class C>
class Ranker {
  using K = Key<C>;
  struct Entry {
    K key;
    std::uint32_t index;
  };
  struct Open {  // an element whose rank matters
    std::uint32_t index;
    std::uint16_t digit;
  };

  static constexpr std::int64_t kScan = 128;   // elements of a row that needs no buckets
  static constexpr std::int64_t kExact = 128;  // elements ranked one by one before the row is sorted
  static constexpr std::int64_t kZeros = 64;   // elements of a block of the count of zeros

 public:
  explicit Ranker(std::int64_t length)
      : length_(length), key_(length), bucket_(length), open_(length + 1), start_(detail::kRankBuckets + 1) {}

  // keep[0, length) for the row of model k that starts at `at`; `position` is its flat index within the whole tensor.
  void keep(const Deltas& d, std::size_t k, std::int64_t at, const RankLimits& limits, DrawKey draws,
            std::int64_t position, std::uint8_t* keep) {
    load(d, k, at);
    tabulate(limits);
    std::int64_t open = 0;
    for (std::int64_t i = 0; i < length_; i += kDraws) {
      std::uint16_t digits[kDraws + 16];
      const std::int64_t m = std::min(kDraws, length_ - i), call = (position + i) / 8, skip = position + i - call * 8;
      detail::philox_digits(draws, static_cast<std::uint64_t>(call), 0, digits, (skip + m + 7) / 8);
      open += decide(digits + skip, i, m, keep, open_.data() + open);
    }
    settle(open, limits, draws, position, keep);
  }

 private:
  void load(const Deltas& d, std::size_t k, std::int64_t at) {
    for (std::int64_t i = 0; i < length_; i += kBlock) {
      C base[kBlock];
      const std::int64_t m = std::min(kBlock, length_ - i);
      d.keys<C>(k, d.origin(at + i, m, base), at + i, m, key_.data() + i);
      detail::canonical(key_.data() + i, m);
    }
  }

  // Buckets that hold about as many elements each as a smooth distribution allows, from a sample's upper quartile on.
  float scale(int buckets) const {
    constexpr int kSample = 64;
    K sample[kSample];
    for (int s = 0; s < kSample; ++s) sample[s] = key_[length_ * s / kSample];
    std::nth_element(sample, sample + kSample * 3 / 4, sample + kSample);
    K key = sample[kSample * 3 / 4];
    if (key == 0) key = *std::max_element(sample, sample + kSample);
    if (key == 0) key = *std::max_element(key_.begin(), key_.end());
    C quartile;
    std::memcpy(&quartile, &key, sizeof(C));
    const float wanted = static_cast<float>(buckets - 2) / (4.5f * static_cast<float>(quartile));
    return wanted < 1e38f ? wanted : 1e38f;  // of 0 and of NaN too
  }

  void tabulate(const RankLimits& limits) {
    int buckets = 1;
    start_[0] = 0;
    if (length_ <= kScan) {
      std::fill(bucket_.begin(), bucket_.end(), std::uint16_t{0});
      start_[1] = static_cast<std::int32_t>(length_);
    } else {
      // Fewer for short rows: each costs as much as half an element.
      for (buckets = 64; buckets < detail::kRankBuckets && 4 * buckets < length_;) buckets *= 2;
      detail::rank_buckets(key_.data(), scale(buckets), bucket_.data(), buckets, length_);
      // Four counters for each, or equal neighbours would wait for one another.
      std::int32_t count[4 * detail::kRankBuckets];
      std::fill(count, count + 4 * buckets, 0);
      std::int64_t i = 0;
      for (; i + 4 <= length_; i += 4)
        for (int j = 0; j < 4; ++j) ++count[j * buckets + bucket_[i + j]];
      for (; i < length_; ++i) ++count[bucket_[i]];
      std::int32_t sum = 0;
      for (int b = 0; b < buckets; ++b)
        start_[b + 1] = sum += count[b] + count[b + buckets] + count[b + 2 * buckets] + count[b + 3 * buckets];
    }
    const double step = static_cast<double>(limits.span) / static_cast<double>(limits.divisor) / 65536.0;
    detail::rank_bounds(start_.data(), static_cast<float>(limits.first) / 65536.0f, static_cast<float>(step), bounds_,
                        buckets);
  }

  // keep[i + j] where the first digit settles it; returns how many it does not.
  std::int64_t decide(const std::uint16_t* digit, std::int64_t i, std::int64_t m, std::uint8_t* keep,
                      Open* open) const {
    std::int64_t count = 0, j = 0;
#ifdef FASTMERGE_AVX512
    if (has_avx512()) {
      j = m / 16 * 16;
      count = decide_wide(digit, i, j, keep, open);
    }
#endif
    for (; j < m; ++j) {
      const std::uint32_t bounds = bounds_[bucket_[i + j]], d = digit[j];
      const bool surely = d < (bounds & 0xffff);
      keep[i + j] = surely;
      open[count] = {static_cast<std::uint32_t>(i + j), digit[j]};
      count += !surely & (d <= bounds >> 16);
    }
    return count;
  }
#ifdef FASTMERGE_AVX512
  // The same for a multiple of 16 elements. Few groups have an open element, so the branch is foreseen.
  FM_AVX512 std::int64_t decide_wide(const std::uint16_t* digit, std::int64_t i, std::int64_t m, std::uint8_t* keep,
                                     Open* open) const {
    const std::uint16_t* bucket = bucket_.data();
    const __m512i low = _mm512_set1_epi32(0xffff);
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < m; j += 16) {
      const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bucket + i + j)));
      const __m512i d = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(digit + j)));
      const __m512i bounds = _mm512_i32gather_epi32(b, bounds_, 4);
      const __mmask16 surely = _mm512_cmplt_epu32_mask(d, _mm512_and_si512(bounds, low));
      const __mmask16 perhaps = _mm512_cmple_epu32_mask(d, _mm512_srli_epi32(bounds, 16));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(keep + i + j), _mm_maskz_set1_epi8(surely, 1));
      for (std::uint32_t left = perhaps & ~static_cast<std::uint32_t>(surely); left; left &= left - 1) {
        const std::int64_t at = j + __builtin_ctz(left);
        open[count++] = {static_cast<std::uint32_t>(i + at), digit[at]};
      }
    }
    return count;
  }
#endif

  void settle(std::int64_t open, const RankLimits& limits, DrawKey draws, std::int64_t position, std::uint8_t* keep) {
    std::int64_t zeros = 0;
    for (std::int64_t o = 0; o < open; ++o) zeros += key_[open_[o].index] == 0;
    if (zeros) count_zeros();
    const bool sorted = length_ > kScan && open - zeros > kExact;
    if (sorted) sort();
    for (std::int64_t o = 0; o < open; ++o) {
      const auto [index, digit] = open_[o];
      const K key = key_[index];
      const std::int64_t rank = key == 0 ? zeros_after(index)
                                : sorted
                                    ? rank_[index]
                                    : detail::count_below(key_.data(), index, key) +
                                          detail::count_below(key_.data() + index + 1, length_ - index - 1, key + 1);
      const std::uint32_t limit = limits.of(static_cast<std::uint64_t>(rank)), high = limit >> 16;
      if (digit == high) {
        std::uint16_t second[8];
        const std::int64_t at = position + index;
        detail::philox_plain(draws, static_cast<std::uint64_t>(at / 8), 1, second, 1);
        keep[index] = second[at % 8] < (limit & 0xffff);
      } else {
        keep[index] = digit < high;
      }
    }
  }

  // Zeros are the lowest ranks, the last one in the row rank 0: the rank of one is the number of zeros after it.
  void count_zeros() {
    const std::int64_t blocks = (length_ + kZeros - 1) / kZeros;
    zeros_.resize(static_cast<std::size_t>(blocks) + 1);
    zeros_[blocks] = 0;
    for (std::int64_t b = blocks; b-- > 0;)
      zeros_[b] =
          zeros_[b + 1] + detail::count_same(key_.data() + b * kZeros, std::min(kZeros, length_ - b * kZeros), K{0});
  }
  std::int64_t zeros_after(std::int64_t index) const {
    const std::int64_t block = index / kZeros, end = std::min(length_, (block + 1) * kZeros);
    return zeros_[block + 1] + detail::count_same(key_.data() + index + 1, end - index - 1, K{0});
  }

  // rank_ of every element. Ascending by key; of equals the lowest index comes last, so that it ranks highest: the sort
  // is stable, and entries go in from the end of the row.
  void sort() {
    constexpr int kBits = 11, kBuckets = 1 << kBits, kPasses = (8 * sizeof(K) - 1 + kBits - 1) / kBits;
    entries_.resize(length_);
    other_.resize(length_);
    rank_.resize(length_);
    counts_.assign(static_cast<std::size_t>(kPasses) * kBuckets, 0);
    for (std::int64_t i = 0; i < length_; ++i) {
      entries_[length_ - 1 - i] = {key_[i], static_cast<std::uint32_t>(i)};
      for (int p = 0; p < kPasses; ++p) ++counts_[p * kBuckets + ((key_[i] >> (p * kBits)) & (kBuckets - 1))];
    }
    for (int p = 0; p < kPasses; ++p) {
      std::uint32_t* c = counts_.data() + p * kBuckets;
      const int shift = p * kBits;
      if (c[(entries_[0].key >> shift) & (kBuckets - 1)] == length_) continue;  // one digit for all
      std::uint32_t sum = 0;
      for (int v = 0; v < kBuckets; ++v) {
        const std::uint32_t here = c[v];
        c[v] = sum;
        sum += here;
      }
      for (const Entry& e : entries_) other_[c[(e.key >> shift) & (kBuckets - 1)]++] = e;
      entries_.swap(other_);
    }
    for (std::int64_t r = 0; r < length_; ++r) rank_[entries_[r].index] = static_cast<std::uint32_t>(r);
  }

  std::int64_t length_;
  std::vector<K> key_;
  std::vector<std::uint16_t> bucket_;
  std::vector<Open> open_;  // one more than elements: an entry is written before it is known whether it counts
  std::vector<std::int32_t> start_;
  std::uint32_t bounds_[detail::kRankBuckets];
  std::vector<Entry> entries_, other_;
  std::vector<std::uint32_t> rank_, counts_;
  std::vector<std::int64_t> zeros_;
};

}  // namespace fastmerge
