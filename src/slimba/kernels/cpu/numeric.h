// float16 and bfloat16 to float32 in portable C++, and the dot product that every naive matmul uses.
//
// Everything is in an anonymous namespace on purpose, see kernels.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace slimba {
namespace {

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// IEEE half at p (any alignment), subnormals, infinities and NaN included.
inline float load_half(const std::uint8_t* p) {
  const std::uint32_t half = std::uint32_t(p[0]) | std::uint32_t(p[1]) << 8;
  const std::uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline float load_bfloat(const std::uint8_t* p) {
  return bits_to_float(std::uint32_t(p[0]) << 16 | std::uint32_t(p[1]) << 24);
}

// Eight partial sums: accurate, and compilers turn it into vectors without being told to reorder.
inline float naive_dot(const float* w, const float* x, std::int64_t n) {
  float part[8] = {};
  std::int64_t c = 0;
  for (; c + 8 <= n; c += 8)
    for (int k = 0; k < 8; ++k) part[k] += w[c + k] * x[c + k];
  for (; c < n; ++c) part[c & 7] += w[c] * x[c];
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

inline std::int64_t naive_prepared_floats(std::int64_t cols) { return (cols + 15) / 16 * 16; }

inline void naive_prepare(const float* x, std::int64_t cols, float* out) { std::memcpy(out, x, std::size_t(cols) * 4); }

inline std::int64_t naive_scratch_floats(std::int64_t cols) { return naive_prepared_floats(cols); }

// Dequantise a row, then one dot product per token.
inline void naive_matmul(const MatmulArgs& a, DequantRow dequant) {
  for (std::int64_t r = a.row_begin; r < a.row_end; ++r) {
    dequant(a.data, a.scale, a.cols, r, a.scratch);
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      float& y = a.y[t * a.y_stride + r];
      const float sum = naive_dot(a.scratch, a.x + t * naive_prepared_floats(a.cols), a.cols);
      y = a.add ? y + sum : sum;
    }
  }
}

}  // namespace
}  // namespace slimba
