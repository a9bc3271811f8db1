// The one launcher of all CUDA kernels. No CUDA header here: the binding is compiled without nvcc as well.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace fastmerge::gpu {

struct Entry {
  const char* name;
  const void* kernel;
};
// A .cu file lists its kernels in a static object of this type.
struct Registration {
  Registration(std::initializer_list<Entry> entries);
};
std::vector<std::string> kernels();
// The number of devices the driver offers; the reason, where there is none.
int devices(std::string* reason);
// Launches on the current device; throws with CUDA's words when it can not.
void launch(const std::string& name, unsigned blocks, unsigned threads, unsigned shared, std::uintptr_t stream,
            std::uintptr_t tasks, std::uintptr_t first_block, unsigned count);

}  // namespace fastmerge::gpu
