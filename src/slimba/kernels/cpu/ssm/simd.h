// Causal convolution, step sizes and both recurrences for AVX2 and AVX-512; included by avx2.cpp and avx512.cpp.
//
// The recurrences keep a few rows of the state in registers across all tokens of the call, so the state is read and
// written once per call: in decode that is the memory traffic of the step, in prefill it is next to nothing.
#include "rounded.h"

namespace slimba {
namespace {

inline const float* conv_row(const ConvArgs& a, int64_t t) {
  return t >= 0 ? a.in + t * a.in_stride : a.state + (t + a.taps - 1) * a.weight_stride;
}

void conv_silu(const ConvArgs& a) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t i = 0; i < a.channels; i += W) {
      const int64_t n = a.channels - i;
      vf sum = a.bias ? vload_n(a.bias + i, n) : vzero();
      for (int k = 0; k < a.taps; ++k) {
        sum = vfma(vload_n(a.weight + k * a.weight_stride + i, n), vload_n(conv_row(a, t - (a.taps - 1) + k) + i, n),
                   sum);
      }
      vstore_n(a.out + t * a.out_stride + i, vsilu(sum), n);
    }
  }
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

void decay(const float* dt, const float* a, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W)
    vstore_n(out + i, vexp(vmul(vload_n(dt + i, n - i), vload_n(a + i, n - i))), n - i);
}

constexpr int64_t kTokens = 16;  // per pass over a state: the partial sums below stay in the first-level cache

// In decode a state is read once and comes from memory: what lies kAhead bytes on is fetched meanwhile, that is channels
// of this head or of the next one.
constexpr int64_t kAhead = 4096;
inline void fetch_ahead(const uint8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)row + kAhead + i, _MM_HINT_T0);
}

// RB channels from p on and NV vectors of the state from column n0 on; the last vector may be cut to `last` lanes.
// Adds the products S C of token t and channel p + r, W lanes not yet summed up, to sums[t][r] (W vectors a token).
template <int RB, int NV>
inline void ssm2_tile(const Ssm2Args& a, int64_t p, int64_t n0, int64_t last, float* sums) {
  const auto width = [&](int v) { return v == NV - 1 ? last : W; };
  vf s[RB][NV];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) s[r][v] = vload_n((const float*)a.state + (p + r) * a.d_state + n0 + v * W, width(v));
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float *b = a.b + t * a.xbc_stride + n0, *c = a.c + t * a.xbc_stride + n0;
    const vf decay = vset(a.decay[t * a.dt_stride]);
    vf dx[RB], y[RB];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      dx[r] = vset(a.dt[t * a.dt_stride] * a.x[t * a.xbc_stride + p + r]);
      y[r] = vload(sums + (t * W + r) * W);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const vf bv = vload_n(b + v * W, width(v)), cv = vload_n(c + v * W, width(v));
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) {
        s[r][v] = vfma(decay, s[r][v], vmul(dx[r], bv));
        y[r] = vfma(s[r][v], cv, y[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) vstore(sums + (t * W + r) * W, y[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) vstore_n((float*)a.state + (p + r) * a.d_state + n0 + v * W, s[r][v], width(v));
}

// RB channels over all of N, in pieces as wide as the registers hold.
template <int RB>
inline void ssm2_rows(const Ssm2Args& a, int64_t p, float* sums) {
  fetch_ahead(a.state + p * a.d_state * 4, RB * a.d_state * 4);
  int64_t n0 = 0;
  if (W == 16)
    for (; n0 + 8 * W <= a.d_state; n0 += 8 * W) ssm2_tile<RB, 8>(a, p, n0, W, sums);
  for (; n0 + 4 * W <= a.d_state; n0 += 4 * W) ssm2_tile<RB, 4>(a, p, n0, W, sums);
  for (; n0 + 2 * W <= a.d_state; n0 += 2 * W) ssm2_tile<RB, 2>(a, p, n0, W, sums);
  for (; n0 < a.d_state; n0 += W) ssm2_tile<RB, 1>(a, p, n0, min64(W, a.d_state - n0), sums);
}

// One channel whose state is rounded after every token; sums as above.
inline void ssm2_rounded_row(const Ssm2Args& a, int64_t p, float* sums) {
  const StoredRow row = {a.type, a.state, a.state_scale, p, a.d_state};
  row.open(a.work);
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float *b = a.b + t * a.xbc_stride, *c = a.c + t * a.xbc_stride;
    const vf decay = vset(a.decay[t * a.dt_stride]), dx = vset(a.dt[t * a.dt_stride] * a.x[t * a.xbc_stride + p]);
    vf y = vzero(), top = vzero();
    const auto step = [&](int64_t i, vf bv, vf cv) {
      const vf s = vfma(decay, vload(a.work + i), vmul(dx, bv));
      vstore(a.work + i, s);
      y = vfma(s, cv, y);
      top = vmax(top, vabs(s));
    };
    int64_t i = 0;
    for (; i + W <= a.d_state; i += W) step(i, vload(b + i), vload(c + i));
    if (i < a.d_state) step(i, vload_n(b + i, a.d_state - i), vload_n(c + i, a.d_state - i));
    vstore(sums + t * W * W, y);
    row.round(a.work, top, any_nan(vmul(y, vzero())), t + 1 < a.tokens);
  }
}

// The same arithmetic, in registers, for a row of NV whole vectors; only the last token's state is stored.
template <int NV>
inline void ssm2_bfloat_whole(const Ssm2Args& a, int64_t p, float* sums) {
  uint8_t* const at = a.state + p * NV * W * 2;
  fetch_ahead(at, NV * W * 2);
  vf s[NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) s[v] = load_bfloat(at + 2 * v * W);
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float *b = a.b + t * a.xbc_stride, *c = a.c + t * a.xbc_stride;
    const vf decay = vset(a.decay[t * a.dt_stride]), dx = vset(a.dt[t * a.dt_stride] * a.x[t * a.xbc_stride + p]);
    vf y = vzero();
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      s[v] = vfma(decay, s[v], vmul(dx, vload(b + v * W)));
      y = vfma(s[v], vload(c + v * W), y);
    }
    vstore(sums + t * W * W, y);
    const bool damaged = any_nan(vmul(y, vzero()));  // NaN or infinity in s shows in y
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) s[v] = __builtin_expect(damaged, 0) ? round_bfloat_safely(s[v]) : round_bfloat(s[v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) store_bfloat_n(at + 2 * v * W, s[v], W);
}

