// One token of Mamba-2's recurrence for a small batch: convolution, SSM step, skip and gate, fused.
//
//   S <- exp(dt a) S + dt x B^T,   g = (S C + D x) silu(z);   rounding of stored states as in runtime/backends/reference.py
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
struct Int8Scale {
  float step, to_code;  // a code is round(s * to_code), its value code * step
};
DEV Int8Scale int8_scale(u32 top) {  // top: the bits of the largest magnitude of a row
  const float most = bits_to_float(top);
  if (top >= INF_BITS) return {bits_to_float(0x7fc00000u), 0.0f};
  if (most < 1e-30f) return {0.0f, 0.0f};
  return {most / 127.0f, 127.0f / most};
}

// The convolution's sum for a channel at token `time`, from the ring, which holds the token's own input too.
DEV float convolve(const StateRef& s, i64 slot, i64 time, i64 weight, i64 bias, i64 channel) {
  float sum = bias ? ((const float*)bias)[channel] : 0.0f;
  for (i64 k = 0; k < s.taps; ++k)
    sum = fmaf(((const float*)weight)[k * s.channels + channel], load_fresh(ring_row(s, slot, time + 1 + k) + channel), sum);
  return sum;
}

// `ready` waits for the kernel before; it is called once, after the first states have been asked for.
template <int VEC, typename Ready>
DEV void recur(const Recurrence& p, u8* smem, int block, int blocks, Ready ready) {
  constexpr int ROWS = 4, EACH = 4 * VEC;  // rows in flight in a warp, entries of a row in a lane
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = (int)p.d_state, span = (int)p.span;
  float *xs = (float*)smem, *bs = xs + span, *cs = bs + n;
  const i64 per_sequence = p.inner / p.span, ssm = state_array(p.state, 0), type = p.state_type;
  float* scales = (float*)state_array(p.state, 1);
  if (block >= p.batch * per_sequence) ready();
  for (i64 unit = block; unit < p.batch * per_sequence; unit += blocks) {
    const int b = (int)(unit / per_sequence);
    const i64 first = unit % per_sequence * p.span, head = first / p.headdim, group = head / (p.heads / p.groups);
    const i64 slot = slot_of(p.state, b);
    const i64 row0 = (p.state.layer * state_array(p.state, 4) + slot) * p.inner + first;
    for (int r0 = 0; r0 < span; r0 += ROWS * WARPS) {
      float s[ROWS][EACH];
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const int r = r0 + j * WARPS + warp;
        const float scale = type == STATE_INT8 && r < span ? scales[row0 + r] : 0.0f;
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
          const int i = k * WARP + lane;
          s[j][k] = r < span && i < n ? open_entry(type, ssm, (row0 + r) * n + i, scale) : 0.0f;
        }
      }
      if (r0 == 0) {
        if (unit == block) ready();
        const i64 time = position(p.state, slot);
        for (int i = threadIdx.x; i < span + 2 * n; i += THREADS) {
          const i64 of_b = p.inner + group * n + i - span, of_c = of_b + (p.groups - 1) * n;
          const i64 channel = i < span ? first + i : i < span + n ? of_b : of_c;
          xs[i] = silu(convolve(p.state, slot, time, p.conv_weight, p.conv_bias, channel));
        }
        __syncthreads();
      }
      const float raw = load_fresh((const float*)p.dt + b * p.dt_stride + head) + ((const float*)p.dt_bias)[head];
      const float dt = softplus(raw, param_float(p.dt_low), param_float(p.dt_high));
      const float decay = expf(dt * ((const float*)p.a)[head]);
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const int r = r0 + j * WARPS + warp;
        if (r >= span) break;
        const float x = xs[r], dx = dt * x;
        float sum = 0;
        u32 top = 0;
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
          const int i = k * WARP + lane;
          if (i >= n) continue;
          s[j][k] = fmaf(decay, s[j][k], dx * bs[i]);
          sum = fmaf(s[j][k], cs[i], sum);
          const u32 bits = float_to_bits(s[j][k]) & 0x7fffffffu;
          top = bits > top ? bits : top;
        }
        Int8Scale code = {0, 0};
        if (type == STATE_INT8) {
          code = int8_scale(warp_max_bits(top));
          if (lane == 0) scales[row0 + r] = code.step;
        }
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
          const int i = k * WARP + lane;
          if (i < n) close_entry(type, ssm, (row0 + r) * n + i, s[j][k], code.to_code);
        }
        sum = warp_sum(sum);
        if (lane) continue;
        const i64 channel = first + r;
        float y = fmaf(((const float*)p.d)[p.d_per_channel ? channel : head], x, sum);
        if (p.gated) y *= silu(load_fresh((const float*)p.z + b * p.z_stride + channel));
        ((float*)p.y)[b * p.y_stride + channel] = y;
      }
    }
    __syncthreads();
  }
}
