// One token of Mamba-2's recurrence for a small batch: convolution, SSM step, skip and gate, fused.
//
// The stored state S is written after every KEPT-th token only; what came since is in the state's buffer (docs/decisions.md,
// "Recurrent state"). With u = dt x, L the sum of dt a since the last writing, and this token the j-th:
//   g = (exp(L_j) S C_j + sum over i <= j of exp(L_j - L_i) (b_i . C_j) u_i + D x_j) silu(z)
//   after the last of KEPT:  S <- exp(L_j) S + sum over i of exp(L_j - L_i) u_i b_i^T
// Naive twin: tests/runtime/numpy_reference.py (mixer2). A block owns `span` channels of one head of one sequence; a
// warp owns rows of N <= 128 VEC state entries, lane l the entries l, l + 32, ...
struct Recurrence {
  StateRef state;
  i64 batch, heads, headdim, d_state, groups, inner, span, state_type, d_per_channel, gated;
  i64 conv_weight, conv_bias, a, d, dt_bias;  // float32; conv_weight [taps][channels], conv_bias may be 0
  i64 dt, dt_stride, z, z_stride, y, y_stride;
  i64 dt_low, dt_high;
};

// One entry of a stored state as a number; `scale` is its row's.
DEV float open_entry(i64 type, i64 ssm, i64 index, float scale) {
  if (type == STATE_F32) return ((const float*)ssm)[index];
  if (type == STATE_BF16) return bfloat_to_float(((const u16*)ssm)[index]);
  return scale * (float)((const i8*)ssm)[index];
}
DEV void close_entry(i64 type, i64 ssm, i64 index, float value, float to_code) {
  if (type == STATE_F32) ((float*)ssm)[index] = value;
  else if (type == STATE_BF16) ((u16*)ssm)[index] = float_to_bfloat(value);
  else ((i8*)ssm)[index] = (i8)__float2int_rn(value * to_code);
}
// Four consecutive entries at once; index is a multiple of four.
DEV void open_quad(i64 type, i64 ssm, i64 index, float scale, float (&v)[4]) {
  if (type == STATE_F32) {
    const float4 f = *(const float4*)((const float*)ssm + index);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else if (type == STATE_BF16) {
    const uint2 two = *(const uint2*)((const u16*)ssm + index);
    v[0] = bits_to_float(two.x << 16), v[1] = bits_to_float(two.x & 0xffff0000u);
    v[2] = bits_to_float(two.y << 16), v[3] = bits_to_float(two.y & 0xffff0000u);
  } else {
    const u32 codes = *(const u32*)((const i8*)ssm + index);
    for (int k = 0; k < 4; ++k) v[k] = scale * (float)(i8)(codes >> 8 * k);
  }
}
DEV void close_quad(i64 type, i64 ssm, i64 index, const float (&v)[4], float to_code) {
  if (type == STATE_F32) {
    *(float4*)((float*)ssm + index) = float4{v[0], v[1], v[2], v[3]};
  } else if (type == STATE_BF16) {
    const u32 lo = float_to_bfloat(v[0]) | (u32)float_to_bfloat(v[1]) << 16;
    *(uint2*)((u16*)ssm + index) = uint2{lo, float_to_bfloat(v[2]) | (u32)float_to_bfloat(v[3]) << 16};
  } else {
    u32 codes = 0;
    for (int k = 0; k < 4; ++k) codes |= (u32)(u8)(i8)__float2int_rn(v[k] * to_code) << 8 * k;
    *(u32*)((i8*)ssm + index) = codes;
  }
}
// A lane's entries of a row: k-th of EACH. QUAD (N = 128): four side by side, in one access.
template <bool QUAD>
DEV int entry_of(int lane, int k) {
  return QUAD ? lane * 4 + k : k * WARP + lane;
}
template <bool QUAD, int EACH>
DEV void open_row(i64 type, i64 ssm, i64 row, int n, float scale, bool there, float (&s)[EACH]) {
  const int lane = threadIdx.x % WARP;
  if constexpr (QUAD) {
    for (int k = 0; k < 4; ++k) s[k] = 0.0f;
    if (there) open_quad(type, ssm, row * n + lane * 4, scale, s);
  } else {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = k * WARP + lane;
      s[k] = there && i < n ? open_entry(type, ssm, row * n + i, scale) : 0.0f;
    }
  }
}
template <bool QUAD, int EACH>
DEV void close_row(i64 type, i64 ssm, i64 row, int n, const float (&s)[EACH], float to_code) {
  const int lane = threadIdx.x % WARP;
  if constexpr (QUAD) {
    close_quad(type, ssm, row * n + lane * 4, s, to_code);
  } else {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = k * WARP + lane;
      if (i < n) close_entry(type, ssm, row * n + i, s[k], to_code);
    }
  }
}
struct Int8Scale {
  float step, to_code;  // a code is round(s * to_code), its value code * step
};
DEV Int8Scale int8_scale(u32 top) {  // top: the bits of the largest magnitude of a row
  const float most = bits_to_float(top);
  if (top >= INF_BITS) return {bits_to_float(0x7fc00000u), 0.0f};
  if (most < 1e-30f) return {0.0f, 0.0f};
  return {most * (1.0f / 127.0f), 127.0f * fast_reciprocal(most)};
}

