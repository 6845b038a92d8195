// The recurrence of steps.cu for int8 states where sequences are many: a block computes QUADS fours of heads of one sequence, one
// after another, and everything of the next is on its way meanwhile. What depends on B and C alone is made once.
//
// Naive twin: tests/runtime/numpy_reference.py (mixer2). Tests: tests/runtime/test_cuda_broad_step.py.
template <int N>
struct FlowShared {
  u8 state[2][THREADS * N], u[2][KEPT * KeptRows<STATE_INT8>::STRIDE];
  float b[KEPT / 2 * (N + 4)];
  u32 slices[3][N / 4];
  float bc[2 * N], sum[THREADS], of_kept[THREADS], value[THREADS];
  float since[STATE_HEADS][KEPT], now[STATE_HEADS], part[WARPS];
  u16 piece[STATE_HEADS][3][KEPT];
};

// A row's 16 bytes `piece` in shared memory, so that eight lanes meet all banks.
template <int N>
DEV int flow_at(int row, int piece) {
  return row * N + ((N >= 128 ? piece ^ (row & 1) << 2 : piece) << 4);
}

#define FLOW_TAPS 4
// What a thread needs of its channel; nothing is computed of it before its turn, or the thread would wait.
struct FlowChannel {
  float by[FLOW_TAPS], before[FLOW_TAPS], bias, in, z, scale, weight, raw_dt, last, a, dt_bias, d, l_before;
};

