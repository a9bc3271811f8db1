// The binding of the CUDA launcher; without nvcc it says that there is none.
#include "common/export.h"
#ifdef FASTMERGE_CUDA
#include "common/launch.h"
#endif

namespace fastmerge {
namespace {

std::vector<std::string> cuda_kernels() {
#ifdef FASTMERGE_CUDA
  return gpu::kernels();
#else
  return {};
#endif
}

// (number of devices, why none)
std::pair<int, std::string> cuda_devices() {
#ifdef FASTMERGE_CUDA
  std::string reason;
  const int count = gpu::devices(&reason);
  return {count, reason};
#else
  return {0, "the CUDA kernels were not compiled in (no nvcc at build time, or FASTMERGE_BUILD=cpu)"};
#endif
}

}  // namespace

FASTMERGE_EXPORT(m) {
  m.def("cuda_kernels", &cuda_kernels);
  m.def("cuda_devices", &cuda_devices, NoGil());
#ifdef FASTMERGE_CUDA
  m.def("cuda_launch", &gpu::launch, NoGil());
#endif
}
}  // namespace fastmerge
