// Portable twin of the kernels around a matrix: RMS norm, SiLU gate, log-softmax sums, Hadamard transform.
#include <cmath>

#include "../kernels.h"

namespace slimba {
namespace {

// y = x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, std::int64_t n, float eps, float* y) {
  double squares = 0;
  for (std::int64_t i = 0; i < n; ++i) squares += double(x[i]) * double(x[i]);
  const float inverse = 1.0f / std::sqrt(float(squares / double(n)) + eps);
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * inverse * (weight ? weight[i] : 1.0f);
}

void gate(const float* y, const float* z, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = y[i] * (z[i] / (1.0f + std::exp(-z[i])));
}

float max_of(const float* x, std::int64_t n) {
  float best = x[0];
  for (std::int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return __builtin_nanf("");
    if (x[i] > best) best = x[i];
  }
  return best;
}

double sum_exp(const float* x, std::int64_t n, float shift) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += double(std::exp(x[i] - shift));
  return sum;
}

void read(const float* x, std::int64_t n, float* sink) {
  float part[16] = {};
  for (std::int64_t i = 0; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; ++k) part[k] += x[i + k];
  for (int k = 0; k < 16; ++k) *sink += part[k];
}

void hadamard(float* x, std::int64_t n, std::int64_t block) {
  for (std::int64_t distance = 1; distance < block; distance *= 2) {
    for (std::int64_t i = 0; i < n; ++i) {
      if (i & distance) continue;
      const float a = x[i], b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    }
  }
  const float scale = float(1.0 / std::sqrt(double(block)));
  for (std::int64_t i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace

void naive_norm(Kernels& k) {
  k.rms_norm = rms_norm;
  k.gate = gate;
  k.max = max_of;
  k.sum_exp = sum_exp;
  k.read = read;
  k.hadamard = hadamard;
}

}  // namespace slimba
