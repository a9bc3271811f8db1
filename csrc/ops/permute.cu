// permute's kernels for the launcher.
#include "ops/permute.cuh"

#include "common/launch.h"

#define ENTRY(name, ...) {#name, reinterpret_cast<const void*>(&name)},
static const fastmerge::gpu::Registration registration{FM_PERMUTE(ENTRY)};
