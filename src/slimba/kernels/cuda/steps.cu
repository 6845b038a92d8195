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
  i64 group, group2;  // bytes of eight sequences' operands
  i64 places;  // of the channels, a struct Place each (eight.cuh), where image and image2 are operands; then squares [B][fours][WARPS]
};

template <int TYPE, int N>
struct StepsShared {
  static constexpr bool EXACT = TYPE == STATE_F32;
  u8 u[KEPT * KeptRows<TYPE>::STRIDE];
  float b[EXACT ? KEPT * N : KEPT / 2 * (N + 4)];  // or pairs of tokens in bfloat16, N + 4 words a pair
  u32 slices[3][N / 4];
  float bc[2 * N], sum[THREADS], of_kept[THREADS];
  float since[STATE_HEADS][KEPT], weight[STATE_HEADS][KEPT], now[STATE_HEADS], part[WARPS];
  u16 piece[STATE_HEADS][3][KEPT];  // of the weights, which they add up to
};
template <int TYPE>
DEV float kept_u(const u8* rows, int token, int row) {
  const u8* at = rows + token * KeptRows<TYPE>::STRIDE;
  return TYPE == STATE_F32 ? ((const float*)at)[row] : bfloat_to_float(((const u16*)at)[row]);
}
// Asks for the u of the tokens before the j-th; rows behind it become 0.
template <int TYPE>
DEV void ask_kept(u8* rows, const u8* from, i64 stride, int j) {
  constexpr int PIECES = KeptRows<TYPE>::PIECES;
#pragma unroll
  for (int i = 0; i < KEPT * PIECES / THREADS; ++i) {
    const int token = (threadIdx.x + i * THREADS) / PIECES, piece = threadIdx.x % PIECES;
    u8* to = rows + token * KeptRows<TYPE>::STRIDE + piece * 16;
    if (token < j) copy_async(to, from + token * stride + piece * 16);
    else if (token > j) *(uint4*)to = uint4{0, 0, 0, 0};
  }
  commit_copies();
}
// Entries lane E .. of a kept row.
template <int TYPE, int E>
DEV void kept_entries(const u8* row, bool there, float (&to)[E]) {
  const int lane = threadIdx.x % WARP;
  u32 w[E] = {};
  if constexpr (TYPE == STATE_F32) {
    load_words<E>(there, (const u32*)row + lane * E, w);
#pragma unroll
    for (int e = 0; e < E; ++e) to[e] = bits_to_float(w[e]);
  } else {
    u32 two[E / 2];
    load_words<E / 2>(there, (const u32*)row + lane * (E / 2), two);
#pragma unroll
    for (int e = 0; e < E; ++e) to[e] = bits_to_float(e % 2 ? two[e / 2] & 0xffff0000u : two[e / 2] << 16);
  }
}
// A number as three of bfloat16.
DEV void put_pieces(u16 (&to)[3][KEPT], int at, float v) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    to[k][at] = float_to_bfloat(v);
    v -= bfloat_to_float(to[k][at]);
  }
}
// of_kept[row] = the kept tokens' u of a warp's rows by their weights, on the tensor cores: rows of the product are channels.
DEV void kept_sums(const u16 (&piece)[STATE_HEADS][3][KEPT], const u8* rows, float* of_kept) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const u32* weights = (const u32*)piece[warp / 2][g < 3 ? g : 2];
  const u32 b0 = weights[t], b1 = weights[t + 4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    u32 a[4];
    float sum[4] = {};
    load_transposed(a, (const u16*)(rows + (lane / 16 * 8 + lane % 8) * KeptRows<STATE_BF16>::STRIDE) + warp * 32 + tile * TILE + lane / 8 % 2 * 8);
    mma_bf16(sum, a[0], a[1], a[2], a[3], b0, b1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float last = shuffle(sum[2 * h], lane + 1 < WARP ? lane + 1 : lane);
      if (t == 0) of_kept[warp * 32 + tile * TILE + g + 8 * h] = sum[2 * h] + (sum[2 * h + 1] + last);
    }
  }
}

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

