// Self-registration: a kernel file ends with FASTMERGE_EXPORT(m) { m.def(...); } and no shared file is edited.
// Convention of every binding: pointers, sizes and strides as integers, an explicit thread count, the GIL released;
// outputs are allocated by Python. No torch header anywhere, so one binary serves every torch version.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

namespace fastmerge {
namespace py = pybind11;
using Registrar = void (*)(py::module_&);

inline std::vector<Registrar>& registrars() {
  static std::vector<Registrar> all;
  return all;
}
struct Registration {
  explicit Registration(Registrar r) { registrars().push_back(r); }
};
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace fastmerge

#define FASTMERGE_EXPORT(m)                                                        \
  static void fastmerge_register(pybind11::module_& m);                            \
  static const fastmerge::Registration fastmerge_registration(fastmerge_register); \
  static void fastmerge_register(pybind11::module_& m)
