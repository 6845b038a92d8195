// Mamba-2's recurrence over many tokens, token by token: exact for every state type, the rounding of a stored state after
// every KEPT-th token included (step.cuh says what is stored). Naive twin: tests/runtime/numpy_reference.py (mixer2).
//
// What was kept of earlier tokens is replayed first, so that the state in registers is that of the token before.
// A block owns `span` channels of one head of one sequence and walks over the tokens in pieces of SCAN_TOKENS, whose
// inputs lie in shared memory; a warp owns rows of N state entries, which stay in registers.
#define SCAN_TOKENS 16

template <typename T, int VEC, bool QUAD>
DEV void scan(const Scan& p, u8* smem) {
  constexpr int ROWS = 4, EACH = 4 * VEC;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = (int)p.d_state, span = (int)p.span;
  const int width = span + 2 * n;
  float *in = (float*)smem, *dts = in + SCAN_TOKENS * width, *decays = dts + SCAN_TOKENS;  // in [tokens][x | B | C]
  const i64 per_sequence = p.inner / p.span, ssm = state_array(p.state, 0), type = p.state_type;
  const int b = (int)(blockIdx.x / per_sequence);
  const i64 first = blockIdx.x % per_sequence * p.span, head = first / p.headdim, group = head / (p.heads / p.groups);
  const i64 slot = slot_of(p.state, b), row0 = (p.state.layer * state_array(p.state, 4) + slot) * p.inner + first;
  const Span when = span_of((int)position(p.state, slot), p.length);
  const Kept kept = kept_of(p.state, type, slot, p.inner, p.groups * n, p.heads);
  float* scales = (float*)state_array(p.state, 1);
  const float a = ((const float*)p.a)[head], bias = ((const float*)p.dt_bias)[head];
  float s[ROWS][EACH];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int r = j * WARPS + warp;
    const float scale = type == STATE_INT8 && r < span ? scales[row0 + r] : 0.0f;
    open_row<QUAD>(type, ssm, row0 + r, n, scale, r < span, s[j]);
  }
  float since = 0;  // L of the token before
#pragma unroll 1
  for (int i = 0; i < when.before; ++i) {
    const float l = kept.l[i * p.heads + head], decay = expf(l - since);
    since = l;
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      const int r = j * WARPS + warp;
      const float u = r < span ? kept_value(kept, kept.u, i * p.inner + first + r) : 0.0f;
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int e = entry_of<QUAD>(lane, k);
        if (QUAD || e < n) s[j][k] = fmaf(decay, s[j][k], u * kept_value(kept, kept.b, (i * p.groups + group) * n + e));
      }
    }
  }
  for (i64 t0 = 0; t0 < p.length; t0 += SCAN_TOKENS) {
    const int tokens = (int)least(SCAN_TOKENS, p.length - t0);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * width; i += THREADS) {
      const int c = i % width;
      const i64 of_b = p.inner + group * n + c - span, of_c = of_b + (p.groups - 1) * n;
      const i64 channel = c < span ? first + c : c < span + n ? of_b : of_c;
      in[i] = load((const T*)p.xbc, ((i64)b * p.length + t0 + i / width) * p.xbc_stride + channel);
    }
    if (threadIdx.x < tokens) {
      const float raw = ((const float*)p.dt)[((i64)b * p.length + t0 + threadIdx.x) * p.dt_stride + head] + bias;
      const float dt = softplus(raw, param_float(p.dt_low), param_float(p.dt_high));
      dts[threadIdx.x] = dt;
      decays[threadIdx.x] = expf(dt * a);
    }
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
      const float *x = in + t * width, *bs = x + span, *cs = bs + n;
      const float dt = dts[t], decay = decays[t];
      const int after = (int)t0 + t + 1, place = when.at + (int)t0 + t - when.stored;  // in the buffer
      const bool full = (when.before + after) % KEPT == 0, keeps = after > when.stored;
      float sum[ROWS];
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const int r = j * WARPS + warp;
        const float u = r < span ? as_kept(type, dt * x[r]) : 0.0f;
        u32 top = 0;
        sum[j] = 0;
        if (keeps && lane == 0 && r < span) keep_value(kept, kept.u, place * p.inner + first + r, u);
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
          const int i = entry_of<QUAD>(lane, k);
          if (!QUAD && i >= n) continue;
          s[j][k] = fmaf(decay, s[j][k], u * as_kept(type, bs[i]));
          sum[j] = fmaf(s[j][k], cs[i], sum[j]);
          const u32 bits = float_to_bits(s[j][k]) & 0x7fffffffu;
          top = bits > top ? bits : top;
        }
        if (!full) continue;
        Int8Scale code = {0, 0};
        if (type == STATE_INT8) code = int8_scale(warp_max_bits(top));
        if (after == when.stored && r < span) {
          if (type == STATE_INT8 && lane == 0) scales[row0 + r] = code.step;
          close_row<QUAD>(type, ssm, row0 + r, n, s[j], code.to_code);
        }
        if (type == STATE_F32) continue;
#pragma unroll
        for (int k = 0; k < EACH; ++k) s[j][k] = rounded(type, s[j][k], code);
      }
#pragma unroll
      for (int j = 0; j < ROWS; ++j) sum[j] = warp_sum(sum[j]);
      const int r = lane * WARPS + warp;  // lane j stores row j
      if (lane < ROWS && r < span) {
        const i64 channel = first + r;
        const float d = ((const float*)p.d)[p.d_per_channel ? channel : head];
        const float own = lane == 0 ? sum[0] : lane == 1 ? sum[1] : lane == 2 ? sum[2] : sum[3];
        store((T*)p.y, ((i64)b * p.length + t0 + t) * p.y_stride + channel, fmaf(d, x[r], own));
      }
    }
  }
}

#define SCAN_INSTANCE(name, T, VEC, QUAD) \
  KERNEL(name, Scan, THREADS) { \
    SHARED(smem); \
    scan<T, VEC, QUAD>(p, smem); \
  }
SCAN_INSTANCE(slimba_scan_half_1, Half, 1, false)
SCAN_INSTANCE(slimba_scan_half_quad, Half, 1, true)
SCAN_INSTANCE(slimba_scan_half_2, Half, 2, false)
SCAN_INSTANCE(slimba_scan_float_1, float, 1, false)
SCAN_INSTANCE(slimba_scan_float_quad, float, 1, true)
SCAN_INSTANCE(slimba_scan_float_2, float, 2, false)
