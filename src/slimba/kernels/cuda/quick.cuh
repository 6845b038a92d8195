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

// What a thread has of its unit before the kernel before has ended.
struct QuickUnit {
  int first, head, group, j, mine, q;  // mine: the row that the lane helps to finish, q: of the kept tokens q and q + 8
  bool of_head, of_group, rows, finishes;
  i64 ssm, row0;
  float *scales, *newest;  // newest: where the convolution's inputs of this token are
  Kept kept;
  float s[4][4], u[2], old[2][4], l_token[2], a, dt_bias, before, l_lane, d;
};
// The convolution of one channel without this token's input.
struct QuickTaps {
  float sum, tap;
};

DEV QuickTaps quick_taps(const Recurrence& p, const float* ring, int time, int channel) {
  const int taps = (int)p.state.taps;
  float sum = p.conv_bias ? ((const float*)p.conv_bias)[channel] : 0.0f;
#pragma unroll
  for (int k = 0; k + 1 < taps; ++k)
    sum = fmaf(((const float*)p.conv_weight)[k * (int)p.state.channels + channel],
               ring[(time + 1 + k) % taps * (int)p.state.channels + channel], sum);
  return {sum, ((const float*)p.conv_weight)[(taps - 1) * (int)p.state.channels + channel]};
}

// channel: of the convolution, for this thread; taps: all of it but the new input.
DEV QuickUnit quick_open(const Recurrence& p, int unit, int b, int channel, QuickTaps& conv) {
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, n = QUICK_STATE;
  const int inner = (int)p.inner, heads = (int)p.heads, groups = (int)p.groups, taps = (int)p.state.taps;
  QuickUnit o;
  o.first = unit * QUICK_SPAN, o.head = o.first / (int)p.headdim, o.group = o.head / (heads / groups);
  o.of_head = o.first % (int)p.headdim == 0, o.of_group = o.of_head && o.head % (heads / groups) == 0, o.rows = warp < WARPS;
  o.ssm = state_array(p.state, 0);
  const i64 slots = state_array(p.state, 4), type = p.state_type, slot = slot_of(p.state, b);
  o.row0 = (p.state.layer * slots + slot) * inner + o.first;
  o.scales = (float*)state_array(p.state, 1);
  const int time = (int)position(p.state, slot);
  o.j = time % KEPT;
  float* ring = (float*)state_array(p.state, 2) + (p.state.layer * slots + slot) * taps * p.state.channels;
  o.newest = ring + time % taps * (int)p.state.channels;
  o.kept = kept_of(p.state, type, slot, inner, groups * n, heads);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int r = k * WARPS + warp;
    open_row<true>(type, o.ssm, o.row0 + r, n, type == STATE_INT8 && o.rows ? o.scales[o.row0 + r] : 0.0f, o.rows, o.s[k]);
  }
  conv = quick_taps(p, ring, time, channel);
  o.mine = lane / 8 * WARPS + warp, o.q = lane % 8;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int i = o.q + 8 * k, token = warp + 8 * k;
    o.u[k] = o.rows && i < o.j ? kept_value(o.kept, o.kept.u, (i64)i * inner + o.first + o.mine) : 0.0f;
    o.l_token[k] = o.rows && token < o.j ? o.kept.l[token * heads + o.head] : 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      o.old[k][e] = o.rows && token < o.j ? kept_value(o.kept, o.kept.b, ((i64)token * groups + o.group) * n + 4 * lane + e) : 0.0f;
  }
  o.a = ((const float*)p.a)[o.head], o.dt_bias = ((const float*)p.dt_bias)[o.head];
  o.before = o.j ? o.kept.l[(o.j - 1) * heads + o.head] : 0.0f;
  o.l_lane = lane < o.j && lane < KEPT ? o.kept.l[lane * heads + o.head] : 0.0f;
  o.finishes = o.rows && o.q == 0;
  o.d = o.finishes ? ((const float*)p.d)[p.d_per_channel ? o.first + o.mine : o.head] : 0.0f;
  return o;
}

struct QuickTime {  // of this token: dt, the sum of dt a since the last storing, and its exponential
  float dt, now, decay;
};
DEV QuickTime quick_time(const Recurrence& p, const QuickUnit& o, float raw) {
  const float dt = softplus(raw + o.dt_bias, param_float(p.dt_low), param_float(p.dt_high)), now = o.before + dt * o.a;
  return {dt, now, expf(now)};
}

