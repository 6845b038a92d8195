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
  if (!a.keep) return;
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

float round_bfloat(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? 0x7fc00000u : (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

void hold(StateType type, const float* x, std::int64_t n, std::uint8_t* out) {
  if (type == kStateFloat32) return void(std::memcpy(out, x, std::size_t(n) * 4));
  for (std::int64_t i = 0; i < n; ++i) {
    const float rounded = round_bfloat(x[i]);
    std::memcpy(out + 2 * i, reinterpret_cast<const char*>(&rounded) + 2, 2);
  }
}

float held(StateType type, const std::uint8_t* row, std::int64_t i) {
  float x;
  if (type == kStateFloat32) std::memcpy(&x, row + 4 * i, 4);
  else x = load_bfloat(row + 2 * i);
  return x;
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
    for (std::int64_t i = 0; i < n; ++i) s[i] = round_bfloat(s[i]);
    hold(type, s, n, state + 2 * row * n);
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

// One head, and token t of the call: the j-th of the buffer, `b` its rows as floats.
void ssm2_token(const Ssm2Args& a, std::int64_t h, std::int64_t t, const float* b) {
  const std::int64_t j = a.filled + t, width = a.type == kStateFloat32 ? 4 : 2;
  const float *x = a.x + t * a.xbc_stride + h * a.headdim, *c = a.c + t * a.xbc_stride;
  std::uint8_t* u = a.held_u + h * kStateBlock * a.headdim * width;
  float* logs = a.logs + h * kStateBlock;
  const float dt = a.dt[t * a.dt_stride + h];
  logs[j] = (j ? logs[j - 1] : 0.0f) + dt * a.a[h];
  for (std::int64_t p = 0; p < a.headdim; ++p) {
    const float dx = dt * x[p];
    hold(a.type, &dx, 1, u + (j * a.headdim + p) * width);
  }
  float weight[kStateBlock];
  for (std::int64_t i = 0; i <= j; ++i) {
    float score = 0;
    for (std::int64_t n = 0; n < a.d_state; ++n) score += b[i * a.d_state + n] * c[n];
    weight[i] = std::exp(logs[j] - logs[i]) * score;
  }
  for (std::int64_t p = 0; p < a.headdim; ++p) {
    const std::int64_t row = h * a.headdim + p;
    const float* s = open_row(a.type, a.state, a.state_scale, row, a.d_state, a.work);
    float old = 0, sum = 0;
    for (std::int64_t n = 0; n < a.d_state; ++n) old += s[n] * c[n];
    for (std::int64_t i = 0; i <= j; ++i) sum += weight[i] * held(a.type, u + i * a.headdim * width, p);
    a.y[t * a.y_stride + row] = std::exp(logs[j]) * old + sum + a.d[a.d_per_channel ? row : h] * x[p];
  }
}

// The state of a head after a full buffer.
void ssm2_store(const Ssm2Args& a, std::int64_t h, const float* b) {
  const std::int64_t width = a.type == kStateFloat32 ? 4 : 2;
  const std::uint8_t* u = a.held_u + h * kStateBlock * a.headdim * width;
  const float *logs = a.logs + h * kStateBlock, last = logs[kStateBlock - 1];
  for (std::int64_t p = 0; p < a.headdim; ++p) {
    const std::int64_t row = h * a.headdim + p;
    float* s = open_row(a.type, a.state, a.state_scale, row, a.d_state, a.work);
    for (std::int64_t n = 0; n < a.d_state; ++n) s[n] *= std::exp(last);
    for (std::int64_t i = 0; i < kStateBlock; ++i) {
      const float gain = std::exp(last - logs[i]) * held(a.type, u + i * a.headdim * width, p);
      for (std::int64_t n = 0; n < a.d_state; ++n) s[n] += gain * b[i * a.d_state + n];
    }
    round_row(a.type, a.state, a.state_scale, row, a.d_state, s);
  }
}

void ssm2(const Ssm2Args& a) {
  float* b = a.work + (a.d_state + 31) / 32 * 32;  // [kStateBlock, N]; the rows of the state are opened before it
  const std::int64_t width = a.type == kStateFloat32 ? 4 : 2;
  for (std::int64_t i = 0; i < a.filled + a.tokens; ++i) {
    for (std::int64_t n = 0; n < a.d_state; ++n) {
      const float fresh = i < a.filled ? 0.0f : a.b[(i - a.filled) * a.xbc_stride + n];
      b[i * a.d_state + n] = i < a.filled                ? held(a.type, a.held_b + i * a.d_state * width, n)
                             : a.type == kStateFloat32 ? fresh : round_bfloat(fresh);
    }
  }
  for (std::int64_t h = 0; h < a.heads; ++h) {
    for (std::int64_t t = 0; t < a.tokens; ++t) ssm2_token(a, h, t, b);
    if (a.filled + a.tokens == kStateBlock) ssm2_store(a, h, b);
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
  k.hold = hold;
  k.ssm2 = ssm2;
  k.ssm1 = ssm1;
}

}  // namespace slimba
