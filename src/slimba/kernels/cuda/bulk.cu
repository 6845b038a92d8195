// Many tokens at once (prefill, large batches): what surrounds the matrix products, which cuBLAS does in float16 over a
// scratch of one matrix that slimba_expand fills.
//
// slimba_norm -> slimba_expand, product -> slimba_conv, slimba_push -> slimba_scan or slimba_ssd -> slimba_gate_norm -> slimba_expand, product; or
// slimba_conv of B and C, slimba_mixer (mixer.cu), slimba_rejoin in their place.
// Every kernel exists for float16 activations (_half) and, for checks, for float32 (_float). Token t of sequence b is
// row b * L + t. Naive twin of all of them together: tests/runtime/numpy_reference.py.
struct Half {
  u16 bits;
};
DEV float load(const float* p, i64 i) { return p[i]; }
DEV float load(const Half* p, i64 i) { return half_bits_to_float(p[i].bits); }
DEV void store(float* p, i64 i, float v) { p[i] = v; }
DEV void store(Half* p, i64 i, float v) { p[i].bits = float_to_half_bits(v); }

// x = norm(u) weight. One block a token.
struct Norm {
  i64 u, x, weight, width, eps;  // u and weight float32, x as the kernel's type
};
DEV float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < WARPS; ++w) v += scratch[w];
  return v;
}
template <typename T>
DEV void norm(const Norm& p, float* scratch) {
  const float* u = (const float*)p.u + blockIdx.x * p.width;
  float squares = 0;
  for (i64 i = threadIdx.x; i < p.width; i += THREADS) squares += u[i] * u[i];
  const float inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)p.width + param_float(p.eps));
  for (i64 i = threadIdx.x; i < p.width; i += THREADS)
    store((T*)p.x, blockIdx.x * p.width + i, u[i] * inverse * ((const float*)p.weight)[i]);
}
#define NORM_QUADS 4  // of a token that a thread holds
// The usual case in float16: everything is read once, by 16 bytes.
DEV void norm_wide(const Norm& p, float* scratch) {
  const int quads = (int)p.width / 4;
  const float4* u = (const float4*)((const float*)p.u + blockIdx.x * p.width);
  float4 own[NORM_QUADS], w[NORM_QUADS];
  float squares = 0;
#pragma unroll
  for (int k = 0; k < NORM_QUADS; ++k) {
    const int at = threadIdx.x + k * THREADS;
    own[k] = at < quads ? u[at] : float4{0, 0, 0, 0};
    w[k] = at < quads ? ((const float4*)p.weight)[at] : float4{0, 0, 0, 0};
  }
#pragma unroll
  for (int k = 0; k < NORM_QUADS; ++k)
    squares += own[k].x * own[k].x + own[k].y * own[k].y + own[k].z * own[k].z + own[k].w * own[k].w;
  const float inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)p.width + param_float(p.eps));
#pragma unroll
  for (int k = 0; k < NORM_QUADS; ++k) {
    const int at = threadIdx.x + k * THREADS;
    if (at >= quads) break;
    ((uint2*)((u16*)p.x + blockIdx.x * p.width))[at] =
        uint2{pack_halves(own[k].x * inverse * w[k].x, own[k].y * inverse * w[k].y),
              pack_halves(own[k].z * inverse * w[k].z, own[k].w * inverse * w[k].w)};
  }
}

