// fw_products's kernels for the launcher.
#include "ops/fw_products.cuh"

#include "common/launch.h"

#define ENTRY(name, ...) {#name, reinterpret_cast<const void*>(&name)},
static const fastmerge::gpu::Registration registration{FM_PRODUCTS(ENTRY)};