DEV void put_of_sequence(const Steps& all, const Place& place, int b, float y) {
  put_operand(all.image + b / 8 * all.group, all.image2 + b / 8 * all.group2, place, b % 8, y);
}
DEV u32 plane_places(const Steps& all) { return (u32)all.plane_kpad * THREADS / (u32)all.r.inner; }
// The image's places of a block's 256 channels, from values in the order of channels.
DEV void put_image(const Steps& all, const float* v, int four, int b) {
  if (threadIdx.x < THREADS / 2) {
    const int eight = threadIdx.x / 4, i = threadIdx.x % 4;
    const u32 two = pack_halves(v[image_column(eight, 2 * i)], v[image_column(eight, 2 * i + 1)]);
    *(u32*)(image_at(all.image, (int)all.padded, b, four * 32 + eight) + i * 4) = two;
  }
  const u32 places = plane_places(all), first = four * THREADS;  // u32: shifts and masks without care of signs
  for (u32 i = THREADS - 1 - threadIdx.x; i < places / 2; i += THREADS) {
    const u32 place = four * places + i / 16 * 32 + i % 16, step = place % 256 / 32 % 2 * 8 + place % 16 / 2;
    const i32 low = ((const i32*)all.plane_index)[place], high = ((const i32*)all.plane_index)[place + 16];
    const u32 two = pack_halves(low < 0 ? 0.0f : v[low - (i32)first], high < 0 ? 0.0f : v[high - (i32)first]);
    *(u32*)(image_at(all.image2, (int)all.padded, b, (int)(place / 256 * 32 + step * 2 + place % 2)) + place / 64 % 4 * 4) = two;
  }
}

// S <- decay S + u b^T for the rows of a block after the last of KEPT tokens. Float32, one row of four lanes after another.
template <int N>
DEV void store_exact(const StepsShared<STATE_F32, N>& m, u8* rows) {
  constexpr int Q = N / 16;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const int row = warp * 32 + k * 8 + g;
    float4* at = (float4*)rows + row * (N / 4);
#pragma unroll 1
    for (int q = 0; q < Q; ++q) {
      float4 v = at[q * 4 + t];
      v.x *= m.sum[row], v.y *= m.sum[row], v.z *= m.sum[row], v.w *= m.sum[row];
#pragma unroll 4
      for (int i = 0; i < KEPT; ++i) {
        const float *b = &m.b[i * N + (q * 4 + t) * 4], u = kept_u<STATE_F32>(m.u, i, row) * m.since[row / 64][i];
        v.x = fmaf(u, b[0], v.x), v.y = fmaf(u, b[1], v.y);
        v.z = fmaf(u, b[2], v.z), v.w = fmaf(u, b[3], v.w);
      }
      at[q * 4 + t] = v;
    }
  }
}
// C as fixed point of three slices by all warps; `top`: the bits of its largest entry. Returns the unit.
template <int N>
DEV float put_slices(u32 (&to)[3][N / 4], const float* c, u32 top) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const float most = bits_to_float(top), to_fixed = LIMIT * fast_reciprocal(most);
  const bool damaged = top >= INF_BITS, zero = most < 1e-30f;
  if (lane < N / 4 / WARPS) {
    const int w = warp * (N / 4 / WARPS) + lane;
    int fixed[4];
    u32 digits[3];
#pragma unroll
    for (int k = 0; k < 4; ++k) fixed[k] = damaged || zero ? 0 : __float2int_rn(c[4 * w + k] * to_fixed);
    slice_words(fixed, digits);
#pragma unroll
    for (int s = 0; s < 3; ++s) to[s][w] = digits[s];
  }
  return damaged ? bits_to_float(0x7fc00000u) : zero ? 0.0f : most * (1.0f / LIMIT);
}
// b_i . C of tokens warp and warp + 8, in every lane; the bits of the lane's largest |C|. before: the kept b of these tokens, bc: this
// token's, the j-th, and C.
template <int N>
DEV u32 kept_dots(const float* bc, const float (&before)[KEPT / WARPS][N / WARP], int j, float (&dot)[KEPT / WARPS]) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 top = 0;
#pragma unroll
  for (int e = 0; e < N / WARP; ++e) {
    const float c = bc[N + lane * (N / WARP) + e];
#pragma unroll
    for (int r = 0; r < KEPT / WARPS; ++r) dot[r] = fmaf(r * WARPS + warp == j ? bc[lane * (N / WARP) + e] : before[r][e], c, dot[r]);
    const u32 bits = float_to_bits(c) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
#pragma unroll
  for (int r = 0; r < KEPT / WARPS; ++r) dot[r] = warp_sum(dot[r]);
  return top;
}

