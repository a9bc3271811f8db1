// The kernels (and the planted bugs) as a shared library with a C interface, loaded through ctypes by emulated.py.
#include <algorithm>

#include "emulator.h"

#include "ops/expert_scatter.cuh"
#include "ops/fw_products.cuh"
#include "ops/fw_step.cuh"
#include "ops/permute.cuh"
#include "planted.cuh"

extern "C" {
// 0, or 1 when there is no such kernel.
int fm_launch(const char* name, unsigned blocks, unsigned threads, std::size_t shared, const void* tasks,
              const unsigned* first_block, unsigned count, int schedule) {
  const auto found = EmulatedKernel::all().find(name);
  if (found == EmulatedKernel::all().end()) return 1;
  emulator::launch(found->second, blocks, threads, shared, tasks, first_block, count, schedule);
  return 0;
}
void fm_count(int on) { emulator::machine.counters = {}; emulator::machine.counters.on = on != 0; }
void fm_counted(std::uint64_t* out) {
  const auto& c = emulator::machine.counters;
  out[0] = c.loaded; out[1] = c.stored; out[2] = c.used_loaded; out[3] = c.used_stored;
}
}