// out = silu(conv(in)) for the tokens of this call. Grid: channels in 256s, tokens in 16s, sequences.
struct Conv {
  StateRef state;
  i64 batch, length, in, in_stride, out, out_stride, weight, bias;
  i64 state_type, inner, entries, heads;  // entries: channels of B, from `inner` on; 0, as are heads, for Mamba-1
  i64 first;                              // channel that is convolved; `push` takes them all
  i64 dt, dt_stride, dt_bias, a, dt_low, dt_high;  // as in Scan
};
#define CONV_TOKENS 16
template <typename T>
DEV void conv(const Conv& p) {
  const i64 channel = p.first + (i64)blockIdx.x * THREADS + threadIdx.x, first = (i64)blockIdx.y * CONV_TOKENS;
  const int b = blockIdx.z, taps = (int)p.state.taps;
  if (channel >= p.state.channels) return;
  const i64 slot = slot_of(p.state, b), pos = position(p.state, slot);
  auto input = [&](i64 t) {  // of token t of this call
    return t < 0 ? ring_row(p.state, slot, pos + t + p.state.taps)[channel]
                 : load((const T*)p.in, ((i64)b * p.length + t) * p.in_stride + channel);
  };
  float window[MAX_TAPS], weight[MAX_TAPS];
#pragma unroll
  for (int k = 0; k < MAX_TAPS; ++k) {
    weight[k] = k < taps ? ((const float*)p.weight)[k * p.state.channels + channel] : 0.0f;
    window[k] = k > 0 && k < taps ? input(first - taps + k) : 0.0f;
  }
  const float bias = p.bias ? ((const float*)p.bias)[channel] : 0.0f;
  for (i64 t = first; t < least(first + CONV_TOKENS, p.length); ++t) {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < MAX_TAPS; ++k) {
      if (k >= taps) break;
      window[k] = k + 1 < taps ? window[k + 1 < MAX_TAPS ? k + 1 : k] : input(t);
      sum = fmaf(weight[k], window[k], sum);
    }
    store((T*)p.out, ((i64)b * p.length + t) * p.out_stride + channel, silu(sum));
  }
}

// The same in float16 for four taps and two channels at once, CONV_AHEAD tokens in flight.
#define CONV_AHEAD 8
#define PAIR_TAPS 4
DEV void conv_pairs(const Conv& p) {
  const int channel = (int)p.first + 2 * (blockIdx.x * THREADS + threadIdx.x), b = blockIdx.z;
  if (channel >= (int)p.state.channels) return;
  const i64 first = (i64)blockIdx.y * CONV_TOKENS, slot = slot_of(p.state, b), pos = position(p.state, slot);
  const u16* in = (const u16*)p.in + (i64)b * p.length * p.in_stride + channel;
  u16* out = (u16*)p.out + (i64)b * p.length * p.out_stride + channel;
  float window[PAIR_TAPS][2], weight[PAIR_TAPS][2], bias[2];
#pragma unroll
  for (int k = 0; k < PAIR_TAPS; ++k) {
    const i64 t = first - PAIR_TAPS + k;
    const u32 two = k > 0 && t >= 0 ? *(const u32*)(in + t * p.in_stride) : 0;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      weight[k][c] = ((const float*)p.weight)[k * p.state.channels + channel + c];
      window[k][c] = c ? high_half(two) : low_half(two);
      if (k > 0 && t < 0) window[k][c] = ring_row(p.state, slot, pos + t + PAIR_TAPS)[channel + c];
    }
  }
  for (int c = 0; c < 2; ++c) bias[c] = p.bias ? ((const float*)p.bias)[channel + c] : 0.0f;
  const i64 end = least(first + CONV_TOKENS, p.length);
#pragma unroll 1
  for (i64 t0 = first; t0 < end; t0 += CONV_AHEAD) {
    u32 two[CONV_AHEAD];
#pragma unroll
    for (int j = 0; j < CONV_AHEAD; ++j) two[j] = t0 + j < end ? *(const u32*)(in + (t0 + j) * p.in_stride) : 0;
#pragma unroll
    for (int j = 0; j < CONV_AHEAD; ++j) {
      float sum[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum[c] = bias[c];
#pragma unroll
        for (int k = 0; k < PAIR_TAPS; ++k) {
          window[k][c] = k + 1 < PAIR_TAPS ? window[(k + 1) % PAIR_TAPS][c] : c ? high_half(two[j]) : low_half(two[j]);
          sum[c] = fmaf(weight[k][c], window[k][c], sum[c]);
        }
        sum[c] *= fast_reciprocal(1.0f + fast_exp(-sum[c]));
      }
      if (t0 + j < end) *(u32*)(out + (t0 + j) * p.out_stride) = pack_halves(sum[0], sum[1]);
    }
  }
}

