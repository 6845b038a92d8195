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
  float b[KEPT][N], u[KEPT][THREADS];  // b: or pairs of tokens in bfloat16, N + 4 words a pair
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

// S <- decay S + u b^T for the rows of a block after the last of KEPT tokens. Float32, one row of four lanes after another.
template <int N>
DEV void store_exact(const StepsShared<N>& m, u8* rows) {
  constexpr int Q = N / 16;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const int row = warp * 32 + k * 8 + g;
    float4* at = (float4*)rows + row * (N / 4);
#pragma unroll 1
    for (int q = 0; q < Q; ++q) {
      float4 v = at[q * 4 + t];
      v.x *= m.scale[row], v.y *= m.scale[row], v.z *= m.scale[row], v.w *= m.scale[row];
#pragma unroll 4
      for (int i = 0; i < KEPT; ++i) {
        const float* b = &m.b[i][(q * 4 + t) * 4];
        v.x = fmaf(m.u[i][row], b[0], v.x), v.y = fmaf(m.u[i][row], b[1], v.y);
        v.z = fmaf(m.u[i][row], b[2], v.z), v.w = fmaf(m.u[i][row], b[3], v.w);
      }
      at[q * 4 + t] = v;
    }
  }
}
// The same in fewer bits, on the tensor cores: KEPT tokens are the columns of the left operand, u in two bfloat16 numbers. The
// right operand's columns are permuted so that a lane's sums are of the entries that it loads.
template <int TYPE, int N>
DEV void store_state(const StepsShared<N>& m, u8* rows, float* scales) {
  constexpr int SIZE = Stored<TYPE>::SIZE, E = Stored<TYPE>::E, Q = N * SIZE / 64;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const u32* pairs = (const u32*)m.b + t * (N + 4);
#pragma unroll 1
  for (int tile = 0; tile < 2; ++tile) {
    const int row = warp * 32 + tile * TILE + g;  // and 8 below
    u32 high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 h[2], l[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float v = m.u[2 * t + k + i / 2 * 8][row + i % 2 * 8];
        h[k] = float_to_bfloat(v), l[k] = float_to_bfloat(v - bfloat_to_float((u16)h[k]));
      }
      high[i] = h[0] | h[1] << 16, low[i] = l[0] | l[1] << 16;
    }
    float v[2][Q][E];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int q = 0; q < Q; ++q) stored_values<TYPE>(((const uint4*)(rows + (row + 8 * h) * N * SIZE))[q * 4 + t], m.scale[row + 8 * h], v[h][q]);
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int e = 0; e < E; e += 2) {  // eight columns: those of lane t are its entries e and e + 1
        const u32* b = pairs + (q * 4 + g / 2) * E + e + g % 2;
        const u32 b0 = b[0], b1 = b[4 * (N + 4)];
        float sum[4] = {v[0][q][e], v[0][q][e + 1], v[1][q][e], v[1][q][e + 1]};
        mma_bf16(sum, low[0], low[1], low[2], low[3], b0, b1);
        mma_bf16(sum, high[0], high[1], high[2], high[3], b0, b1);
        v[0][q][e] = sum[0], v[0][q][e + 1] = sum[1], v[1][q][e] = sum[2], v[1][q][e + 1] = sum[3];
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Int8Scale code = {0, 0};
      if (TYPE == STATE_INT8) {
        code = int8_scale(row_top(v[h]));
        if (t == 0) scales[row + 8 * h] = code.step;
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) ((uint4*)(rows + (row + 8 * h) * N * SIZE))[q * 4 + t] = stored_bits<TYPE>(v[h][q], code.to_code);
    }
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
  state_sums<TYPE, N, AHEAD>(raw, open, (const uint4*)m.slices[g < 3 ? g : 2], m.bc + N, m.sum);
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
  m.scale[threadIdx.x] = expf(now) * scale;
  u8* rows = ssm + row0 * N * SIZE;
  if constexpr (TYPE == STATE_F32) {
    for (int i = threadIdx.x; i < KEPT * N; i += THREADS)
      m.b[i / N][i % N] = i / N == j ? m.bc[i % N] : kept_value(kept, kept.b, ((i64)(i / N) * groups + group) * N + i % N);
    __syncthreads();
    store_exact<N>(m, rows);
  } else {
    for (int i = threadIdx.x; i < KEPT / 2 * N; i += THREADS) {
      const int pair = i / N, at = i % N;
      const u16* b0 = (const u16*)kept.b + ((i64)(2 * pair) * groups + group) * N + at;
      const u32 low = b0[0], high = 2 * pair + 1 == j ? float_to_bfloat(m.bc[at]) : b0[(i64)groups * N];
      ((u32*)m.b)[pair * (N + 4) + at] = low | high << 16;
    }
    __syncthreads();
    store_state<TYPE, N>(m, rows, scales + row0);
  }
}