template <int NV>
inline void ssm2_int8_whole(const Ssm2Args& a, int64_t p, float* sums) {
  uint8_t* const at = a.state + p * NV * W;
  fetch_ahead(at, NV * W);
  float scale = a.state_scale[p];
  vf code[NV];  // whole numbers; the state is scale times them
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) code[v] = load_int8(at + v * W);
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float *b = a.b + t * a.xbc_stride, *c = a.c + t * a.xbc_stride;
    const vf decay = vset(a.decay[t * a.dt_stride]), dx = vset(a.dt[t * a.dt_stride] * a.x[t * a.xbc_stride + p]);
    const vf step = vset(scale);
    vf y = vzero(), top = vzero();
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      code[v] = vfma(decay, vmul(code[v], step), vmul(dx, vload(b + v * W)));
      y = vfma(code[v], vload(c + v * W), y);
      top = vmax(top, vabs(code[v]));
    }
    vstore(sums + t * W * W, y);
    const auto [next, inverse] = int8_scale(top, any_nan(vmul(y, vzero())));
    scale = next;
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) code[v] = vround(vmul(code[v], vset(inverse)));
  }
  a.state_scale[p] = scale;
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) store_int8_n(at + v * W, code[v], W);
}

inline void ssm2_rounded(const Ssm2Args& a, int64_t p, float* sums) {
  const bool bfloat = a.type == kStateBfloat16;
  if (a.d_state == 128) return bfloat ? ssm2_bfloat_whole<128 / W>(a, p, sums) : ssm2_int8_whole<128 / W>(a, p, sums);
  if (a.d_state == 64) return bfloat ? ssm2_bfloat_whole<64 / W>(a, p, sums) : ssm2_int8_whole<64 / W>(a, p, sums);
  ssm2_rounded_row(a, p, sums);
}

// W channels (n of them real) over at most kTokens tokens.
inline void ssm2_block(const Ssm2Args& a, int64_t p, int64_t n) {
  alignas(64) float sums[kTokens * W * W];
  for (int64_t i = 0; i < a.tokens * W; ++i) vstore(sums + i * W, vzero());
  int64_t r = 0;
  if (a.type != kStateFloat32)
    for (; r < n; ++r) ssm2_rounded(a, p + r, sums + r * W);
  for (; r + 2 <= n; r += 2) ssm2_rows<2>(a, p + r, sums + r * W);
  for (; r < n; ++r) ssm2_rows<1>(a, p + r, sums + r * W);
  const vf d = a.d_per_channel ? vload_n(a.d + p, n) : vset(a.d[0]);
  for (int64_t t = 0; t < a.tokens; ++t) {
    vf rows[W];
    for (int k = 0; k < W; ++k) rows[k] = vload(sums + (t * W + k) * W);
    vstore_n(a.y + t * a.y_stride + p, vfma(d, vload_n(a.x + t * a.xbc_stride + p, n), reduce_rows(rows)), n);
  }
}

void ssm2(const Ssm2Args& whole) {
  for (int64_t first = 0; first < whole.tokens; first += kTokens) {
    Ssm2Args a = whole;
    a.tokens = min64(kTokens, whole.tokens - first);
    a.x += first * a.xbc_stride;
    a.b += first * a.xbc_stride;
    a.c += first * a.xbc_stride;
    a.dt += first * a.dt_stride;
    a.decay += first * a.dt_stride;
    a.y += first * a.y_stride;
    for (int64_t p = 0; p < a.headdim; p += W) ssm2_block(a, p, min64(W, a.headdim - p));
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
  k.decay = decay;
  k.ssm2 = ssm2;
  k.ssm1 = ssm1;
}

}  // namespace
}  // namespace slimba
