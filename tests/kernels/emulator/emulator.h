// CUDA words for g++: the kernels of csrc/ops/*.cuh run on a CPU, one fiber per CUDA thread.
//
// What it shows: results, deadlocks and divergent barriers, out-of-bounds accesses (built with AddressSanitizer), races
// between the threads of a block (ThreadSanitizer's fibers), undefined behaviour, and under several schedules. What it
// counts: bytes and 32-byte sectors of every global access, per warp request. What it does not show: timing, races across
// blocks, inline PTX (kernels carry a plain body for it), tensor cores.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define FM_EMULATOR 1
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

namespace emulator {

// ---- fibers ------------------------------------------------------------------------------------------------------
constexpr std::size_t kStack = 256 * 1024;

struct Warp {
  unsigned generation = 0, arrived = 0, mask = 0;
  int line = 0;
  std::uint64_t slot[2][32];
};
struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  uint3 thread{};
  Warp* warp = nullptr;
  unsigned lane = 0;
  const unsigned* waits_for = nullptr;  // resumes when *waits_for differs from `seen`
  unsigned seen = 0;
  int line = 0;
  bool done = true;
  std::map<int, unsigned> visits;  // accesses made at a source line so far
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};
struct Request {  // one warp's access at one place
  std::set<std::uintptr_t> units;  // distinct 2-byte units, as address / 2
  std::set<std::uintptr_t> sectors;
};
struct Counters {
  bool on = false;
  std::uint64_t loaded = 0, stored = 0;                  // bytes in whole sectors, per warp request
  std::uint64_t used_loaded = 0, used_stored = 0;        // bytes the kernel asked for
};
struct Machine {
  uint3 grid{}, block{}, block_id{};
  unsigned threads = 0, barrier_generation = 0, barrier_arrived = 0;
  int barrier_line = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char* shared = nullptr;
  void* main_sp = nullptr;
  char started = 0, finished = 0;  // what ThreadSanitizer is told: a block starts after, and ends before, the next
  void (*kernel)(void*) = nullptr;
  void* argument = nullptr;
  Counters counters;
  std::map<std::pair<std::uint64_t, std::pair<int, unsigned>>, std::pair<bool, Request>> requests;
#if defined(__SANITIZE_THREAD__)
  void* main_tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  std::size_t main_size = 0;
#endif
};
inline Machine machine;
inline Fiber* fiber = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s (block %u)\n", what.c_str(), machine.block_id.x);
  std::abort();
}

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif
extern "C" void fm_switch(void** save, void* load);
asm(R"(
.text
.weak fm_switch
.type fm_switch,@function
fm_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fm_switch,.-fm_switch
)");
#if defined(__SANITIZE_THREAD__)
#define FM_NO_SANITIZER __attribute__((noinline, no_sanitize_thread))
#define FM_RELEASE(p) __tsan_release(p)
#define FM_ACQUIRE(p) __tsan_acquire(p)
#else
#define FM_NO_SANITIZER __attribute__((noinline))
#define FM_RELEASE(p)
#define FM_ACQUIRE(p)
#endif

FM_NO_SANITIZER inline void to_scheduler() {
  Fiber* me = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&me->fake_stack, machine.main_bottom, machine.main_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.main_tsan, 1);
#endif
  fm_switch(&me->sp, machine.main_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake_stack, &machine.main_bottom, &machine.main_size);
#endif
}
FM_NO_SANITIZER inline void to_fiber(Fiber* f) {
  fiber = f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.main_fake_stack, f->stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f->tsan, 1);  // 1: switching fibers orders nothing, only barriers do
#endif
  fm_switch(&machine.main_sp, f->sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);
#endif
  fiber = nullptr;
}
FM_NO_SANITIZER inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_bottom, &machine.main_size);
#endif
  for (;;) {  // a finished fiber is armed again for the next block
    FM_ACQUIRE(&machine.started);
    machine.kernel(machine.argument);
    FM_RELEASE(&machine.finished);
    fiber->done = true;
    to_scheduler();
  }
}
FM_NO_SANITIZER inline void wait(const unsigned* generation, int line) {
  fiber->waits_for = generation;
  fiber->seen = *generation;
  fiber->line = line;
  to_scheduler();
  fiber->waits_for = nullptr;
}