// What later tokens need of these: the last inputs of the convolution into its ring, and B and L of the tokens that are in no
// stored state into the buffer. After the recurrence, whose blocks read what was kept before. Grid: channels in 256s, sequences.
template <typename T>
DEV void push(const Conv& p) {
  const i64 channel = (i64)blockIdx.x * THREADS + threadIdx.x;
  const int b = blockIdx.y;
  if (channel >= p.state.channels) return;
  const i64 slot = slot_of(p.state, b), pos = position(p.state, slot);
  for (i64 t = p.length > p.state.taps ? p.length - p.state.taps : 0; t < p.length; ++t)
    ring_row(p.state, slot, pos + t)[channel] = load((const T*)p.in, ((i64)b * p.length + t) * p.in_stride + channel);
  const Span when = span_of((int)pos, p.length);
  const Kept kept = kept_of(p.state, p.state_type, slot, p.inner, p.entries, p.heads);
  if (channel < p.heads) {
    float l = when.at ? kept.l[(when.at - 1) * p.heads + channel] : 0.0f;
    for (i64 t = when.stored; t < p.length; ++t) {
      const float raw = ((const float*)p.dt)[((i64)b * p.length + t) * p.dt_stride + channel] + ((const float*)p.dt_bias)[channel];
      l += softplus(raw, param_float(p.dt_low), param_float(p.dt_high)) * ((const float*)p.a)[channel];
      kept.l[(when.at + t - when.stored) * p.heads + channel] = l;
    }
  }
  const i64 entry = channel - p.inner;
  if (entry < 0 || entry >= p.entries) return;
  for (i64 t = when.stored; t < p.length; ++t)
    keep_value(kept, kept.b, (when.at + t - when.stored) * p.entries + entry,
               load((const T*)p.out, ((i64)b * p.length + t) * p.out_stride + channel));
}

// g = norm(y silu(z)) weight, norm(y) weight silu(z), or y silu(z). One block a token.
struct GateNorm {
  i64 y, y_stride, z, z_stride, out, out_stride, weight, width, groups, eps, norm_first;
};
template <typename T>
DEV void gate_norm(const GateNorm& p, float* scratch) {
  const i64 token = blockIdx.x, groups = p.groups ? p.groups : 1, size = p.width / groups;
  const T *y = (const T*)p.y + token * p.y_stride, *z = (const T*)p.z + token * p.z_stride;
  auto gate = [&](i64 i) { return silu(load(z, i)); };
  for (i64 g = 0; g < groups; ++g) {
    float squares = 0, inverse = 1;
    for (i64 i = g * size + threadIdx.x; i < (g + 1) * size && p.groups; i += THREADS) {
      const float e = load(y, i) * (p.norm_first ? 1.0f : gate(i));
      squares += e * e;
    }
    if (p.groups) inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)size + param_float(p.eps));
    for (i64 i = g * size + threadIdx.x; i < (g + 1) * size; i += THREADS)
      store((T*)p.out + token * p.out_stride, i,
            load(y, i) * gate(i) * inverse * (p.weight ? ((const float*)p.weight)[i] : 1.0f));
  }
}

#define GATE_WORDS 4  // 16-byte words of a token that a thread holds
// The usual case of gate_norm in float16: one group, gated first; everything is read once.
DEV void gate_norm_wide(const GateNorm& p, float* scratch) {
  const i64 token = blockIdx.x;
  const uint4 *y = (const uint4*)((const u16*)p.y + token * p.y_stride), *z = (const uint4*)((const u16*)p.z + token * p.z_stride);
  const int words = (int)p.width / 8;
  float g[GATE_WORDS][8], squares = 0;
#pragma unroll
  for (int k = 0; k < GATE_WORDS; ++k) {
    const int at = threadIdx.x + k * THREADS;
    if (at >= words) break;
    const uint4 a = y[at], b = z[at];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 yy = word(a, i / 2), zz = word(b, i / 2);
      const float gate = i % 2 ? high_half(zz) : low_half(zz);
      g[k][i] = (i % 2 ? high_half(yy) : low_half(yy)) * gate * fast_reciprocal(1.0f + fast_exp(-gate));
      squares += g[k][i] * g[k][i];
    }
  }
  const float inverse = p.groups ? 1.0f / sqrtf(block_sum(squares, scratch) / (float)p.width + param_float(p.eps)) : 1.0f;
