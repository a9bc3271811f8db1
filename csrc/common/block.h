// Blocks of a tensor converted to the compute type (float or double) in a buffer that stays in L1: kernels are written
// once per compute type, whatever mix of dtypes comes in. A block that already has the compute type is not copied.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dtype.h"

namespace fastmerge {

constexpr std::int64_t kBlock = 2048;  // elements; a few float buffers of this size fit a 32 KiB L1

inline std::vector<Dtype> dtypes(const std::vector<int>& codes) {
  std::vector<Dtype> out;
  for (int c : codes) out.push_back(static_cast<Dtype>(c));
  return out;
}
inline bool any_f64(const std::vector<Dtype>& types) {
  return std::find(types.begin(), types.end(), Dtype::f64) != types.end();
}

namespace detail {
FM_SIMD inline void widen(const bf16* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
}
FM_SIMD inline void widen(const f16* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
}
FM_SIMD inline void widen(const bf16* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
}
FM_SIMD inline void widen(const f16* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
}
FM_SIMD inline void widen(const float* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i];
}
FM_SIMD inline void narrow(const float* x, bf16* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = from_float<bf16>(x[i]);
}
FM_SIMD inline void narrow(const float* x, f16* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = from_float<f16>(x[i]);
}
}  // namespace detail

// Elements [at, at + n) of the array at `address`, as floats: the array itself when it is float, else `buffer`.
inline const float* load_block(Dtype t, std::uintptr_t address, std::int64_t at, std::int64_t n, float* buffer) {
  switch (t) {
    case Dtype::f32: return reinterpret_cast<const float*>(address) + at;
    case Dtype::bf16: detail::widen(reinterpret_cast<const bf16*>(address) + at, buffer, n); return buffer;
    case Dtype::f16: detail::widen(reinterpret_cast<const f16*>(address) + at, buffer, n); return buffer;
    case Dtype::f64: break;  // callers compute in double when an input is double
  }
  throw std::invalid_argument("load_block: float64 in a float32 computation");
}
inline const double* load_block(Dtype t, std::uintptr_t address, std::int64_t at, std::int64_t n, double* buffer) {
  switch (t) {
    case Dtype::f64: return reinterpret_cast<const double*>(address) + at;
    case Dtype::f32: detail::widen(reinterpret_cast<const float*>(address) + at, buffer, n); return buffer;
    case Dtype::bf16: detail::widen(reinterpret_cast<const bf16*>(address) + at, buffer, n); return buffer;
    case Dtype::f16: detail::widen(reinterpret_cast<const f16*>(address) + at, buffer, n); return buffer;
  }
  throw std::invalid_argument("load_block: unknown dtype");
}

// Rounds a block to the dtype of the array at `address`, to nearest even.
inline void store_block(Dtype t, std::uintptr_t address, std::int64_t at, std::int64_t n, const float* x) {
  switch (t) {
    case Dtype::f32: std::memcpy(reinterpret_cast<float*>(address) + at, x, n * sizeof(float)); return;
    case Dtype::bf16: detail::narrow(x, reinterpret_cast<bf16*>(address) + at, n); return;
    case Dtype::f16: detail::narrow(x, reinterpret_cast<f16*>(address) + at, n); return;
    case Dtype::f64: detail::widen(x, reinterpret_cast<double*>(address) + at, n); return;
  }
}
inline void store_block(Dtype t, std::uintptr_t address, std::int64_t at, std::int64_t n, const double* x) {
  // torch narrows float64 to a 16-bit type through float32 (two roundings), and the reference is torch.
  switch (t) {
    case Dtype::f64: std::memcpy(reinterpret_cast<double*>(address) + at, x, n * sizeof(double)); return;
    case Dtype::f32:
      for (std::int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(address)[at + i] = static_cast<float>(x[i]);
      return;
    case Dtype::bf16:
      for (std::int64_t i = 0; i < n; ++i)
        reinterpret_cast<bf16*>(address)[at + i] = from_float<bf16>(static_cast<float>(x[i]));
      return;
    case Dtype::f16:
      for (std::int64_t i = 0; i < n; ++i)
        reinterpret_cast<f16*>(address)[at + i] = from_float<f16>(static_cast<float>(x[i]));
      return;
  }
}

FM_SIMD inline void divide_block(float* x, float d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] /= d;
}
FM_SIMD inline void divide_block(double* x, double d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] /= d;
}
FM_SIMD inline void scale_block(float* x, float s, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] *= s;
}
FM_SIMD inline void scale_block(double* x, double s, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] *= s;
}
FM_SIMD inline void add_block(float* x, const float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = y[i] + x[i];
}
FM_SIMD inline void add_block(double* x, const double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = y[i] + x[i];
}

}  // namespace fastmerge