// ---- barriers and warp collectives ---------------------------------------------------------------------------------
FM_NO_SANITIZER inline void barrier(int line) {
  Machine& m = machine;
  FM_RELEASE(&m.barrier_generation);
  if (m.barrier_arrived == 0) m.barrier_line = line;
  if (m.barrier_line != line) fail("divergent __syncthreads, lines " + std::to_string(m.barrier_line) + " and " + std::to_string(line));
  if (++m.barrier_arrived == m.threads) {
    m.barrier_arrived = 0;
    ++m.barrier_generation;
  } else {
    wait(&m.barrier_generation, line);
  }
  FM_ACQUIRE(&m.barrier_generation);
}
// Deposits a value, waits for the other lanes of the mask, returns all 32 slots. Orders no memory, as on a GPU.
FM_NO_SANITIZER inline const std::uint64_t* exchange(unsigned mask, std::uint64_t value, int line) {
  Warp* w = fiber->warp;
  const unsigned generation = w->generation;
  if (!(mask >> fiber->lane & 1)) fail("a lane is not in its own mask, line " + std::to_string(line));
  if (w->arrived == 0) { w->mask = mask; w->line = line; }
  if (w->mask != mask || w->line != line) fail("divergent warp collective, lines " + std::to_string(w->line) + " and " + std::to_string(line));
  w->slot[generation & 1][fiber->lane] = value;
  if (++w->arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    w->arrived = 0;
    ++w->generation;
  } else {
    wait(&w->generation, line);
  }
  return w->slot[generation & 1];
}
template <class T>
T shuffle_xor(int line, unsigned mask, T value, int lanes) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, line)[fiber->lane ^ static_cast<unsigned>(lanes)];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- global memory -------------------------------------------------------------------------------------------------
FM_NO_SANITIZER inline void count(const void* p, std::size_t size, bool is_store, int line) {
  Machine& m = machine;
  const unsigned visit = fiber->visits[line]++;
  const std::uint64_t warp = std::uint64_t(m.block_id.x) * 64 + fiber->thread.x / 32;
  auto& [stores, request] = m.requests[{warp, {line, visit}}];
  stores = is_store;
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  for (std::size_t b = 0; b < size; b += 2) {
    request.units.insert((at + b) / 2);
    request.sectors.insert((at + b) / 32);
  }
}
inline void close_requests() {
  for (const auto& [key, value] : machine.requests) {
    const auto& [stores, request] = value;
    (stores ? machine.counters.stored : machine.counters.loaded) += 32 * request.sectors.size();
    (stores ? machine.counters.used_stored : machine.counters.used_loaded) += 2 * request.units.size();
  }
  machine.requests.clear();
}