#pragma unroll
  for (int k = 0; k < GATE_WORDS; ++k) {
    const int at = threadIdx.x + k * THREADS;
    if (at >= words) break;
    u32 out[4];
    for (int i = 0; i < 4; ++i) {
      const float* w = p.weight ? (const float*)p.weight + at * 8 + 2 * i : nullptr;
      out[i] = pack_halves(g[k][2 * i] * inverse * (w ? w[0] : 1.0f), g[k][2 * i + 1] * inverse * (w ? w[1] : 1.0f));
    }
    ((uint4*)((u16*)p.out + token * p.out_stride))[at] = uint4{out[0], out[1], out[2], out[3]};
  }
}

// norm(g) weight in place, of what mixer.cu leaves: each head's 64 entries divided by their root mean square, and its squares.
struct Rejoin {
  i64 g, squares, weight, width, eps;  // squares float32 [tokens][width / 64], weight float32
};
DEV void rejoin(const Rejoin& p, float* scratch) {
  const i64 token = blockIdx.x;
  const int words = (int)p.width / 8, heads = (int)p.width / HEAD;
  uint4* g = (uint4*)((u16*)p.g + token * p.width);
  const float* squares = (const float*)p.squares + token * heads;
  uint4 own[GATE_WORDS];
#pragma unroll
  for (int k = 0; k < GATE_WORDS; ++k) {
    const int at = threadIdx.x + k * THREADS;
    if (at < words) own[k] = g[at];
  }
  float sum = 0;
  for (int i = threadIdx.x; i < heads; i += THREADS) sum += squares[i];
  const float inverse = 1.0f / sqrtf(block_sum(sum, scratch) / (float)p.width + param_float(p.eps));
#pragma unroll
  for (int k = 0; k < GATE_WORDS; ++k) {
    const int at = threadIdx.x + k * THREADS;
    if (at >= words) break;
    const float by = sqrtf(squares[at / (HEAD / 8)] / HEAD + MIXER_LEAST) * inverse;
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 w = *(const float2*)((const float*)p.weight + at * 8 + 2 * i);
      out[i] = pack_halves(low_half(word(own[k], i)) * by * w.x, high_half(word(own[k], i)) * by * w.y);
    }
    g[at] = uint4{out[0], out[1], out[2], out[3]};
  }
}

#define INSTANCES(name, Params, body_half, body_float) \
  KERNEL(name##_half, Params, THREADS) { body_half; } \
  KERNEL(name##_float, Params, THREADS) { body_float; }

KERNEL(slimba_norm_half, Norm, THREADS) {
  SHARED(smem);
  if (p.width % 4 == 0 && p.width <= NORM_QUADS * 4 * THREADS) norm_wide(p, (float*)smem);
  else norm<Half>(p, (float*)smem);
}
KERNEL(slimba_norm_float, Norm, THREADS) {
  SHARED(smem);
  norm<float>(p, (float*)smem);
}
KERNEL(slimba_gate_norm_half, GateNorm, THREADS) {
  SHARED(smem);
  if (p.width <= GATE_WORDS * 8 * THREADS && p.width % 8 == 0 && p.y_stride % 8 == 0 && p.z_stride % 8 == 0 &&
      p.groups <= 1 && !p.norm_first)
    gate_norm_wide(p, (float*)smem);
  else
    gate_norm<Half>(p, (float*)smem);
}
KERNEL(slimba_gate_norm_float, GateNorm, THREADS) {
  SHARED(smem);
  gate_norm<float>(p, (float*)smem);
}
KERNEL(slimba_rejoin, Rejoin, THREADS) {
  SHARED(smem);
  rejoin(p, (float*)smem);
}
DEV void conv_half(const Conv& p) {
  const bool pairs = p.state.taps == PAIR_TAPS && !((p.state.channels | p.first | p.in_stride | p.out_stride | p.in >> 1) & 1);  // all even, in on 4 bytes
  if (pairs) conv_pairs(p);
  else conv<Half>(p);
}
INSTANCES(slimba_conv, Conv, conv_half(p), conv<float>(p))
INSTANCES(slimba_push, Conv, push<Half>(p), push<float>(p))
