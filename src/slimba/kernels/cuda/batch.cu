// One token of Mamba-2's recurrence for each of many sequences: what step.cuh computes, in two kernels, so that the convolution
// is computed once and reading the states is all that the second has to wait for.
//
// slimba_prepare (convolution, what is kept of the token, products of B and C) -> slimba_states_TYPE_N (S C, sums, gate;
// after every KEPT-th token the new state). Headdim 64, heads of a group in fours, N 64 or 128. Naive twin:
// tests/runtime/numpy_reference.py (mixer2).
struct BatchRecurrence {
  Recurrence r;
  i64 skip, c, slices, c_scale, dots;  // float32 D x [B][I], C [B][G][N], int8 slices of C [B][G][3][N], float32 [B][G],
};                                     // float32 b_i . C_j [B][G][KEPT]

// Grid: 1 block for B and C and one for each 256 channels of x; sequences.
DEV void prepare(const BatchRecurrence& all, u8* smem) {
  const Recurrence& p = all.r;
  const int n = (int)p.d_state, groups = (int)p.groups, inner = (int)p.inner, heads = (int)p.heads, b = blockIdx.y;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const i64 slot = slot_of(p.state, b);
  const int time = (int)position(p.state, slot), j = time % KEPT;
  const float* ring = (const float*)state_array(p.state, 2) + (p.state.layer * state_array(p.state, 4) + slot) * p.state.taps * p.state.channels;
  const Kept kept = kept_of(p.state, p.state_type, slot, inner, groups * n, heads);
  if (blockIdx.x) {
    const int channel = (int)(blockIdx.x - 1) * THREADS + threadIdx.x, at = channel < inner ? channel : 0, head = at / (int)p.headdim;
    const ConvChannel c = ask_channel(p.state, p.conv_weight, p.conv_bias, at);
    const float a = ((const float*)p.a)[head], bias = ((const float*)p.dt_bias)[head];
    const float d = ((const float*)p.d)[p.d_per_channel ? at : head], before = j ? kept.l[(j - 1) * heads + head] : 0.0f;
    await_previous();
    release_next();
    if (channel >= inner) return;
    const float raw = load_fresh((const float*)p.dt + b * (int)p.dt_stride + head);
    const float x = convolve(c, ask_input(p.state, ring, time, channel)), dt = softplus(raw + bias, param_float(p.dt_low), param_float(p.dt_high));
    keep_value(kept, kept.u, (i64)j * inner + channel, dt * x);
    ((float*)all.skip)[(i64)b * inner + channel] = d * x;
    if (channel % (int)p.headdim == 0) kept.l[j * heads + head] = before + dt * a;
    return;
  }
  float *bc = (float*)smem, *tops = bc + 2 * groups * n;  // B and C of all groups
  constexpr int ENTRIES = 256 / WARP;  // most of a row in a lane
  float before[KEPT / WARPS][ENTRIES];  // rows warp and warp + 8 of what was kept, of the only group
#pragma unroll
  for (int r = 0; r < KEPT / WARPS; ++r)
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const int i = r * WARPS + warp, at = e * WARP + lane;
      before[r][e] = groups == 1 && i < j && at < n ? kept_value(kept, kept.b, i * n + at) : 0.0f;
    }
  await_previous();
  release_next();
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * groups * n; i += THREADS) {
    const ConvChannel c = ask_channel(p.state, p.conv_weight, p.conv_bias, inner + i);
    const float v = convolve(c, ask_input(p.state, ring, time, inner + i));
    bc[i] = i < groups * n ? as_kept(p.state_type, v) : v;
    if (i < groups * n) keep_value(kept, kept.b, (i64)j * groups * n + i, v);
    else ((float*)all.c)[(i64)b * groups * n + i - groups * n] = v;
  }
  __syncthreads();
  if (groups == 1) {
    float sum[KEPT / WARPS] = {};
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const int at = e * WARP + lane;
      if (at >= n) continue;
#pragma unroll
      for (int r = 0; r < KEPT / WARPS; ++r) sum[r] = fmaf(r * WARPS + warp == j ? bc[at] : before[r][e], bc[n + at], sum[r]);
    }
