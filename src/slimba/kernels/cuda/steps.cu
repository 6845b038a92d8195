// One token of Mamba-2's recurrence for each of many sequences in one kernel: what slimba_prepare and slimba_states of batch.cu
// compute, for B and C of a block's group again in every block, and at the end the image that out_proj wants (broad.cu), so that
// the gated norm needs no kernel of its own.
//
// The image holds y weight IMAGE_SCALE without the norm's division, which the product applies to its sums; `squares` gets the
// sums of y^2. float16 overflows where |y weight| reaches 1e6 and rounds by 5e-7 at most below 1e-3: where the RMS is that
// small, the norm's eps bounds what a division makes of it. Headdim 64, heads of a group in fours, N 64 or 128. Naive twin:
// tests/runtime/numpy_reference.py (mixer2). Tests: tests/runtime/test_cuda_broad_step.py.

struct Steps {
  Recurrence r;
  i64 weight, image, image2, squares, padded;  // image 0: y goes to r.y instead; squares float32 [B][blocks]
  i64 plane_index, plane_kpad;                 // of out_proj: places in groups (plane_slots in cuda_weights.py)
};

template <int N>
struct StepsShared {
  float sum[THREADS], scale[THREADS], since[STATE_HEADS][KEPT], now[STATE_HEADS], dots[KEPT], bc[2 * N], part[WARPS];
  u32 slices[3][N / 4];
  float b[KEPT][N], u[KEPT][THREADS];
};

// A channel of the convolution without the token's own input, which comes last.
struct Taps {
  float sum, last;
};
DEV Taps older_taps(const Recurrence& p, const float* ring, int time, int channel) {
  Taps out = {p.conv_bias ? ((const float*)p.conv_bias)[channel] : 0.0f, 0.0f};
  const int taps = (int)p.state.taps, channels = (int)p.state.channels;
#pragma unroll
  for (int k = 0; k < MAX_TAPS; ++k) {
    if (k >= taps) continue;
    const float w = ((const float*)p.conv_weight)[k * channels + channel];
    if (k == taps - 1) out.last = w;
    else out.sum = fmaf(w, load_fresh(ring + (time + 1 + k) % taps * channels + channel), out.sum);
  }
  return out;
}

// The image's places of a block's 256 channels, from values in the order of channels.
DEV void put_image(const Steps& all, const float* v, int b) {
  if (threadIdx.x < 32) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = pack_halves(v[image_column(threadIdx.x, 2 * i)], v[image_column(threadIdx.x, 2 * i + 1)]);
    *(uint4*)image_at(all.image, (int)all.padded, b, blockIdx.x * 32 + threadIdx.x) = uint4{w[0], w[1], w[2], w[3]};
  }
  const int places = (int)all.plane_kpad * THREADS / (int)all.r.inner, first = (int)blockIdx.x * THREADS;
  for (int i = threadIdx.x; i < places / 2; i += THREADS) {
    const int place = (int)blockIdx.x * places + i / 16 * 32 + i % 16, step = place % 256 / 32 % 2 * 8 + place % 16 / 2;
    const i32 low = ((const i32*)all.plane_index)[place], high = ((const i32*)all.plane_index)[place + 16];
    const u32 two = pack_halves(low < 0 ? 0.0f : v[low - first], high < 0 ? 0.0f : v[high - first]);
    *(u32*)(image_at(all.image2, (int)all.padded, b, place / 256 * 32 + step * 2 + place % 2) + place / 64 % 4 * 4) = two;
  }
}

