// Mamba-1's recurrence over many tokens, token by token, with its skip and gate (Gu & Dao 2023, arXiv 2312.00752):
//
//   h <- exp(dt a) h + dt x B,   y = (<h, C> + D x) silu(z)
// Exact for every state type, the rounding after every token included. Naive twin: tests/runtime/numpy_reference.py
// (mixer1). Sixteen lanes own a channel; lane l has the entries l, l + 16, ...
#define LANES1 16
#define EACH1 8  // entries of a lane: N up to 128

struct Scan1 {
  StateRef state;
  i64 batch, length, d_state, inner, state_type;
  i64 a, d, dt_bias;  // float32: [I][N], [I], [I]
  i64 x, x_stride, z, z_stride, y, y_stride;  // as the kernel's type
  i64 dt, dt_stride, bc, bc_stride;           // float32; bc: B and C side by side
};

DEV float sum16(float v) {
  for (int m = LANES1 / 2; m; m >>= 1) v += shuffle_xor(v, m);
  return v;
}
DEV u32 max16(u32 v) {
  for (int m = LANES1 / 2; m; m >>= 1) {
    const u32 other = float_to_bits(shuffle_xor(bits_to_float(v), m));
    v = other > v ? other : v;
  }
  return v;
}

// Grid: channels in 16s, sequences.
template <typename T>
DEV void scan1(const Scan1& p) {
  const int lane = threadIdx.x % LANES1, n = (int)p.d_state, b = blockIdx.y;
  const i64 wanted = (i64)blockIdx.x * (THREADS / LANES1) + threadIdx.x / LANES1;
  const bool on = wanted < p.inner;  // all lanes take part in the sums
  const i64 channel = on ? wanted : p.inner - 1, type = p.state_type, ssm = state_array(p.state, 0);
  const i64 row = (p.state.layer * state_array(p.state, 4) + slot_of(p.state, b)) * p.inner + channel;
  float* scales = (float*)state_array(p.state, 1);
  const float d = ((const float*)p.d)[channel], bias = ((const float*)p.dt_bias)[channel];
  float h[EACH1], a[EACH1];
  Int8Scale code = {type == STATE_INT8 ? scales[row] : 0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < EACH1; ++k) {
    const int i = lane + LANES1 * k;
    h[k] = i < n ? open_entry(type, ssm, row * n + i, code.step) : 0.0f;
    a[k] = i < n ? ((const float*)p.a)[channel * n + i] : 0.0f;
  }
  for (i64 t = 0; t < p.length; ++t) {
    const i64 token = (i64)b * p.length + t;
    const float x = load((const T*)p.x, token * p.x_stride + channel);
    const float dt = softplus(((const float*)p.dt)[token * p.dt_stride + channel] + bias, 0.0f, bits_to_float(INF_BITS));
    const float* bc = (const float*)p.bc + token * p.bc_stride;
    float sum = 0;
    u32 top = 0;
#pragma unroll
    for (int k = 0; k < EACH1; ++k) {
      const int i = lane + LANES1 * k;
      if (i >= n) continue;
      h[k] = fmaf(expf(dt * a[k]), h[k], dt * x * bc[i]);
      sum = fmaf(h[k], bc[n + i], sum);
      const u32 bits = float_to_bits(h[k]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    if (type == STATE_INT8) code = int8_scale(max16(top));
    if (type != STATE_F32 && t + 1 < p.length)
      for (int k = 0; k < EACH1; ++k) h[k] = rounded(type, h[k], code);
    sum = sum16(sum);
    if (on && lane == 0)
      store((T*)p.y, token * p.y_stride + channel,
            fmaf(d, x, sum) * silu(load((const T*)p.z, token * p.z_stride + channel)));
  }
  if (!on) return;
  if (type == STATE_INT8 && lane == 0) scales[row] = code.step;
#pragma unroll
  for (int k = 0; k < EACH1; ++k) {
    const int i = lane + LANES1 * k;
    if (i < n) close_entry(type, ssm, row * n + i, h[k], code.to_code);
  }
}
INSTANCES(slimba_scan1, Scan1, scan1<Half>(p), scan1<float>(p))
