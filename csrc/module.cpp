// The extension module fastmerge._C: runs every FASTMERGE_EXPORT of the sources linked into it. Never edited to add an
// op.
#include "common/export.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastmerge's native kernels; called through fastmerge._native only";
  for (auto registrar : fastmerge::registrars()) registrar(m);
}