// Grid: fours of heads, sequences.
template <int TYPE, int N>
DEV void steps(const Steps& all, StepsShared<N>& m) {
  constexpr int SIZE = Stored<TYPE>::SIZE, E = Stored<TYPE>::E, Q = N * SIZE / 64, AHEAD = TYPE == STATE_F32 ? 1 : 2;
  constexpr int ENTRIES = N / WARP;
  const Recurrence& p = all.r;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, b = blockIdx.y;
  const int inner = (int)p.inner, heads = (int)p.heads, groups = (int)p.groups, head0 = (int)blockIdx.x * STATE_HEADS;
  const int group = head0 / (heads / groups), first = head0 * 64, channel = first + threadIdx.x, head = channel / 64;
  const i64 slot = slot_of(p.state, b), row0 = (p.state.layer * state_array(p.state, 4) + slot) * inner + first;
  const int time = (int)position(p.state, slot), j = time % KEPT;
  const float* ring = (const float*)state_array(p.state, 2) + (p.state.layer * state_array(p.state, 4) + slot) * p.state.taps * p.state.channels;
  const float* newest = ring + time % (int)p.state.taps * (int)p.state.channels;
  u8* ssm = (u8*)state_array(p.state, 0);
  float* scales = (float*)state_array(p.state, 1);
  const Kept kept = kept_of(p.state, TYPE, slot, inner, groups * N, heads);
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
  const float scale = TYPE == STATE_INT8 ? scales[row0 + threadIdx.x] : 1.0f;
  float u[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) u[i] = i < j ? kept_value(kept, kept.u, (i64)i * inner + channel) : 0.0f;
  const bool of_bc = (int)threadIdx.x < 2 * N;
  const int entry = threadIdx.x % N, bc_channel = inner + (group + (threadIdx.x < N ? 0 : groups)) * N + entry;
  const Taps own = older_taps(p, ring, time, channel), other = older_taps(p, ring, time, of_bc ? bc_channel : inner);
  float before[KEPT / WARPS][ENTRIES];  // rows warp and warp + 8 of the kept b
#pragma unroll
  for (int r = 0; r < KEPT / WARPS; ++r)
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const int i = r * WARPS + warp;
      before[r][e] = i < j ? kept_value(kept, kept.b, ((i64)i * groups + group) * N + e * WARP + lane) : 0.0f;
    }
  const float a = ((const float*)p.a)[head], dt_bias = ((const float*)p.dt_bias)[head];
  const float d = ((const float*)p.d)[p.d_per_channel ? channel : head], last = j ? kept.l[(j - 1) * heads + head] : 0.0f;
  const float weight = all.image ? ((const float*)all.weight)[channel] : 0.0f;
  const int of_head = threadIdx.x / KEPT % STATE_HEADS, of_token = threadIdx.x % KEPT;
  const float l_before = of_token < j ? kept.l[of_token * heads + head0 + of_head] : 0.0f;
  release_next();
  await_previous();
  const float raw_dt = load_fresh((const float*)p.dt + b * (int)p.dt_stride + head), in = load_fresh(newest + channel);
  const float in_bc = load_fresh(newest + (of_bc ? bc_channel : inner));
  const float z = p.gated ? load_fresh((const float*)p.z + b * (int)p.z_stride + channel) : 0.0f;
  const float x = silu(fmaf(own.last, in, own.sum)), dt = softplus(raw_dt + dt_bias, param_float(p.dt_low), param_float(p.dt_high));
  const float of_bc_value = silu(fmaf(other.last, in_bc, other.sum)), now = last + dt * a, of_now = as_kept(TYPE, dt * x);
  keep_value(kept, kept.u, (i64)j * inner + channel, of_now);
  if (of_bc) m.bc[threadIdx.x] = threadIdx.x < N ? as_kept(TYPE, of_bc_value) : of_bc_value;
  if (threadIdx.x < N && head0 % (heads / groups) == 0) keep_value(kept, kept.b, ((i64)j * groups + group) * N + entry, of_bc_value);
  if (threadIdx.x % 64 == 0) kept.l[j * heads + head] = m.now[threadIdx.x / 64] = now;
#pragma unroll
  for (int i = 0; i < KEPT; ++i)
    if (i == j) u[i] = of_now;
  __syncthreads();
  float dot[KEPT / WARPS] = {};
  u32 top = 0;
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const float c = m.bc[N + e * WARP + lane];
#pragma unroll
    for (int r = 0; r < KEPT / WARPS; ++r) dot[r] = fmaf(r * WARPS + warp == j ? m.bc[e * WARP + lane] : before[r][e], c, dot[r]);
    const u32 bits = float_to_bits(c) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
