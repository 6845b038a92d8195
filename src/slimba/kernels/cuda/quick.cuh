// One token of Mamba-2's recurrence, like step.cuh, for the shape that models have: N = 128 and 32 channels a block. One
// block a unit, nothing in a loop, and as little as possible after `ready`: of the convolution the new input alone, the
// kept tokens and the state are in registers before.
//
// Warps 0 to 7 own four rows of the state each, a lane four entries of each row; they convolve B and C, warp 8 the x of
// the block. After the second barrier eight lanes finish a row together.
#define QUICK_WARPS 9
#define QUICK_STATE 128
#define QUICK_SPAN 32

struct QuickShared {
  float x[QUICK_SPAN], b[QUICK_STATE], c[QUICK_STATE], weight[KEPT];
};

// The state of a warp's four rows after the last of KEPT tokens. L of token i is in lane i.
DEV void quick_store(const Recurrence& p, const Kept& kept, const QuickShared& v, i64 ssm, float* scales, i64 row0, int first,
                     int group, float now, float l_lane, float decay, float dt, const float (&s)[4][4]) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const i64 type = p.state_type;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const int r = k * WARPS + warp;
    float row[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) row[e] = decay * (k == 0 ? s[0][e] : k == 1 ? s[1][e] : k == 2 ? s[2][e] : s[3][e]);
#pragma unroll 4
    for (int i = 0; i < KEPT; ++i) {
      const bool last = i == KEPT - 1;
      const float by = expf(now - (last ? now : shuffle(l_lane, i)));
      const float u = last ? as_kept(type, dt * v.x[r]) : kept_value(kept, kept.u, (i64)i * p.inner + first + r);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = 4 * lane + e;
        const float b = last ? as_kept(type, v.b[at]) : kept_value(kept, kept.b, ((i64)i * p.groups + group) * QUICK_STATE + at);
        row[e] = fmaf(u * by, b, row[e]);
      }
    }
    u32 top = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const u32 bits = float_to_bits(row[e]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    Int8Scale code = {0, 0};
    if (type == STATE_INT8) {
      code = int8_scale(warp_max_bits(top));
      if (lane == 0) scales[row0 + r] = code.step;
    }
    close_row<true>(type, ssm, row0 + r, QUICK_STATE, row, code.to_code);
  }
}

