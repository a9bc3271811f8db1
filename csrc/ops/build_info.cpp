// What was compiled in, for `fastmerge doctor`.
#include "common/export.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastmerge {
namespace {
py::dict build_info() {
  py::dict d;
  d["version"] = FASTMERGE_VERSION;
  d["compiler"] = __VERSION__;
#ifdef _OPENMP
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
#ifdef FASTMERGE_CUDA
  d["cuda"] = FASTMERGE_CUDA_VERSION;
  d["cuda_archs"] = FASTMERGE_CUDA_ARCHS;
#else
  d["cuda"] = py::none();
  d["cuda_archs"] = py::none();
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  d["simd"] =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
          ? "x86-64-v4"
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "x86-64-v3"
                                                                        : "x86-64";
#else
  d["simd"] = "baseline";
#endif
  return d;
}
}  // namespace

FASTMERGE_EXPORT(m) { m.def("build_info", &build_info); }
}  // namespace fastmerge