#pragma unroll
    for (int r = 0; r < KEPT / WARPS; ++r) {
      sum[r] = warp_sum(sum[r]);
      if (lane == 0) ((float*)all.dots)[b * KEPT + r * WARPS + warp] = sum[r];
    }
  }
#pragma unroll 1
  for (int k = warp; groups > 1 && k < groups * (j + 1); k += WARPS) {
    const int g = k / (j + 1), i = k % (j + 1);
    float sum = 0;
#pragma unroll 4
    for (int e = lane; e < n; e += WARP) {
      const float of_b = i == j ? bc[g * n + e] : kept_value(kept, kept.b, ((i64)i * groups + g) * n + e);
      sum = fmaf(of_b, bc[(groups + g) * n + e], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) ((float*)all.dots)[((i64)b * groups + g) * KEPT + i] = sum;
  }
#pragma unroll 1
  for (int g = warp; g < groups; g += WARPS) {
    const float* c = bc + (groups + g) * n;
    u32 top = 0;
    for (int e = lane; e < n; e += WARP) {
      const u32 bits = float_to_bits(c[e]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    top = warp_max_bits(top);
    const float most = bits_to_float(top);
    const bool damaged = top >= INF_BITS, zero = most < 1e-30f;
    if (lane == 0) tops[g] = damaged ? bits_to_float(0x7fc00000u) : zero ? 0.0f : most / LIMIT;
    for (int w = lane; w < n / 4; w += WARP) {
      int fixed[4];
      u32 d[3];
      for (int k = 0; k < 4; ++k) fixed[k] = damaged || zero ? 0 : __float2int_rn(c[4 * w + k] * (LIMIT / most));
      slice_words(fixed, d);
      for (int s = 0; s < 3; ++s) ((u32*)all.slices)[(((i64)b * groups + g) * 3 + s) * (n / 4) + w] = d[s];
    }
    if (lane == 0) ((float*)all.c_scale)[b * groups + g] = tops[g];
  }
}

// A row's 16 bytes q of lane t hold the entries (4 q + t) E .., E of them in 16 bytes.
template <int TYPE>
struct Stored {
  static constexpr int SIZE = TYPE == STATE_F32 ? 4 : TYPE == STATE_BF16 ? 2 : 1, E = 16 / SIZE;
};
template <int TYPE>
DEV void stored_values(const uint4& v, float scale, float (&out)[16 / Stored<TYPE>::SIZE]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 w = word(v, i);
    if constexpr (TYPE == STATE_F32) {
      out[i] = bits_to_float(w);
    } else if constexpr (TYPE == STATE_BF16) {
      out[2 * i] = bits_to_float(w << 16);
      out[2 * i + 1] = bits_to_float(w & 0xffff0000u);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) out[4 * i + k] = scale * (float)(i8)(w >> 8 * k);
    }
  }
}
template <int TYPE>
DEV uint4 stored_bits(const float (&v)[16 / Stored<TYPE>::SIZE], float to_code) {
  u32 w[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (TYPE == STATE_F32) {
      w[i] = float_to_bits(v[i]);
    } else if constexpr (TYPE == STATE_BF16) {
      w[i] = float_to_bfloat(v[2 * i]) | (u32)float_to_bfloat(v[2 * i + 1]) << 16;
    } else {
      u32 r[4];  // the last byte of a number with 1.5 2^23 added is its nearest integer
#pragma unroll
      for (int k = 0; k < 4; ++k) r[k] = float_to_bits(fmaf(v[4 * i + k], to_code, 12582912.0f));
      w[i] = byte_perm(byte_perm(r[0], r[1], 0x0040u), byte_perm(r[2], r[3], 0x0040u), 0x5410u);
    }
  }
  return uint4{w[0], w[1], w[2], w[3]};
}

