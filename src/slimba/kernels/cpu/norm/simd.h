// RMS norm, SiLU gate, log-softmax sums and Hadamard transform for AVX2 and AVX-512; included by avx2.cpp and avx512.cpp.
#include "../simd.h"

namespace slimba {
namespace {

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  vf part[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) part[k] = vfma(vload(x + i + k * W), vload(x + i + k * W), part[k]);
  for (; i < n; i += W) {
    const vf v = vload_n(x + i, n - i);
    part[0] = vfma(v, v, part[0]);
  }
  const float squares = sum_lanes(vadd(vadd(part[0], part[1]), vadd(part[2], part[3])));
  const vf inverse = vset(1.0f / __builtin_sqrtf(squares / float(n) + eps));
  for (i = 0; i < n; i += W) {
    const vf v = vmul(vload_n(x + i, n - i), inverse);
    vstore_n(y + i, weight ? vmul(v, vload_n(weight + i, n - i)) : v, n - i);
  }
}

void gate(const float* y, const float* z, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) vstore(out + i, vmul(vload(y + i), vsilu(vload(z + i))));
  for (; i < n; i += W)
    vstore_n(out + i, vmul(vload_n(y + i, n - i), vsilu(vload_n(z + i, n - i))), n - i);
}

float max_of(const float* x, int64_t n) {
  vf best = vset(x[0]), poison = vzero();  // x - x is NaN for NaN and infinity, else 0
  for (int64_t i = 0; i < n; i += W) {
    const int64_t at = i + W <= n ? i : n >= W ? n - W : 0;  // the last vector may overlap the one before
    const vf v = n >= W ? vload(x + at) : vload_n(x, n);
    best = vmax(best, n >= W ? v : vset(x[0]));
    poison = vadd(poison, vsub(v, v));
  }
  alignas(64) float lane[W];
  vstore(lane, best);
  float top = lane[0];
  for (int k = 1; k < W; ++k) top = lane[k] > top ? lane[k] : top;
  if (n < W)
    for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return any_nan(poison) ? __builtin_nanf("") : top;
}

double sum_exp(const float* x, int64_t n, float shift) {
  double total = 0;
  constexpr int64_t kBlock = 64 * W;  // float32 within a block, float64 across blocks
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = min64(first + kBlock, n);
    vf part = vzero();
    for (int64_t i = first; i < end; i += W) {
      vf e = vexp(vsub(vload_n(x + i, end - i), vset(shift)));
      if (end - i < W) {
        alignas(64) float lane[W] = {};
        vstore_n(lane, e, end - i);
        e = vload(lane);
      }
      part = vadd(part, e);
    }
    total += double(sum_lanes(part));
  }
  return total;
}

void read(const float* x, int64_t n, float* sink) {
  vf part[4] = {vzero(), vzero(), vzero(), vzero()};
  for (int64_t i = 0; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) part[k] = vadd(part[k], vload(x + i + k * W));
  *sink += sum_lanes(vadd(vadd(part[0], part[1]), vadd(part[2], part[3])));
}

// One stage of the transform at a distance below a vector's width; a constant, so that the compiler can use shuffles.
template <int D>
void near_stage(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * D) {
    for (int j = 0; j < D; ++j) {
      const float a = x[i + j], b = x[i + j + D];
      x[i + j] = a + b;
      x[i + j + D] = a - b;
    }
  }
}

void hadamard(float* x, int64_t n, int64_t block) {
  if (block > 1) near_stage<1>(x, n);
  if (block > 2) near_stage<2>(x, n);
  if (block > 4) near_stage<4>(x, n);
  if (W > 8 && block > 8) near_stage<8>(x, n);
  for (int64_t distance = W; distance < block; distance *= 2) {
    for (int64_t i = 0; i < n; i += 2 * distance) {
      for (int64_t j = i; j < i + distance; j += W) {
        const vf a = vload(x + j), b = vload(x + j + distance);
        vstore(x + j, vadd(a, b));
        vstore(x + j + distance, vsub(a, b));
      }
    }
  }
  const vf scale = vset(float(1.0 / __builtin_sqrt(double(block))));
  for (int64_t i = 0; i < n; i += W) vstore_n(x + i, vmul(vload_n(x + i, n - i), scale), n - i);
}

void fill(Kernels& k) {
  k.rms_norm = rms_norm;
  k.gate = gate;
  k.max = max_of;
  k.sum_exp = sum_exp;
  k.read = read;
  k.hadamard = hadamard;
}

}  // namespace
}  // namespace slimba
