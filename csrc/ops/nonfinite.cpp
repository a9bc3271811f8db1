// Counts NaN and Inf in a chunk, for the engine's NaN policy.
#include "common/nonfinite.h"

#include "common/export.h"

FASTMERGE_EXPORT(m) { m.def("count_nonfinite", &fastmerge::count_nonfinite, fastmerge::NoGil()); }