// Grid: 4 QUADS heads, sequences.
template <int N, int QUADS>
DEV void flow(const Steps& all, FlowShared<N>& m) {
  constexpr int Q = N / 64, ENTRIES = N / WARP, TYPE = STATE_INT8, EACH = N / 16;  // EACH: pieces of a row
  const Recurrence& p = all.r;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, b = blockIdx.y;
  const int inner = (int)p.inner, heads = (int)p.heads, groups = (int)p.groups, four0 = (int)blockIdx.x * QUADS;
  const int group = four0 * STATE_HEADS / (heads / groups);
  const i64 slot = slot_of(p.state, b);
  const int place = (int)p.state.layer * (int)state_array(p.state, 4) + (int)slot;
  const int time = (int)position(p.state, slot), j = time % KEPT;
  const float* ring = (const float*)state_array(p.state, 2) + (i64)place * (int)(p.state.taps * p.state.channels);
  const float* newest = ring + time % (int)p.state.taps * (int)p.state.channels;
  u8* states = (u8*)state_array(p.state, 0) + (i64)place * (inner * N);
  float* scales = (float*)state_array(p.state, 1) + (i64)place * inner;
  const Kept kept = {TYPE, state_array(p.state, 5) + (i64)place * (KEPT * inner * 2),
                     state_array(p.state, 6) + (i64)place * (KEPT * groups * N * 2), (float*)state_array(p.state, 7) + (i64)place * (KEPT * heads)};
  // Lane r STATE_HEADS + h makes the weight of head h and row r of the kept b
  const int of_head = lane % STATE_HEADS, of_token = lane / STATE_HEADS % (KEPT / WARPS) * WARPS + warp;
  auto stage = [&](int k) {
    const u8* from = states + (four0 + k) * (THREADS * N) + threadIdx.x * 16;
    u8* to = m.state[k % 2] + flow_at<N>(threadIdx.x / EACH, threadIdx.x % EACH);
#pragma unroll
    for (int i = 0; i < EACH; ++i) copy_async(to + i * (THREADS * 16), from + i * (THREADS * 16));
    ask_kept<TYPE>(m.u[k % 2], (const u8*)kept.u + (four0 + k) * (THREADS * 2), inner * 2, j);
  };
  auto older = [&](int k, FlowChannel& c) {  // what was there before this token
    const int channel = (four0 + k) * THREADS + threadIdx.x, head = channel / 64;
    const int taps = (int)p.state.taps, channels = (int)p.state.channels;
    c.bias = p.conv_bias ? ((const float*)p.conv_bias)[channel] : 0.0f;
#pragma unroll
    for (int i = 0; i < FLOW_TAPS; ++i) {
      c.by[i] = i < taps ? ((const float*)p.conv_weight)[i * channels + channel] : 0.0f;
      c.before[i] = i < taps - 1 ? load_fresh(ring + (time + 1 + i) % taps * channels + channel) : 0.0f;
    }
    c.scale = scales[channel];
    c.weight = all.image && !all.places ? ((const float*)all.weight)[channel] : 0.0f;
    c.a = ((const float*)p.a)[head], c.dt_bias = ((const float*)p.dt_bias)[head];
    c.d = ((const float*)p.d)[p.d_per_channel ? channel : head], c.last = j ? kept.l[(j - 1) * heads + head] : 0.0f;
    c.l_before = of_token < j ? kept.l[of_token * heads + (four0 + k) * STATE_HEADS + of_head] : 0.0f;
  };
  auto newer = [&](int k, FlowChannel& c) {
    const int channel = (four0 + k) * THREADS + threadIdx.x;
    c.raw_dt = load_fresh((const float*)p.dt + b * (int)p.dt_stride + channel / 64), c.in = load_fresh(newest + channel);
    c.z = p.gated ? load_fresh((const float*)p.z + b * (int)p.z_stride + channel) : 0.0f;
  };

  stage(0);
  FlowChannel next;
  older(0, next);
  const bool of_bc = (int)threadIdx.x < 2 * N;
  const int entry = threadIdx.x % N, bc_channel = inner + (group + (threadIdx.x < N ? 0 : groups)) * N + entry;
  const Taps other = older_taps(p, ring, time, of_bc ? bc_channel : inner);
  float before[KEPT / WARPS][ENTRIES];  // rows warp and warp + 8 of the kept b
#pragma unroll
  for (int r = 0; r < KEPT / WARPS; ++r) {
    const int i = r * WARPS + warp;
    kept_entries<TYPE>((const u8*)kept.b + (i * groups + group) * (N * 2), i < j, before[r]);
  }
  release_next();
  await_previous();
  const float in_bc = load_fresh(newest + (of_bc ? bc_channel : inner));
  newer(0, next);
  const float of_bc_value = silu(fmaf(other.last, in_bc, other.sum));
  if (of_bc) m.bc[threadIdx.x] = threadIdx.x < N ? as_kept(TYPE, of_bc_value) : of_bc_value;
  if (threadIdx.x < N && four0 * STATE_HEADS % (heads / groups) == 0) keep_value(kept, kept.b, (j * groups + group) * N + entry, of_bc_value);
  __syncthreads();
  float dot[KEPT / WARPS] = {};
  const u32 top = kept_dots<N>(m.bc, before, j, dot);
  const float own_dot = of_token > j ? 0.0f : lane < STATE_HEADS ? dot[0] : dot[1];
  const float c_unit = put_slices<N>(m.slices, m.bc + N, warp_max_bits(top));
  if (j == KEPT - 1) put_pairs<TYPE, N>(m.b, (const u16*)kept.b + group * N, groups * N, m.bc, j);

#pragma unroll 1
  for (int k = 0; k < QUADS; ++k) {
    const FlowChannel own = next;
    const int channel = (four0 + k) * THREADS + threadIdx.x;
    if (k + 1 < QUADS) {
      stage(k + 1);
      older(k + 1, next);
      newer(k + 1, next);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    const u8 *state = m.state[k % 2], *u = m.u[k % 2];
    float x = own.bias;
#pragma unroll
    for (int i = 0; i < FLOW_TAPS; ++i) x = fmaf(own.by[i], i == (int)p.state.taps - 1 ? own.in : own.before[i], x);
    x = silu(x);
    const float dt = softplus(own.raw_dt + own.dt_bias, param_float(p.dt_low), param_float(p.dt_high)), now = own.last + dt * own.a;
    const u16 of_now = float_to_bfloat(dt * x);
    ((u16*)kept.u)[j * inner + channel] = of_now;
    ((u16*)(u + j * KeptRows<TYPE>::STRIDE))[threadIdx.x] = of_now;
    if (threadIdx.x % 64 == 0) kept.l[j * heads + channel / 64] = m.now[threadIdx.x / 64] = now;
    __syncthreads();
    if (lane < STATE_HEADS * KEPT / WARPS) {
      const float latest = m.now[of_head], by = of_token <= j ? expf(latest - (of_token < j ? own.l_before : latest)) : 0.0f;
      m.since[of_head][of_token] = by;
      put_pieces(m.piece[of_head], of_token, by * own_dot);
    }
    const Place operand = all.places ? load_place(all.places, channel) : Place{0, -1, 0, 0};  // earlier it costs 1 % (docs/log.md)
    uint4 raw[2][2][Q];
    auto open = [&](int row, int q) { return *(const uint4*)(state + flow_at<N>(row, q * 4 + t)); };
#pragma unroll
    for (int i = 0; i < 4 * Q; ++i) raw[i / Q / 2][i / Q % 2][i % Q] = open(warp * 32 + i / Q * 8 + g, i % Q);
    state_sums<TYPE, N, 2>(raw, [](int, uint4(&)[2][Q]) {}, (const uint4*)m.slices[g < 3 ? g : 2], nullptr, m.sum);
    __syncthreads();
    kept_sums(m.piece, u, m.of_kept);
    sync_warp();
    const float decay = expf(now) * own.scale;
    float y = fmaf(m.sum[threadIdx.x], decay * c_unit, own.d * x) + m.of_kept[threadIdx.x];
    if (p.gated) y *= silu(own.z);
    if (all.places) {
      put_of_sequence(all, operand, b, y);
      const float squares = warp_sum(y * y);
      if (lane == 0) ((float*)all.squares)[((b * (int)gridDim.x * QUADS) + four0 + k) * WARPS + warp] = squares;
    } else if (all.image) {
      const float squares = warp_sum(y * y);
      if (lane == 0) m.part[warp] = squares;
      m.value[threadIdx.x] = y * own.weight * IMAGE_SCALE;
    } else {
      ((float*)p.y)[b * (int)p.y_stride + channel] = y;
    }
    if (j == KEPT - 1) {
      sync_warp();
      m.sum[threadIdx.x] = decay;  // of the warp's own rows, as everything that store_state reads of them
      sync_warp();
      store_state<TYPE, N>(u, m.since, m.sum, m.b, open, states + (four0 + k) * (THREADS * N), scales + (four0 + k) * THREADS);
    }
    __syncthreads();
    if (!all.image || all.places) continue;
    put_image(all, m.value, four0 + k, b);
    if (threadIdx.x == 0) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += m.part[w];
      ((float*)all.squares)[b * (int)(gridDim.x * QUADS) + four0 + k] = sum;
    }
  }
}
