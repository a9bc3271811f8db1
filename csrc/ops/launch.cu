// Host code of every CUDA kernel: see common/launch.h. Host-only, compiled once.
#include "common/launch.h"

#include <cuda_runtime.h>

#include <map>
#include <stdexcept>

namespace fastmerge::gpu {
namespace {
std::map<std::string, const void*>& table() {
  static std::map<std::string, const void*> all;
  return all;
}
void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error stays set until it is read
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}
}  // namespace

Registration::Registration(std::initializer_list<Entry> entries) {
  for (const Entry& e : entries) table()[e.name] = e.kernel;
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : table()) names.push_back(name);
  return names;
}

int devices(std::string* reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  cudaGetLastError();
  *reason = cudaGetErrorString(status);
  return 0;
}

void launch(const std::string& name, unsigned blocks, unsigned threads, unsigned shared, std::uintptr_t stream,
            std::uintptr_t tasks, std::uintptr_t first_block, unsigned count) {
  const auto found = table().find(name);
  if (found == table().end()) throw std::invalid_argument("no CUDA kernel is called " + name);
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(found->second, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          name);
  void* arguments[] = {&tasks, &first_block, &count};
  check(cudaLaunchKernel(found->second, dim3(blocks), dim3(threads), arguments, shared,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
}

}  // namespace fastmerge::gpu