// FAST: exponentials of decays within 1e-6 of themselves, where products have less digits than that.
template <bool FAST, typename Ready>
DEV void quick_recur(const Recurrence& p, u8* smem, Ready ready) {
  QuickShared& v = *(QuickShared*)smem;
  auto exponential = [](float x) { return FAST ? fast_exp(x) : expf(x); };
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, n = QUICK_STATE;
  const int inner = (int)p.inner, heads = (int)p.heads, groups = (int)p.groups, taps = (int)p.state.taps;
  const int per_sequence = inner / QUICK_SPAN, unit = blockIdx.x, b = unit / per_sequence;
  if (unit >= per_sequence * (int)p.batch) return ready();  // there for the sake of where the blocks go
  const int first = unit % per_sequence * QUICK_SPAN, head = first / (int)p.headdim, group = head / (heads / groups);
  const bool of_head = first % (int)p.headdim == 0, of_group = of_head && head % (heads / groups) == 0, rows = warp < WARPS;
  const i64 ssm = state_array(p.state, 0), slots = state_array(p.state, 4), type = p.state_type, slot = slot_of(p.state, b);
  const i64 row0 = (p.state.layer * slots + slot) * inner + first;
  float* scales = (float*)state_array(p.state, 1);
  const int time = (int)position(p.state, slot), j = time % KEPT;
  const float* ring = (const float*)state_array(p.state, 2) + (p.state.layer * slots + slot) * taps * p.state.channels;
  const Kept kept = kept_of(p.state, type, slot, inner, groups * n, heads);

  float s[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int r = k * WARPS + warp;
    open_row<true>(type, ssm, row0 + r, n, type == STATE_INT8 && rows ? scales[row0 + r] : 0.0f, rows, s[k]);
  }
  const int channel = !rows ? first + lane : inner + group * n + (thread < n ? thread : (groups - 1) * n + thread);
  float sum = p.conv_bias ? ((const float*)p.conv_bias)[channel] : 0.0f;
#pragma unroll
  for (int k = 0; k + 1 < taps; ++k)
    sum = fmaf(((const float*)p.conv_weight)[k * (int)p.state.channels + channel],
               ring[(time + 1 + k) % taps * (int)p.state.channels + channel], sum);
  const float tap = ((const float*)p.conv_weight)[(taps - 1) * (int)p.state.channels + channel];
  const float* input = ring + time % taps * (int)p.state.channels + channel;
  const int mine = lane / 8 * WARPS + warp, q = lane % 8;  // the row that the lane helps to finish, and its tokens q and q + 8
  float u[2], old[2][4], l_token[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int i = q + 8 * k, token = warp + 8 * k;
    u[k] = rows && i < j ? kept_value(kept, kept.u, (i64)i * inner + first + mine) : 0.0f;
    l_token[k] = rows && token < j ? kept.l[token * heads + head] : 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      old[k][e] = rows && token < j ? kept_value(kept, kept.b, ((i64)token * groups + group) * n + 4 * lane + e) : 0.0f;
  }
  const float a = ((const float*)p.a)[head], dt_bias = ((const float*)p.dt_bias)[head];
  const float before = j ? kept.l[(j - 1) * heads + head] : 0.0f, l_lane = lane < j && lane < KEPT ? kept.l[lane * heads + head] : 0.0f;
  const bool finishes = rows && q == 0;
  const float d = finishes ? ((const float*)p.d)[p.d_per_channel ? first + mine : head] : 0.0f;
  const float *dt_at = (const float*)p.dt + b * (int)p.dt_stride + head, *z_at = (const float*)p.z + b * (int)p.z_stride + first + mine;
  ready();

  const float raw = load_fresh(dt_at), in = load_fresh(input), z = p.gated && finishes ? load_fresh(z_at) : 0.0f;
  const float channel_value = silu(fmaf(tap, in, sum));
  (rows ? v.b : v.x)[rows ? thread : lane] = channel_value;  // c lies behind b
  const float dt = softplus(raw + dt_bias, param_float(p.dt_low), param_float(p.dt_high));
  const float now = before + dt * a, decay = exponential(now);
  __syncthreads();
  float y = 0;
  if (rows) {
    const float4 c = *(const float4*)(v.c + 4 * lane), fresh = *(const float4*)(v.b + 4 * lane);
    const float cs[4] = {c.x, c.y, c.z, c.w}, bs[4] = {fresh.x, fresh.y, fresh.z, fresh.w};
    float dot[2] = {0, 0}, row[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int k = 0; k < 2; ++k) dot[k] = fmaf(warp + 8 * k < j ? old[k][e] : as_kept(type, bs[e]), cs[e], dot[k]);
#pragma unroll
      for (int k = 0; k < 4; ++k) row[k] = fmaf(s[k][e], cs[e], row[k]);
    }
    // lanes give away halves of what they have: row lane / 8 and token warp + 8 (lane / 16) are what stays
    const bool upper = lane & 16, odd = lane & 8;
    float one = (upper ? dot[1] : dot[0]) + shuffle_xor(upper ? dot[0] : dot[1], 16);
    float two[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) two[k] = (upper ? row[2 + k] : row[k]) + shuffle_xor(upper ? row[k] : row[2 + k], 16);
    y = decay * ((odd ? two[1] : two[0]) + shuffle_xor(odd ? two[0] : two[1], 8));
#pragma unroll
    for (int by = 8; by; by /= 2) one += shuffle_xor(one, by);
    const int token = warp + (upper ? 8 : 0);
    const float since = token < j ? now - (upper ? l_token[1] : l_token[0]) : 0.0f;
    if (lane % 16 == 0) v.weight[token] = token <= j ? one * exponential(since) : 0.0f;
  }
  __syncthreads();
  if (rows) {
    const float fresh = as_kept(type, dt * v.x[mine]);
#pragma unroll
    for (int k = 0; k < 2; ++k) y = fmaf(v.weight[q + 8 * k], q + 8 * k == j ? fresh : u[k], y);
#pragma unroll
    for (int by = 4; by; by /= 2) y += shuffle_xor(y, by);
    if (finishes) {
      y = fmaf(d, v.x[mine], y);
      if (p.gated) y *= silu(z);
      ((float*)p.y)[b * (int)p.y_stride + first + mine] = y;
      keep_value(kept, kept.u, (i64)j * inner + first + mine, fresh);
    }
    if (of_group && thread < n) keep_value(kept, kept.b, ((i64)j * groups + group) * n + thread, v.b[thread]);
    if (of_head && thread == 0) kept.l[j * heads + head] = now;
    if (j == KEPT - 1) quick_store(p, kept, v, ssm, scales, row0, first, group, now, l_lane, decay, dt, s);
  }
}
