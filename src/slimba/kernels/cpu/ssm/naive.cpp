// Portable twin of the sequence kernels: causal convolution, softplus of the step size, both recurrences.
//
// Mamba-2: Dao & Gu 2024 (arXiv 2405.21060), equation 1 with scalar decay per head. Mamba-1: Gu & Dao 2023 (arXiv
// 2312.00752).
#include <cmath>
#include <cstring>

#include "../numeric.h"

namespace slimba {
namespace {

// Input of token t (negative: from the state of K - 1 earlier inputs).
const float* conv_row(const ConvArgs& a, std::int64_t t) {
  return t >= 0 ? a.in + t * a.in_stride : a.state + (t + a.taps - 1) * a.weight_stride;
}

void conv_silu(const ConvArgs& a) {
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    for (std::int64_t i = 0; i < a.channels; ++i) {
      float sum = a.bias ? a.bias[i] : 0.0f;
      for (int k = 0; k < a.taps; ++k) sum += a.weight[k * a.weight_stride + i] * conv_row(a, t - (a.taps - 1) + k)[i];
      a.out[t * a.out_stride + i] = sum / (1.0f + std::exp(-sum));
    }
  }
  // Oldest first, so that a row is read before it is overwritten.
  for (int k = 0; k < a.taps - 1; ++k) {
    std::memmove(a.state + k * a.weight_stride, conv_row(a, a.tokens - (a.taps - 1) + k), std::size_t(a.channels) * 4);
  }
}

// log(1 + exp(v)) without overflow, clamped to [low, high].
void softplus(const float* x, const float* bias, std::int64_t n, float low, float high, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = x[i] + bias[i];
    const float s = (v > 0 ? v : 0.0f) + std::log1p(std::exp(-std::fabs(v)));
    out[i] = s < low ? low : s > high ? high : s;
  }
}

void decay(const float* dt, const float* a, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = std::exp(dt[i] * a[i]);
}

// Row `row` of a stored state as floats. A float32 state is worked on where it lies, the others in `work`.
float* open_row(StateType type, std::uint8_t* state, const float* scale, std::int64_t row, std::int64_t n,
                float* work) {
  if (type == kStateFloat32) return reinterpret_cast<float*>(state) + row * n;
  for (std::int64_t i = 0; i < n; ++i) {
    work[i] = type == kStateBfloat16 ? load_bfloat(state + 2 * (row * n + i))
                                     : scale[row] * float(reinterpret_cast<std::int8_t*>(state)[row * n + i]);
  }
  return work;
}

// Rounds the row s to what is stored, and stores it.
void round_row(StateType type, std::uint8_t* state, float* scale, std::int64_t row, std::int64_t n, float* s) {
  if (type == kStateBfloat16) {
    for (std::int64_t i = 0; i < n; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, s + i, 4);
      bits = s[i] != s[i] ? 0x7fc00000u : (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
      std::memcpy(s + i, &bits, 4);
      std::memcpy(state + 2 * (row * n + i), reinterpret_cast<const char*>(&bits) + 2, 2);
    }
  }
  if (type != kStateInt8) return;
  float top = 0;
  bool damaged = false;
  for (std::int64_t i = 0; i < n; ++i) {
    damaged |= !std::isfinite(s[i]);
    top = std::fabs(s[i]) > top ? std::fabs(s[i]) : top;
  }
  const float inverse = top < 1e-30f ? 0.0f : 127.0f / top;
  scale[row] = damaged ? NAN : top < 1e-30f ? 0.0f : top / 127.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    const float code = damaged ? 0.0f : std::nearbyint(s[i] * inverse);
    reinterpret_cast<std::int8_t*>(state)[row * n + i] = std::int8_t(code);
    s[i] = code * scale[row];
  }
}

void ssm2(const Ssm2Args& a) {
  for (std::int64_t p = 0; p < a.headdim; ++p) {
    float* s = open_row(a.type, a.state, a.state_scale, p, a.d_state, a.work);
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      const float *x = a.x + t * a.xbc_stride, *b = a.b + t * a.xbc_stride, *c = a.c + t * a.xbc_stride;
      const float decay_t = a.decay[t * a.dt_stride], dx = a.dt[t * a.dt_stride] * x[p];
      float sum = 0;
      for (std::int64_t n = 0; n < a.d_state; ++n) {
        s[n] = decay_t * s[n] + dx * b[n];
        sum += s[n] * c[n];
      }
      a.y[t * a.y_stride + p] = sum + a.d[a.d_per_channel ? p : 0] * x[p];
      round_row(a.type, a.state, a.state_scale, p, a.d_state, s);
    }
  }
}

void ssm1(const Ssm1Args& a) {
  for (std::int64_t i = 0; i < a.channels; ++i) {
    float* s = open_row(a.type, a.state, a.state_scale, i, a.d_state, a.work);
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      const float *b = a.b + t * a.bc_stride, *c = a.c + t * a.bc_stride;
      const float dt = a.dt[t * a.dt_stride + i], x = a.x[t * a.x_stride + i];
      float sum = 0;
      for (std::int64_t n = 0; n < a.d_state; ++n) {
        s[n] = std::exp(dt * a.a[i * a.d_state + n]) * s[n] + dt * x * b[n];
        sum += s[n] * c[n];
      }
      a.y[t * a.y_stride + i] = sum + a.d[i] * x;
      round_row(a.type, a.state, a.state_scale, i, a.d_state, s);
    }
  }
}

}  // namespace

void naive_ssm(Kernels& k) {
  k.conv_silu = conv_silu;
  k.softplus = softplus;
  k.decay = decay;
  k.ssm2 = ssm2;
  k.ssm1 = ssm1;
}

}  // namespace slimba