// From x, B and C in shared memory to y, and what is kept. z: of the row that a thread finishes.
DEV void quick_close(const Recurrence& p, QuickShared& v, const QuickUnit& o, const QuickTime& w, float z, int b) {
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, n = QUICK_STATE, j = o.j;
  const int inner = (int)p.inner, heads = (int)p.heads, groups = (int)p.groups;
  const i64 type = p.state_type;
  float y = 0;
  if (o.rows) {
    const float4 c = *(const float4*)(v.c + 4 * lane), fresh = *(const float4*)(v.b + 4 * lane);
    const float cs[4] = {c.x, c.y, c.z, c.w}, bs[4] = {fresh.x, fresh.y, fresh.z, fresh.w};
    float dot[2] = {0, 0}, row[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int k = 0; k < 2; ++k) dot[k] = fmaf(warp + 8 * k < j ? o.old[k][e] : as_kept(type, bs[e]), cs[e], dot[k]);
#pragma unroll
      for (int k = 0; k < 4; ++k) row[k] = fmaf(o.s[k][e], cs[e], row[k]);
    }
    // lanes give away halves of what they have: row lane / 8 and token warp + 8 (lane / 16) are what stays
    const bool upper = lane & 16, odd = lane & 8;
    float one = (upper ? dot[1] : dot[0]) + shuffle_xor(upper ? dot[0] : dot[1], 16);
    float two[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) two[k] = (upper ? row[2 + k] : row[k]) + shuffle_xor(upper ? row[k] : row[2 + k], 16);
    y = w.decay * ((odd ? two[1] : two[0]) + shuffle_xor(odd ? two[0] : two[1], 8));
#pragma unroll
    for (int by = 8; by; by /= 2) one += shuffle_xor(one, by);
    const int token = warp + (upper ? 8 : 0);
    const float since = token < j ? w.now - (upper ? o.l_token[1] : o.l_token[0]) : 0.0f;
    if (lane % 16 == 0) v.weight[token] = token <= j ? one * expf(since) : 0.0f;
  }
  __syncthreads();
  if (o.rows) {
    const float fresh = as_kept(type, w.dt * v.x[o.mine]);
#pragma unroll
    for (int k = 0; k < 2; ++k) y = fmaf(v.weight[o.q + 8 * k], o.q + 8 * k == j ? fresh : o.u[k], y);
#pragma unroll
    for (int by = 4; by; by /= 2) y += shuffle_xor(y, by);
    if (o.finishes) {
      y = fmaf(o.d, v.x[o.mine], y);
      if (p.gated) y *= silu(z);
      ((float*)p.y)[b * (int)p.y_stride + o.first + o.mine] = y;
      keep_value(o.kept, o.kept.u, (i64)j * inner + o.first + o.mine, fresh);
    }
    if (o.of_group && thread < n) keep_value(o.kept, o.kept.b, ((i64)j * groups + o.group) * n + thread, v.b[thread]);
    if (o.of_head && thread == 0) o.kept.l[j * heads + o.head] = w.now;
    if (j == KEPT - 1) quick_store(p, o.kept, v, o.ssm, o.scales, o.row0, o.first, o.group, w.now, o.l_lane, w.decay, w.dt, o.s);
  }
}

template <typename Ready>
DEV void quick_recur(const Recurrence& p, u8* smem, Ready ready) {
  QuickShared& v = *(QuickShared*)smem;
  const int thread = threadIdx.x, n = QUICK_STATE, inner = (int)p.inner, groups = (int)p.groups;
  const int per_sequence = inner / QUICK_SPAN, unit = blockIdx.x % per_sequence, b = blockIdx.x / per_sequence;
  if (b >= (int)p.batch) return ready();  // there for the sake of where the blocks go
  const bool rows = thread < WARPS * WARP;
  const int group = unit * QUICK_SPAN / (int)p.headdim / ((int)p.heads / groups);
  const int channel = !rows ? unit * QUICK_SPAN + thread % WARP : inner + group * n + (thread < n ? thread : (groups - 1) * n + thread);
  QuickTaps conv;
  const QuickUnit o = quick_open(p, unit, b, channel, conv);
  const float *dt_at = (const float*)p.dt + b * (int)p.dt_stride + o.head;
  const float *z_at = (const float*)p.z + b * (int)p.z_stride + o.first + o.mine, *input = o.newest + channel;
  ready();
  const float raw = load_fresh(dt_at), in = load_fresh(input), z = p.gated && o.finishes ? load_fresh(z_at) : 0.0f;
  (rows ? v.b : v.x)[rows ? thread : thread % WARP] = silu(fmaf(conv.tap, in, conv.sum));  // c lies behind b
  const QuickTime w = quick_time(p, o, raw);
  __syncthreads();
  quick_close(p, v, o, w, z, b);
}