// What is kept of the tokens since the state was stored: u [KEPT][I], b [KEPT][G N] and L [KEPT][H] of one sequence.
#define KEPT 16
struct Kept {
  i64 type, u, b;
  float* l;
};
DEV Kept kept_of(const StateRef& s, i64 type, i64 slot, i64 inner, i64 group_entries, i64 heads) {
  const i64 at = (s.layer * state_array(s, 4) + slot) * KEPT, size = type == STATE_F32 ? 4 : 2;
  return {type, state_array(s, 5) + at * inner * size, state_array(s, 6) + at * group_entries * size,
          (float*)state_array(s, 7) + at * heads};
}
DEV float kept_value(const Kept& k, i64 array, i64 i) {
  return k.type == STATE_F32 ? ((const float*)array)[i] : bfloat_to_float(((const u16*)array)[i]);
}
DEV void keep_value(const Kept& k, i64 array, i64 i, float v) {
  if (k.type == STATE_F32) ((float*)array)[i] = v;
  else ((u16*)array)[i] = float_to_bfloat(v);
}
DEV float as_kept(i64 type, float v) { return type == STATE_F32 ? v : bfloat_to_float(float_to_bfloat(v)); }

#define MAX_TAPS 8
// A channel of the convolution: its weights are asked for before the new input is there.
struct ConvChannel {
  float weight[MAX_TAPS], bias;
};
DEV ConvChannel ask_channel(const StateRef& s, i64 weight, i64 bias, int channel) {
  ConvChannel c;
#pragma unroll
  for (int k = 0; k < MAX_TAPS; ++k)
    c.weight[k] = k < (int)s.taps ? ((const float*)weight)[k * (int)s.channels + channel] : 0.0f;
  c.bias = bias ? ((const float*)bias)[channel] : 0.0f;
  return c;
}
// The inputs of a channel for token `time`; `ring` is the sequence's, which holds the token's own input too.
struct ConvInput {
  float in[MAX_TAPS];
};
DEV ConvInput ask_input(const StateRef& s, const float* ring, int time, int channel) {
  ConvInput x;
#pragma unroll
  for (int k = 0; k < MAX_TAPS; ++k)
    x.in[k] = k < (int)s.taps ? load_fresh(ring + (time + 1 + k) % (int)s.taps * (int)s.channels + channel) : 0.0f;
  return x;
}
DEV float convolve(const ConvChannel& c, const ConvInput& x) {
  float sum = c.bias;
#pragma unroll
  for (int k = 0; k < MAX_TAPS; ++k) sum = fmaf(c.weight[k], x.in[k], sum);
  return silu(sum);
}

