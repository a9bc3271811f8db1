// The one parallel loop. Results never depend on the thread count: a body must write only what its range owns, and
// reductions go through per-block slots combined in index order by the caller.
//
// The thread count is always explicit: torch.set_num_threads reaches only torch's own main thread.
// FASTMERGE_STD_THREADS replaces OpenMP by std::thread for ThreadSanitizer, which libgomp confuses.
#pragma once
#include <algorithm>
#include <cstdint>
#ifdef FASTMERGE_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace fastmerge {

constexpr std::int64_t kGrain = 64 * 1024;  // elements: below this a second thread costs more than it brings

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// f(block) for block in [0, blocks), each executed once, by up to `threads` threads, in contiguous runs of blocks.
template <class F>
void parallel_blocks(std::int64_t blocks, int threads, const F& f) {
  const int team = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), blocks));
  if (team <= 1) {
    for (std::int64_t b = 0; b < blocks; ++b) f(b);
    return;
  }
#ifdef FASTMERGE_STD_THREADS
  std::vector<std::thread> workers;
  for (int t = 0; t < team; ++t)
    workers.emplace_back([=, &f] {
      for (std::int64_t b = blocks * t / team; b < blocks * (t + 1) / team; ++b) f(b);
    });
  for (auto& w : workers) w.join();
#else
#pragma omp parallel for num_threads(team) schedule(static)
  for (std::int64_t b = 0; b < blocks; ++b) f(b);
#endif
}

// f(begin, end) over fixed-size pieces of [0, n): the pieces depend on `grain` only, never on the thread count.
template <class F>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, const F& f) {
  parallel_blocks(ceil_div(n, grain), threads, [&](std::int64_t b) { f(b * grain, std::min(n, (b + 1) * grain)); });
}

}  // namespace fastmerge
