// FM_SIMD marks a plain loop that is compiled for x86-64, AVX2 (v3) and AVX-512 (v4); the loader picks one at run time.
// It goes on a non-inline, non-template function whose loops the compiler can vectorise; lambdas and OpenMP bodies do
// not inherit it, so call such a function from them. FM_INLINE helpers are inlined into every clone.
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTMERGE_NO_CLONES)
#define FM_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FM_SIMD
#endif
#define FM_INLINE inline __attribute__((always_inline))
