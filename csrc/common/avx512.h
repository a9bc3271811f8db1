// Where a plain loop can not say it (compress, widening multiply, streaming stores): AVX-512 versions, chosen at run
// time. Every use has a plain loop beside it that gives the same bits.
#pragma once
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTMERGE_NO_CLONES)
#define FASTMERGE_AVX512 1
#define FM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include <immintrin.h>
// GCC 12's own headers trip over their "undefined" registers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace fastmerge {
inline bool has_avx512() {
  static const bool yes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return yes;
}
}  // namespace fastmerge
#endif
