// Causal convolution, step sizes and both recurrences for AVX2 and AVX-512; included by avx2.cpp and avx512.cpp.
//
// Mamba-2 is in blocks.h.
#include "blocks.h"

namespace slimba {
namespace {

inline const float* conv_row(const ConvArgs& a, int64_t t) {
  return t >= 0 ? a.in + t * a.in_stride : a.state + (t + a.taps - 1) * a.weight_stride;
}

inline void conv_any(const ConvArgs& a, int64_t from) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t i = from; i < a.channels; i += W) {
      const int64_t n = a.channels - i;
      vf sum = a.bias ? vload_n(a.bias + i, n) : vzero();
      for (int k = 0; k < a.taps; ++k) {
        sum = vfma(vload_n(a.weight + k * a.weight_stride + i, n), vload_n(conv_row(a, t - (a.taps - 1) + k) + i, n),
                   sum);
      }
      vstore_n(a.out + t * a.out_stride + i, vsilu(sum), n);
    }
  }
}

// Two vectors of channels and four taps over all tokens: weights and the last inputs stay in registers. Same sums.
inline void conv_four(const ConvArgs& a, int64_t i) {
  constexpr int kTaps = 4, kVectors = 2;
  constexpr int64_t kRowsAhead = 8;  // inputs lie rows of in_proj's output apart, too far for the processor to foresee
  vf weight[kTaps][kVectors], bias[kVectors], last[kTaps][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    bias[v] = a.bias ? vload(a.bias + i + v * W) : vzero();
    for (int k = 0; k < kTaps; ++k) weight[k][v] = vload(a.weight + k * a.weight_stride + i + v * W);
    for (int k = 0; k < kTaps - 1; ++k) last[k][v] = vload(a.state + k * a.weight_stride + i + v * W);
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float* in = a.in + t * a.in_stride + i;
    for (int v = 0; v < kVectors * W; v += 16) fetch_line(in + kRowsAhead * a.in_stride + v);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      last[kTaps - 1][v] = vload(in + v * W);
      vf sum = bias[v];
#pragma GCC unroll 4
      for (int k = 0; k < kTaps; ++k) sum = vfma(weight[k][v], last[k][v], sum);
      vstore(a.out + t * a.out_stride + i + v * W, vsilu(sum));
#pragma GCC unroll 4
      for (int k = 0; k + 1 < kTaps; ++k) last[k][v] = last[k + 1][v];
    }
  }
}

void conv_silu(const ConvArgs& a) {
  int64_t first = 0;
  if (a.taps == 4 && a.tokens > 1)
    for (; first + 2 * W <= a.channels; first += 2 * W) conv_four(a, first);
  conv_any(a, first);
  if (!a.keep) return;
  for (int k = 0; k < a.taps - 1; ++k) {  // oldest first: a row is read before it is overwritten
    const float* from = conv_row(a, a.tokens - (a.taps - 1) + k);
    float* to = a.state + k * a.weight_stride;
    for (int64_t i = 0; i < a.channels; i += W) vstore_n(to + i, vload_n(from + i, a.channels - i), a.channels - i);
  }
}

void softplus(const float* x, const float* bias, int64_t n, float low, float high, float* out) {
  for (int64_t i = 0; i < n; i += W) {
    const vf v = vsoftplus(vadd(vload_n(x + i, n - i), vload_n(bias + i, n - i)));
    vstore_n(out + i, vmin(vset(high), vmax(vset(low), v)), n - i);
  }
}

// One channel and token: moves the channel's state s on and returns the products S C, lanes not yet summed up. `top`
// becomes the lanes' largest magnitudes. With `padded`, whole vectors of s may be touched.
inline vf ssm1_step(const Ssm1Args& a, int64_t i, int64_t t, float* s, bool padded, vf& top) {
  const float *b = a.b + t * a.bc_stride, *c = a.c + t * a.bc_stride;
  const float dt = a.dt[t * a.dt_stride + i], x = a.x[t * a.x_stride + i];
  vf y = vzero();
  top = vzero();
  for (int64_t n0 = 0; n0 < a.d_state; n0 += W) {
    const int64_t n = a.d_state - n0, touched = padded ? W : n;
    const vf keep = vexp(vmul(vset(dt), vload_n(a.a + i * a.d_state + n0, n)));
    const vf next = vfma(keep, vload_n(s + n0, touched), vmul(vset(dt * x), vload_n(b + n0, n)));
    vstore_n(s + n0, next, touched);
    y = vfma(next, vload_n(c + n0, n), y);
    top = vmax(top, vabs(next));
  }
  return y;
}

constexpr int64_t kTokens = 16;  // per pass over a state: the partial sums below stay in the first-level cache

// W channels (n of them real) from i on over at most kTokens tokens.
inline void ssm1_block(const Ssm1Args& a, int64_t i, int64_t n) {
  alignas(64) float sums[kTokens * W * W];
  for (int64_t k = 0; k < W; ++k) {
    const StoredRow row = {a.type, a.state, a.state_scale, i + k, a.d_state};
    const bool rounded = a.type != kStateFloat32;
    float* s = rounded ? a.work : (float*)a.state + (i + k) * a.d_state;
    if (rounded && k < n) row.open(s);
    for (int64_t t = 0; t < a.tokens; ++t) {
      vf top = vzero(), y = vzero();
      if (k < n) y = ssm1_step(a, i + k, t, s, rounded, top);
      vstore(sums + (t * W + k) * W, y);
      if (rounded && k < n) row.round(s, top, any_nan(vmul(y, vzero())), t + 1 < a.tokens);
    }
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    vf rows[W];
    for (int k = 0; k < W; ++k) rows[k] = vload(sums + (t * W + k) * W);
    const vf x = vload_n(a.x + t * a.x_stride + i, n);
    vstore_n(a.y + t * a.y_stride + i, vfma(vload_n(a.d + i, n), x, reduce_rows(rows)), n);
  }
}

void ssm1(const Ssm1Args& whole) {
  for (int64_t first = 0; first < whole.tokens; first += kTokens) {
    Ssm1Args a = whole;
    a.tokens = min64(kTokens, whole.tokens - first);
    a.x += first * a.x_stride;
    a.b += first * a.bc_stride;
    a.c += first * a.bc_stride;
    a.dt += first * a.dt_stride;
    a.y += first * a.y_stride;
    for (int64_t i = 0; i < a.channels; i += W) ssm1_block(a, i, min64(W, a.channels - i));
  }
}

void fill(Kernels& k) {
  k.conv_silu = conv_silu;
  k.softplus = softplus;
  k.hold = hold;
  k.ssm2 = ssm2;
  k.ssm1 = ssm1;
}

}  // namespace
}  // namespace slimba