// Grid: fours of heads, sequences.
template <int TYPE, int N>
DEV void steps(const Steps& all, StepsShared<TYPE, N>& m) {
  constexpr int SIZE = Stored<TYPE>::SIZE, E = Stored<TYPE>::E, Q = N * SIZE / 64, AHEAD = TYPE == STATE_F32 ? 1 : 2;
  constexpr int ENTRIES = N / WARP, KEPT_SIZE = KeptRows<TYPE>::SIZE;
  const Recurrence& p = all.r;
  if (all.places) release_next();  // with few sequences there is room for the product's blocks beside these
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, b = blockIdx.y;
  const int inner = (int)p.inner, heads = (int)p.heads, groups = (int)p.groups, head0 = (int)blockIdx.x * STATE_HEADS;
  const int group = head0 / (heads / groups), first = head0 * 64, channel = first + threadIdx.x, head = channel / 64;
  const i64 slot = slot_of(p.state, b);
  const int place = (int)p.state.layer * (int)state_array(p.state, 4) + (int)slot;  // 32 bits, or each address takes six instructions
  const i64 row0 = (i64)place * inner + first;
  const int time = (int)position(p.state, slot), j = time % KEPT;
  const float* ring = (const float*)state_array(p.state, 2) + (i64)place * (int)(p.state.taps * p.state.channels);
  const float* newest = ring + time % (int)p.state.taps * (int)p.state.channels;
  u8* rows = (u8*)state_array(p.state, 0) + row0 * (N * SIZE);
  float* scales = (float*)state_array(p.state, 1) + row0;
  const Kept kept = {TYPE, state_array(p.state, 5) + (i64)place * (KEPT * inner * KEPT_SIZE),
                     state_array(p.state, 6) + (i64)place * (KEPT * groups * N * KEPT_SIZE), (float*)state_array(p.state, 7) + (i64)place * (KEPT * heads)};
  const u8* own_rows = rows + (warp * 32 + g) * (N * SIZE) + t * 16;
  uint4 raw[AHEAD][2][Q];
  auto open = [&](int tile, uint4 (&to)[2][Q]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int q = 0; q < Q; ++q)
        to[h][q] = load_state(own_rows + (tile * TILE + 8 * h) * (N * SIZE) + q * 64);
  };
#pragma unroll
  for (int tile = 0; tile < AHEAD; ++tile) open(tile, raw[tile]);
  const float scale = TYPE == STATE_INT8 ? scales[threadIdx.x] : 1.0f;
  ask_kept<TYPE>(m.u, (const u8*)kept.u + first * KEPT_SIZE, inner * KEPT_SIZE, j);
  const bool of_bc = (int)threadIdx.x < 2 * N;
  const int entry = threadIdx.x % N, bc_channel = inner + (group + (threadIdx.x < N ? 0 : groups)) * N + entry;
  const Taps own = older_taps(p, ring, time, channel), other = older_taps(p, ring, time, of_bc ? bc_channel : inner);
  float before[KEPT / WARPS][ENTRIES];  // rows warp and warp + 8 of the kept b