// `ready` waits for the kernel before; it is called once, after everything that does not depend on it has been asked for.
template <int VEC, bool QUAD, typename Ready>
DEV void recur(const Recurrence& p, u8* smem, int block, int blocks, Ready ready) {
  constexpr int ROWS = 4, EACH = 4 * VEC;  // rows of a warp, entries of a row in a lane; span <= ROWS * WARPS
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = (int)p.d_state, span = (int)p.span;
  float *xs = (float*)smem, *bs = xs + span, *cs = bs + n, *us = cs + n, *kept_b = us + KEPT * span;
  float *weight = kept_b + KEPT * n, *since = weight + KEPT;  // exp(L_j - L_i) with and without b_i . C_j
  const int inner = (int)p.inner, per_sequence = inner / span, units = (int)p.batch * per_sequence;
  const i64 ssm = state_array(p.state, 0), slots = state_array(p.state, 4), type = p.state_type;
  float* scales = (float*)state_array(p.state, 1);
  if (block >= units) ready();
#pragma unroll 1
  for (int unit = block; unit < units; unit += blocks) {
    const int b = unit / per_sequence, first = unit % per_sequence * span, head = first / (int)p.headdim;
    const int heads = (int)p.heads, group = head / (heads / (int)p.groups);
    const i64 slot = slot_of(p.state, b), row0 = (p.state.layer * slots + slot) * inner + first;
    const int time = (int)position(p.state, slot), j = time % KEPT;
    const float* ring = (const float*)state_array(p.state, 2) + (p.state.layer * slots + slot) * p.state.taps * p.state.channels;
    const Kept kept = kept_of(p.state, type, slot, inner, p.groups * n, heads);
    auto channel_of = [&](int i) {  // of the convolution: this block's of x, then B and C of its group
      const int of_b = inner + group * n + i - span, of_c = of_b + (int)(p.groups - 1) * n;
      return i < span ? first + i : i < span + n ? of_b : of_c;
    };
    const float a = ((const float*)p.a)[head], dt_bias = ((const float*)p.dt_bias)[head];
    const float before = j ? kept.l[(j - 1) * heads + head] : 0.0f;
    const float l_lane = lane < j ? kept.l[lane * heads + head] : 0.0f;
    float s[ROWS][EACH];
    const int own = lane * WARPS + warp;  // the row that lane k < ROWS finishes, its warp's k-th
    const bool finishes = lane < ROWS && own < span;
    const float d = finishes ? ((const float*)p.d)[p.d_per_channel ? first + own : head] : 0.0f;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int r = k * WARPS + warp;
      const float scale = type == STATE_INT8 && r < span ? scales[row0 + r] : 0.0f;
      open_row<QUAD>(type, ssm, row0 + r, n, scale, r < span, s[k]);
    }
    const int mine = threadIdx.x, width = span + 2 * n;
    const int second = mine + THREADS < width ? mine + THREADS : 0;
    const ConvChannel c0 = ask_channel(p.state, p.conv_weight, p.conv_bias, channel_of(mine < width ? mine : 0));
    const ConvChannel c1 = ask_channel(p.state, p.conv_weight, p.conv_bias, channel_of(second));
#pragma unroll 2
    for (int i = mine; i < j * span; i += THREADS) us[i] = kept_value(kept, kept.u, (i64)(i / span) * inner + first + i % span);
#pragma unroll 4
    for (int i = mine; i < j * n; i += THREADS)
      kept_b[i] = kept_value(kept, kept.b, ((i64)(i / n) * p.groups + group) * n + i % n);
    if (unit == block) ready();
    const float raw = load_fresh((const float*)p.dt + b * (int)p.dt_stride + head);
    const ConvInput x0 = ask_input(p.state, ring, time, channel_of(mine < width ? mine : 0));
    const ConvInput x1 = ask_input(p.state, ring, time, channel_of(second));
    const float z = p.gated && finishes ? load_fresh((const float*)p.z + b * (int)p.z_stride + first + own) : 0.0f;
    if (mine < width) xs[mine] = convolve(c0, x0);
    if (second) xs[second] = convolve(c1, x1);
#pragma unroll 1
    for (int i = mine + 2 * THREADS; i < width; i += THREADS) {
      const ConvChannel c = ask_channel(p.state, p.conv_weight, p.conv_bias, channel_of(i));
      xs[i] = convolve(c, ask_input(p.state, ring, time, channel_of(i)));
    }
    const float dt = softplus(raw + dt_bias, param_float(p.dt_low), param_float(p.dt_high));
    const float now = before + dt * a, decay = expf(now);
    const bool of_head = first % (int)p.headdim == 0, of_group = of_head && head % (heads / (int)p.groups) == 0;
    if (of_head && mine == 0) kept.l[j * heads + head] = now;
    __syncthreads();
    if (mine < span) {
      const float u = as_kept(type, dt * xs[mine]);
      us[j * span + mine] = u;
      keep_value(kept, kept.u, j * inner + first + mine, u);
    }
    if (mine < n) {  // N <= THREADS
      kept_b[j * n + mine] = as_kept(type, bs[mine]);
      if (of_group) keep_value(kept, kept.b, (j * (int)p.groups + group) * n + mine, bs[mine]);
    }
    float dot[KEPT / WARPS] = {}, sum[ROWS] = {};  // b_i . C_j of two tokens a warp; S C_j of its rows
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int at = entry_of<QUAD>(lane, e);
      if (!QUAD && at >= n) continue;
      const float c = cs[at];
#pragma unroll
      for (int k = 0; k < KEPT / WARPS; ++k) {
        const int i = k * WARPS + warp;
        dot[k] = fmaf(as_kept(type, (i < j ? kept_b + i * n : bs)[at]), c, dot[k]);  // what was kept is rounded already
      }
#pragma unroll
      for (int k = 0; k < ROWS; ++k) sum[k] = fmaf(s[k][e], c, sum[k]);
    }
