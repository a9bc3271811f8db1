// expert_scatter's kernels for the launcher.
#include "ops/expert_scatter.cuh"

#include "common/launch.h"

#define ENTRY(name, ...) {#name, reinterpret_cast<const void*>(&name)},
static const fastmerge::gpu::Registration registration{FM_SCATTER(ENTRY)};
