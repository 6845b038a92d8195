// Portable twin of the kernels with int8 activations: whole-number sums, then the roundings that kernels.h lays down.
#include <cmath>

#include "../numeric.h"

namespace slimba {
namespace {

constexpr std::int64_t kGroup = 128;

std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }
std::int64_t none(std::int64_t) { return 0; }
void nothing(const std::int8_t*, std::int64_t, std::uint8_t*) {}

void quantize(const float* x, std::int64_t n, std::int8_t* q, float* scale, std::int32_t* sums) {
  float top = 0;
  bool damaged = false;
  for (std::int64_t i = 0; i < n; ++i) {
    damaged |= !std::isfinite(x[i]);
    top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
  }
  const bool zero = damaged || top < 1e-30f;
  const float inverse = zero ? 0.0f : 127.0f / top;
  *scale = damaged ? NAN : zero ? 0.0f : top / 127.0f;
  const std::int64_t groups = groups_of(n);
  for (std::int64_t g = 0; g <= groups; ++g) sums[g] = 0;
  for (std::int64_t i = 0; i < (n + 63) / 64 * 64; ++i) {
    q[i] = i < n && !zero ? std::int8_t(std::nearbyint(x[i] * inverse)) : std::int8_t(0);
    if (i < n) sums[i / kGroup] += q[i];
  }
  for (std::int64_t g = 0; g < groups; ++g) sums[groups] += sums[g];
}

void put(const QuantArgs& a, std::int64_t r, std::int64_t t, float value) {
  float& y = a.y[t * a.y_stride + r];
  y = a.add ? y + value : value;
}

// One whole number a row and token; code(row, column) is the weight without its scale.
template <class Code>
void whole_rows(const QuantArgs& a, Code code) {
  for (std::int64_t r = a.row_begin; r < a.row_end; ++r) {
    const float scale = load_half(a.scale + 2 * r);
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      const std::int8_t* x = a.x + t * a.x_stride;
      std::int32_t sum = 0;
      for (std::int64_t c = 0; c < a.cols; ++c) sum += code(r, c) * x[c];
      put(a, r, t, float(sum) * (scale * a.x_scale[t]));
    }
  }
}

void sign(const QuantArgs& a) {
  const std::int64_t row_bytes = (a.cols + 63) / 64 * 8;
  whole_rows(a, [&](std::int64_t r, std::int64_t c) { return (a.data[r * row_bytes + c / 8] >> (c & 7) & 1) * 2 - 1; });
}

void int8(const QuantArgs& a) {
  whole_rows(a, [&](std::int64_t r, std::int64_t c) { return int(std::int8_t(a.data[r * a.cols + c])); });
}

void int4(const QuantArgs& a) {
  const std::int64_t row_bytes = (a.cols + 1) / 2, groups = groups_of(a.cols);
  for (std::int64_t r = a.row_begin; r < a.row_end; ++r) {
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      const std::int8_t* x = a.x + t * a.x_stride;
      float total = 0;
      for (std::int64_t g = 0; g < groups; ++g) {
        std::int32_t sum = 0;
        for (std::int64_t c = g * kGroup; c < a.cols && c < (g + 1) * kGroup; ++c)
          sum += ((a.data[r * row_bytes + c / 2] >> (c & 1) * 4 & 15) - 8) * x[c];
        total += load_half(a.scale + 2 * (r * groups + g)) * float(sum);
      }
      put(a, r, t, total * a.x_scale[t]);
    }
  }
}

constexpr QuantInput kNothing = {none, nothing};
const QuantFormat kSignRows = {kNothing, kNothing, none, sign, sign, 1, 64};
const QuantFormat kInt8Rows = {kNothing, kNothing, none, int8, int8, 1, 64};
const QuantFormat kInt4Rows = {kNothing, kNothing, none, int4, int4, 1, 64};

}  // namespace

void naive_quant(Kernels& k) {
  k.quantize = quantize;
  k.quant[kSign] = &kSignRows;
  k.quant[kInt8] = &kInt8Rows;
  k.quant[kInt4] = &kInt4Rows;
}

}  // namespace slimba