// The state's rows times C: raw holds the tiles that are loaded, `open` loads another; sum[row] of the block. Of int8 states exact
// sums on the tensor cores, in units of `combine`: slices are the columns, those of C that this lane has; else c is C.
template <int TYPE, int N, int AHEAD, typename Open>
DEV void state_sums(uint4 (&raw)[AHEAD][2][N * Stored<TYPE>::SIZE / 64], Open open, const uint4* slices, const float* c, float* sums) {
  constexpr int E = Stored<TYPE>::E, Q = N * Stored<TYPE>::SIZE / 64;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  if constexpr (TYPE == STATE_INT8) {
    uint4 x[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) x[q] = slices[q * 4 + t];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      int acc[4] = {0, 0, 0, 0};
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const uint4 lo = raw[tile][0][q], hi = raw[tile][1][q];
        mma_s8s8(acc, lo.x, hi.x, lo.y, hi.y, x[q].x, x[q].y);
        mma_s8s8(acc, lo.z, hi.z, lo.w, hi.w, x[q].z, x[q].w);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int last = (int)float_to_bits(shuffle(bits_to_float((u32)acc[2 * h]), lane + 1 < WARP ? lane + 1 : lane));
        if (t == 0) sums[warp * 32 + tile * TILE + g + 8 * h] = combine((float)acc[2 * h], (float)acc[2 * h + 1], (float)last);
      }
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (tile >= AHEAD) open(tile, raw[0]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0;
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          float v[E];
          stored_values<TYPE>(raw[tile < AHEAD ? tile : 0][h][q], 1.0f, v);
#pragma unroll
          for (int e = 0; e < E; ++e) sum = fmaf(v[e], c[(q * 4 + t) * E + e], sum);
        }
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (t == 0) sums[warp * 32 + tile * TILE + g + 8 * h] = sum;
      }
    }
  }
}