#pragma unroll
  for (int r = 0; r < KEPT / WARPS; ++r) {
    const int i = r * WARPS + warp;
    kept_entries<TYPE>((const u8*)kept.b + (i64)(i * groups + group) * N * KEPT_SIZE, i < j, before[r]);
  }
  const float a = ((const float*)p.a)[head], dt_bias = ((const float*)p.dt_bias)[head];
  const float d = ((const float*)p.d)[p.d_per_channel ? channel : head], last = j ? kept.l[(j - 1) * heads + head] : 0.0f;
  const float weight = all.image && !all.places ? ((const float*)all.weight)[channel] : 0.0f;
  const Place operand = all.places ? load_place(all.places, channel) : Place{0, -1, 0, 0};
  // Lane r STATE_HEADS + h makes the weight of head h and row r of the kept b
  const int of_head = lane % STATE_HEADS, of_token = lane / STATE_HEADS % (KEPT / WARPS) * WARPS + warp;
  const float l_before = of_token < j ? kept.l[of_token * heads + head0 + of_head] : 0.0f;
  if (all.image && !all.places && threadIdx.x * 32u < plane_places(all)) prefetch((const i32*)all.plane_index + blockIdx.x * plane_places(all) + threadIdx.x * 32);
  if (!all.places) release_next();
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
  wait_copies<0>();
  if constexpr (TYPE == STATE_F32) ((float*)(m.u + j * KeptRows<TYPE>::STRIDE))[threadIdx.x] = of_now;
  else ((u16*)(m.u + j * KeptRows<TYPE>::STRIDE))[threadIdx.x] = float_to_bfloat(of_now);
  __syncthreads();
  float dot[KEPT / WARPS] = {};
  const u32 top = kept_dots<N>(m.bc, before, j, dot);
  if (lane < STATE_HEADS * KEPT / WARPS) {
    const float latest = m.now[of_head], by = of_token <= j ? expf(latest - (of_token < j ? l_before : latest)) : 0.0f;
    const float weight = of_token <= j ? by * (lane < STATE_HEADS ? dot[0] : dot[1]) : 0.0f;
    m.since[of_head][of_token] = by;
    if constexpr (TYPE == STATE_F32) m.weight[of_head][of_token] = weight;
    else put_pieces(m.piece[of_head], of_token, weight);
  }
  float factor = expf(now);
  if constexpr (TYPE == STATE_INT8) factor *= scale * put_slices<N>(m.slices, m.bc + N, warp_max_bits(top));
  __syncthreads();
  state_sums<TYPE, N, AHEAD>(raw, open, (const uint4*)m.slices[g < 3 ? g : 2], m.bc + N, m.sum);
  if constexpr (TYPE != STATE_F32) kept_sums(m.piece, m.u, m.of_kept);
  __syncthreads();
  float y = fmaf(m.sum[threadIdx.x], factor, d * x);
  if constexpr (TYPE == STATE_F32) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) y = fmaf(m.weight[threadIdx.x / 64][i], kept_u<TYPE>(m.u, i, threadIdx.x), y);
  } else {
    y += m.of_kept[threadIdx.x];
  }
  if (p.gated) y *= silu(z);
  if (all.places) {
    put_of_sequence(all, operand, b, y);
    const float squares = warp_sum(y * y);
    if (lane == 0) ((float*)all.squares)[(b * (int)gridDim.x + blockIdx.x) * WARPS + warp] = squares;
  } else if (all.image) {
    const float squares = warp_sum(y * y);
    if (lane == 0) m.part[warp] = squares;
    m.sum[threadIdx.x] = y * weight * IMAGE_SCALE;
    __syncthreads();
    put_image(all, m.sum, blockIdx.x, b);
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

  __syncthreads();
  m.sum[threadIdx.x] = expf(now) * scale;
  if constexpr (TYPE == STATE_F32) {
    for (int i = threadIdx.x; i < KEPT * N; i += THREADS)
      m.b[i] = i / N == j ? m.bc[i % N] : kept_value(kept, kept.b, ((i64)(i / N) * groups + group) * N + i % N);
    __syncthreads();
    store_exact<N>(m, rows);
  } else {
    put_pairs<TYPE, N>(m.b, (const u16*)kept.b + group * N, groups * N, m.bc, j);
    __syncthreads();
    auto stored = [&](int row, int q) { return ((const uint4*)(rows + row * N * SIZE))[q * 4 + lane % 4]; };
    store_state<TYPE, N>(m.u, m.since, m.sum, m.b, stored, rows, scales);
  }
}