// ---- the scheduler -------------------------------------------------------------------------------------------------
FM_NO_SANITIZER inline void prepare(unsigned threads, void (*kernel)(void*), void* argument) {
  Machine& m = machine;
  m.threads = threads;
  m.kernel = kernel;
  m.argument = argument;
  m.warps.assign((threads + 31) / 32, Warp{});
  if (m.fibers.size() < threads) m.fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = m.fibers[t];
    f.thread = {t, 0, 0};
    f.lane = t % 32;
    f.warp = &m.warps[t / 32];
    if (f.stack) continue;
    f.stack = static_cast<char*>(std::malloc(kStack));
    // Stacks start at different cache sets.
    const auto top = ((reinterpret_cast<std::uintptr_t>(f.stack) + kStack) & ~std::uintptr_t(15)) - (t % 61) * 320;
    auto** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(&entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.sp = sp;
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_THREAD__)
  m.main_tsan = __tsan_get_current_fiber();
#endif
}
// schedule: 0 threads in order, 1 in reverse order (blocks too), 2 in a new random order at every turn.
FM_NO_SANITIZER inline void run_block(int schedule, std::mt19937& random) {
  Machine& m = machine;
  m.barrier_arrived = 0;
  for (auto& w : m.warps) w.arrived = 0;
  std::vector<unsigned> turn(m.threads);
  for (unsigned t = 0; t < m.threads; ++t) {
    turn[t] = schedule == 1 ? m.threads - 1 - t : t;
    m.fibers[t].done = false;
    m.fibers[t].waits_for = nullptr;
    m.fibers[t].visits.clear();
  }
  FM_RELEASE(&machine.started);
  for (unsigned done = 0; done < m.threads;) {
    bool progress = false;
    if (schedule == 2) std::shuffle(turn.begin(), turn.end(), random);
    for (const unsigned t : turn) {
      Fiber& f = m.fibers[t];
      if (f.done || (f.waits_for && *f.waits_for == f.seen)) continue;
      progress = true;
      to_fiber(&f);
      done += f.done;
    }
    if (!progress) fail("deadlock: " + std::to_string(m.threads - done) + " threads wait");
  }
  FM_ACQUIRE(&machine.finished);
  if (m.counters.on) close_requests();
}

using Kernel = void (*)(const void*, const unsigned*, unsigned);

inline void launch(Kernel kernel, unsigned blocks, unsigned threads, std::size_t shared, const void* tasks,
                   const unsigned* first_block, unsigned count, int schedule) {
  struct Call { Kernel kernel; const void* tasks; const unsigned* first_block; unsigned count; };
  Call call{kernel, tasks, first_block, count};
  std::mt19937 random(1);
  machine.grid = {blocks, 1, 1};
  machine.block = {threads, 1, 1};
  machine.shared = shared ? static_cast<char*>(std::aligned_alloc(16, (shared + 15) / 16 * 16)) : nullptr;
  prepare(threads, [](void* p) { const auto& c = *static_cast<Call*>(p); c.kernel(c.tasks, c.first_block, c.count); }, &call);
  for (unsigned b = 0; b < blocks; ++b) {
    machine.block_id = {schedule == 1 ? blocks - 1 - b : b, 0, 0};
    // Shared memory has no defined contents.
    for (std::size_t i = 0; i < shared; ++i) machine.shared[i] = static_cast<char>(0xA5);
    run_block(schedule, random);
  }
  std::free(machine.shared);
}

}  // namespace emulator

#define threadIdx (emulator::fiber->thread)
#define blockIdx (emulator::machine.block_id)
#define blockDim (emulator::machine.block)
#define gridDim (emulator::machine.grid)
#define __syncthreads() emulator::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulator::shuffle_xor(__LINE__, mask, value, lanes)

inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }

template <class T>
inline T load(const T* p, int line = __builtin_LINE()) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(T) != 0) emulator::fail("misaligned load, line " + std::to_string(line));
  if (emulator::machine.counters.on) emulator::count(p, sizeof(T), false, line);
  return *p;
}
template <class T>
inline void store(T* p, std::type_identity_t<T> v, int line = __builtin_LINE()) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(T) != 0) emulator::fail("misaligned store, line " + std::to_string(line));
  if (emulator::machine.counters.on) emulator::count(p, sizeof(T), true, line);
  *p = v;
}

// Blocks run one after the other, so a static variable serves; sanitizers watch its bounds.
#define FM_SHARED static
#define FM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::machine.shared)

struct EmulatedKernel {
  static std::map<std::string, emulator::Kernel>& all() {
    static std::map<std::string, emulator::Kernel> kernels;
    return kernels;
  }
  EmulatedKernel(const char* name, emulator::Kernel kernel) { all()[name] = kernel; }
};
#define FM_KERNEL(name, Task, ...)                                                           \
  static void name(const void* tasks, const unsigned* first_block, unsigned count) {         \
    __VA_ARGS__(static_cast<const Task*>(tasks), first_block, count);                        \
  }                                                                                          \
  static const EmulatedKernel name##_registered(#name, name);