#pragma unroll
  for (int r = 0; r < KEPT / WARPS; ++r) {
    dot[r] = warp_sum(dot[r]);
    if (lane == 0) m.dots[r * WARPS + warp] = dot[r];
  }
  if (threadIdx.x < STATE_HEADS * KEPT) {
    const float latest = m.now[of_head];
    m.since[of_head][of_token] = of_token <= j ? expf(latest - (of_token < j ? l_before : latest)) : 0.0f;
  }
  float factor = expf(now);
  if constexpr (TYPE == STATE_INT8) {
    top = warp_max_bits(top);
    const float most = bits_to_float(top);
    const bool damaged = top >= INF_BITS, zero = most < 1e-30f;
    factor *= scale * (damaged ? bits_to_float(0x7fc00000u) : zero ? 0.0f : most / LIMIT);
    if (lane < N / 4 / WARPS) {
      const int w = warp * (N / 4 / WARPS) + lane;
      int fixed[4];
      u32 digits[3];
#pragma unroll
      for (int k = 0; k < 4; ++k) fixed[k] = damaged || zero ? 0 : __float2int_rn(m.bc[N + 4 * w + k] * (LIMIT / most));
      slice_words(fixed, digits);
#pragma unroll
      for (int s = 0; s < 3; ++s) m.slices[s][w] = digits[s];
    }
  }
  __syncthreads();
  if constexpr (TYPE == STATE_INT8) {  // exact sums on the tensor cores: the slices of C are the columns
    uint4 c[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) c[q] = ((const uint4*)m.slices[g < 3 ? g : 2])[q * 4 + t];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      int acc[4] = {0, 0, 0, 0};
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const uint4 lo = raw[tile][0][q], hi = raw[tile][1][q];
        mma_s8s8(acc, lo.x, hi.x, lo.y, hi.y, c[q].x, c[q].y);
        mma_s8s8(acc, lo.z, hi.z, lo.w, hi.w, c[q].z, c[q].w);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int third = (int)float_to_bits(shuffle(bits_to_float((u32)acc[2 * h]), lane + 1 < WARP ? lane + 1 : lane));
        if (t == 0) m.sum[warp * 32 + tile * TILE + g + 8 * h] = combine((float)acc[2 * h], (float)acc[2 * h + 1], (float)third);
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
          for (int e = 0; e < E; ++e) sum = fmaf(v[e], m.bc[N + (q * 4 + t) * E + e], sum);
        }
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (t == 0) m.sum[warp * 32 + tile * TILE + g + 8 * h] = sum;
      }
    }
  }
  __syncthreads();
  float y = fmaf(m.sum[threadIdx.x], factor, d * x);
#pragma unroll
  for (int i = 0; i < KEPT; ++i) y = fmaf(m.since[threadIdx.x / 64][i] * m.dots[i], u[i], y);
  if (p.gated) y *= silu(z);
  if (all.image) {
    const float squares = warp_sum(y * y);
    if (lane == 0) m.part[warp] = squares;
    m.sum[threadIdx.x] = y * weight * IMAGE_SCALE;
    __syncthreads();
    put_image(all, m.sum, b);
    if (threadIdx.x == 0) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += m.part[w];
      ((float*)all.squares)[b * (int)gridDim.x + blockIdx.x] = sum;
    }
  } else {
    ((float*)p.y)[b * (int)p.y_stride + channel] = y;
  }
  if (j < KEPT - 1) return;

#pragma unroll
  for (int i = 0; i < KEPT; ++i) m.u[i][threadIdx.x] = u[i] * m.since[threadIdx.x / 64][i];
  for (int i = threadIdx.x; i < KEPT * N; i += THREADS)
    m.b[i / N][i % N] = i / N == j ? m.bc[i % N] : kept_value(kept, kept.b, ((i64)(i / N) * groups + group) * N + i % N);
  m.scale[threadIdx.x] = expf(now) * scale;
  __syncthreads();
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {  // rows g and g + 8 of both tiles
    const int row = warp * 32 + k * 8 + g;
    const float decay = m.scale[row];
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
      top = 0;
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const u32 bits = float_to_bits(v[q][e]) & 0x7fffffffu;
          top = bits > top ? bits : top;
        }
#pragma unroll
      for (int by = 1; by < 4; by *= 2) {
        const u32 most = float_to_bits(shuffle_xor(bits_to_float(top), by));
        top = most > top ? most : top;
      }
      code = int8_scale(top);
      if (t == 0) scales[row0 + row] = code.step;
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) at[q * 4 + t] = stored_bits<TYPE>(v[q], code.to_code);
  }
}