// Bits of the largest magnitude of a row that four lanes share.
template <int Q, int E>
DEV u32 row_top(const float (&v)[Q][E]) {
  u32 top = 0;
#pragma unroll
  for (int q = 0; q < Q; ++q)
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const u32 bits = float_to_bits(v[q][e]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
#pragma unroll
  for (int by = 1; by < 4; by *= 2) {
    const u32 other = float_to_bits(shuffle_xor(bits_to_float(top), by));
    top = other > top ? other : top;
  }
  return top;
}

#define STATE_HEADS 4  // of a block; a thread has a row of the state when sums are finished, a warp two tiles of 16 while they are made
template <int N>
struct StatesShared {
  float sum[THREADS], weight[STATE_HEADS][KEPT], since[STATE_HEADS][KEPT];
  float c[N], b[KEPT][N], u[KEPT][THREADS];
};

// Grid: fours of heads, sequences.
template <int TYPE, int N>
DEV void states(const BatchRecurrence& all, StatesShared<N>& m) {
  constexpr int SIZE = Stored<TYPE>::SIZE, E = Stored<TYPE>::E, Q = N * SIZE / 64, AHEAD = TYPE == STATE_F32 ? 1 : 2;
  const Recurrence& p = all.r;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, b = blockIdx.y;
  const int inner = (int)p.inner, heads = (int)p.heads, head0 = (int)blockIdx.x * STATE_HEADS, group = head0 / (heads / (int)p.groups);
  const int first = head0 * 64, channel = first + threadIdx.x;
  const i64 slot = slot_of(p.state, b), row0 = (p.state.layer * state_array(p.state, 4) + slot) * inner + first;
  const int j = (int)position(p.state, slot) % KEPT;
  u8* ssm = (u8*)state_array(p.state, 0);
  float* scales = (float*)state_array(p.state, 1);
  const Kept kept = kept_of(p.state, TYPE, slot, inner, p.groups * N, heads);
  uint4 raw[AHEAD][2][Q];
  auto open = [&](int tile, uint4 (&to)[2][Q]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int q = 0; q < Q; ++q)
        to[h][q] = load_state(ssm + ((row0 + warp * 32 + tile * TILE + g + 8 * h) * N) * SIZE + (q * 4 + t) * 16);
  };
#pragma unroll
  for (int tile = 0; tile < AHEAD; ++tile) open(tile, raw[tile]);
  float u[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) u[i] = i < j ? kept_value(kept, kept.u, (i64)i * inner + channel) : 0.0f;
  const float scale = TYPE == STATE_INT8 ? scales[row0 + threadIdx.x] : 1.0f;
  await_previous();
  release_next();
  if (threadIdx.x < STATE_HEADS * KEPT) {
    const int h = threadIdx.x / KEPT, i = threadIdx.x % KEPT;
    const float now = load_fresh(kept.l + j * heads + head0 + h), by = i <= j ? expf(now - load_fresh(kept.l + i * heads + head0 + h)) : 0.0f;
    m.since[h][i] = by;
    m.weight[h][i] = i <= j ? by * load_fresh((const float*)all.dots + ((i64)b * p.groups + group) * KEPT + i) : 0.0f;
  }
  const float of_token = kept_value(kept, kept.u, (i64)j * inner + channel), skip = load_fresh((const float*)all.skip + (i64)b * inner + channel);
  const float z = p.gated ? load_fresh((const float*)p.z + b * (int)p.z_stride + channel) : 0.0f;
  float now = load_fresh(kept.l + j * heads + head0 + (int)threadIdx.x / 64);
#pragma unroll
  for (int i = 0; i < KEPT; ++i)
    if (i == j) u[i] = of_token;
  const uint4* slices = (const uint4*)all.slices + (((i64)b * p.groups + group) * 3 + (g < 3 ? g : 2)) * (N / 16);
  now = expf(now);
  if constexpr (TYPE == STATE_INT8) {
    now = now * scale * load_fresh((const float*)all.c_scale + b * p.groups + group);
  } else {
    for (int i = threadIdx.x; i < N; i += THREADS) m.c[i] = load_fresh((const float*)all.c + ((i64)b * p.groups + group) * N + i);
    __syncthreads();
  }
  state_sums<TYPE, N, AHEAD>(raw, open, slices, m.c, m.sum);
  __syncthreads();
  float y = fmaf(m.sum[threadIdx.x], now, skip);
#pragma unroll
  for (int i = 0; i < KEPT; ++i) y = fmaf(m.weight[threadIdx.x / 64][i], u[i], y);
  if (p.gated) y *= silu(z);
  ((float*)p.y)[b * (int)p.y_stride + channel] = y;
  if (j < KEPT - 1) return;

#pragma unroll
  for (int i = 0; i < KEPT; ++i) m.u[i][threadIdx.x] = u[i] * m.since[threadIdx.x / 64][i];
  for (int i = threadIdx.x; i < KEPT * N; i += THREADS)
    m.b[i / N][i % N] = kept_value(kept, kept.b, ((i64)(i / N) * p.groups + group) * N + i % N);
  if (TYPE == STATE_INT8) m.sum[threadIdx.x] = scale;
  __syncthreads();
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {  // rows g and g + 8 of both tiles
    const int row = warp * 32 + k * 8 + g;
    const float decay = expf(load_fresh(kept.l + j * heads + head0 + row / 64)) * (TYPE == STATE_INT8 ? m.sum[row] : 1.0f);
    uint4* at = (uint4*)(ssm + (row0 + row) * N * SIZE);
    float v[Q][E];
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      stored_values<TYPE>(at[q * 4 + t], 1.0f, v[q]);
#pragma unroll
      for (int e = 0; e < E; ++e) v[q][e] *= decay;
    }
#pragma unroll 1
    for (int i = 0; i < KEPT; ++i) {
      const float of = m.u[i][row];
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int e = 0; e < E; ++e) v[q][e] = fmaf(of, m.b[i][(q * 4 + t) * E + e], v[q][e]);
    }
    Int8Scale code = {0, 0};
    if (TYPE == STATE_INT8) {
      code = int8_scale(row_top(v));
      if (t == 0) scales[row0 + row] = code.step;
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) at[q * 4 + t] = stored_bits<TYPE>(v[q], code.to_code);
  }
}