#pragma unroll
    for (int m = 16; m; m >>= 1)
#pragma unroll
      for (int k = 0; k < KEPT / WARPS; ++k) dot[k] += shuffle_xor(dot[k], m);
#pragma unroll
    for (int k = 0; k < KEPT / WARPS; ++k) {
      const int i = k * WARPS + warp;
      const float before_i = shuffle(l_lane, i), by = i <= j ? expf(now - (i < j ? before_i : now)) : 0.0f;
      if (lane == 0) weight[i] = dot[k] * by, since[i] = by;
    }
    __syncthreads();
    const float mine_weight = lane <= j ? weight[lane] : 0.0f;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int r = k * WARPS + warp;
      sum[k] *= decay;
      if (lane <= j && r < span) sum[k] = fmaf(mine_weight, us[lane * span + r], sum[k]);
    }
#pragma unroll
    for (int m = 16; m; m >>= 1)
#pragma unroll
      for (int k = 0; k < ROWS; ++k) sum[k] += shuffle_xor(sum[k], m);
    if (finishes) {
      float y = lane == 0 ? sum[0] : lane == 1 ? sum[1] : lane == 2 ? sum[2] : sum[3];
      y = fmaf(d, xs[own], y);
      if (p.gated) y *= silu(z);
      ((float*)p.y)[b * (int)p.y_stride + first + own] = y;
    }
    if (j == KEPT - 1) {
#pragma unroll 1
      for (int k = 0; k < ROWS; ++k) {
        const int r = k * WARPS + warp;
        if (r >= span) break;
        float row[EACH];
        u32 top = 0;
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          row[e] = s[0][e];
#pragma unroll
          for (int other = 1; other < ROWS; ++other)
            if (other == k) row[e] = s[other][e];
          row[e] *= decay;
        }
#pragma unroll 4
        for (int i = 0; i < KEPT; ++i) {
          const float u = us[i * span + r] * since[i];
#pragma unroll
          for (int e = 0; e < EACH; ++e) {
            const int at = entry_of<QUAD>(lane, e);
            if (QUAD || at < n) row[e] = fmaf(u, kept_b[i * n + at], row[e]);
          }
        }
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          const u32 bits = float_to_bits(row[e]) & 0x7fffffffu;
          top = bits > top ? bits : top;
        }
        Int8Scale code = {0, 0};
        if (type == STATE_INT8) {
          code = int8_scale(warp_max_bits(top));
          if (lane == 0) scales[row0 + r] = code.step;
        }
        close_row<QUAD>(type, ssm, row0 + r, n, row, code.to_code);
      }
    }
    __syncthreads();
  }
}
