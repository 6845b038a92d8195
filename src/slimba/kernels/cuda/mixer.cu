// Convolution of x, Mamba-2's recurrence by chunks and the gate in one pass over many tokens, with products of warpgroups (sm_90).
//
// The equations are those of ssd.cu. A block is two warpgroups and owns one head of one sequence. The first has the outputs:
// warp w tokens 16 w .. of a chunk, as rows of C B^T and of y. The second has the state in registers in float32, warp
// 4 + w channels 16 w .., and copies the next chunk. Both convolve x and gate y. Between four barriers of a chunk:
//   C B^T, C S^T, weights of tokens | copies, decays of the next chunk;  x convolved by both
//   y += weights times x            | S <- decay S + x^T B
//   D x added, y to where x lay     | S to shared memory
//   y gated and stored by both
// What leaves, with a gate: g = y silu(z), each token's 64 entries divided by their root mean square r, and the sum of
// their squares, from which slimba_rejoin makes norm(y silu(z)) weight: float16 keeps 11 bits of g whatever its size.
// Naive twin: tests/runtime/numpy_reference.py. Tests: tests/runtime/test_cuda_mixer.py.
// Which chunks there are: kept tokens (t0 < 0), those up to the last writing of the state, and the rest.
struct Chunks {
  Span when;
  i64 length;
  DEV_MEMBER i64 first() const { return when.before ? -when.before : 0; }
  DEV_MEMBER int tokens(i64 t0) const {
    return t0 < 0 ? when.before : (int)least(CHUNK, (t0 < when.stored ? when.stored : length) - t0);
  }
  DEV_MEMBER i64 after(i64 t0) const { return t0 < 0 ? 0 : t0 + tokens(t0); }
  DEV_MEMBER bool keeps(i64 t0) const { return t0 >= 0 && t0 >= when.stored; }  // the last then
};

// The first warpgroup.
template <int N>
DEV void mixer_outputs(const Mixer& q, MixerShared<N>& m, const Chunks& chunks, int b, int head) {
  const Scan& p = q.scan;
  constexpr int PANEL = MixerShared<N>::PANEL;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int own = swizzled(16 * warp + g, 0) + 4 * t;  // this lane's two numbers of piece 0; row 8 below: 1024 on
  i64 t0 = chunks.first();
#pragma unroll 1
  for (int now = 0; t0 < p.length; now ^= 1) {
    const bool replay = t0 < 0;
    const int tokens = chunks.tokens(t0);
    const i64 token0 = (i64)b * p.length + t0;
    __syncthreads();  // this chunk and the state are there
    float gram[CHUNK / 2] = {}, y[HEAD / 2] = {};
    settle(gram), settle(y);
    products_begin();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) product_both(gram, operand_at(m.c[now] + k / 4 * PANEL), operand_at(m.b[now] + k / 4 * PANEL), k % 4);
    products_commit();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) product_both(y, operand_at(m.c[now] + k / 4 * PANEL), operand_at(m.state + k / 4 * PANEL), k % 4);
    products_commit();
    mixer_convolve<N>(m, now, replay);
    see_shared_stores();
    products_wait<1>();
    u32 w[CHUNK / 16][4];
    mixer_weigh<N>(m, now, gram, w);
    products_wait<0>();
    const float decay0 = short_exp2(m.sum[now][16 * warp + g]), decay1 = short_exp2(m.sum[now][16 * warp + g + 8]);
#pragma unroll
    for (int i = 0; i < HEAD / 2; ++i) y[i] *= i % 4 < 2 ? decay0 : decay1;
    __syncthreads();  // x is there
    products_begin();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) product_across(y, w[k], across_at(m.x + k * 2048, PANEL));
    products_commit();
    uint4 z[PUT];
    mixer_ask(q, z, head, token0, replay ? 0 : tokens);
    products_wait<0>();
    __syncthreads();  // no product reads x any more
    u32 out[HEAD / 8][2];  // all loads before any store
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j) {
      const float2 d = *(const float2*)(m.skip + 8 * j + 2 * t);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const u32 x2 = *(const u32*)(m.x + (own ^ (j << 4)) + k * 1024);
        out[j][k] = pack_halves(fmaf(d.x, low_half(x2), y[4 * j + 2 * k]), fmaf(d.y, high_half(x2), y[4 * j + 2 * k + 1]));
      }
    }
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k) *(u32*)(m.x + (own ^ (j << 4)) + k * 1024) = out[j][k];
    __syncthreads();  // y is there
    if (!replay) mixer_put<N>(q, m, z, head, token0, tokens);
    t0 = chunks.after(t0);
  }
}

// The second.
template <int N>
DEV void mixer_states(const Mixer& q, MixerShared<N>& m, const Chunks& chunks, int b, int head) {
  const Scan& p = q.scan;
  constexpr int PANEL = MixerShared<N>::PANEL;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP - 4, g = lane / 4, t = lane % 4, r8 = lane % 8, i4 = lane / 8;
  const int group = head / (int)(p.heads / p.groups), own = swizzled(16 * warp + g, 0) + 4 * t;
  const float a = ((const float*)p.a)[head], bias = ((const float*)p.dt_bias)[head];
  float raw[2] = {0, 0};
  const auto ask_dt = [&](i64 t0) {  // before softplus
    if (warp || t0 >= p.length) return;
    const int tokens = chunks.tokens(t0);
    for (int k = 0; k < 2; ++k) {
      const int at = 2 * lane + k;
      if (t0 < 0) raw[k] = mixer_kept<N>(p, b).l[(at < tokens ? at : tokens - 1) * p.heads + head];
      else raw[k] = at < tokens ? ((const float*)p.dt)[((i64)b * p.length + t0 + at) * p.dt_stride + head] : 0.0f;
    }
  };
  i64 t0 = chunks.first();
  mixer_fetch<N>(q, m, 0, t0, chunks.tokens(t0), b, head, group);
  commit_copies();
  ask_dt(t0);
  if (!warp) mixer_decays<N>(p, m, 0, raw, chunks.tokens(t0), t0 < 0, a, bias);
  ask_dt(chunks.after(t0));
  float s[N / 2];  // as mixer_store says
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const i64 type = p.state_type, ssm = state_array(p.state, 0), row = mixer_row(p, b, head) + 16 * warp + g + k / 2 * 8;
      const float scale = type == STATE_INT8 ? ((const float*)state_array(p.state, 1))[row] : 0.0f;
      s[4 * j + k] = open_entry(type, ssm, row * N + 8 * j + 2 * t + k % 2, scale);
    }
  const auto show = [&] {  // the state as an operand
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        *(u32*)(m.state + j / 8 * PANEL + (own ^ (j % 8 << 4)) + k * 1024) = pack_halves(s[4 * j + 2 * k], s[4 * j + 2 * k + 1]);
  };
  show();
#pragma unroll 1
  for (int now = 0; t0 < p.length; now ^= 1) {
    const bool replay = t0 < 0, keeps = chunks.keeps(t0);
    const int tokens = chunks.tokens(t0);
    const i64 token0 = (i64)b * p.length + t0, next = chunks.after(t0);
    if (keeps && chunks.when.stored && t0 == chunks.when.stored) mixer_store<N>(p, s, mixer_row(p, b, head));
    wait_copies<0>();
    see_shared_stores();
    __syncthreads();  // this chunk and the state are there
    if (next < p.length) mixer_fetch<N>(q, m, now ^ 1, next, chunks.tokens(next), b, head, group);
    commit_copies();
    mixer_convolve<N>(m, now, replay);
    if (!warp && next < p.length) mixer_decays<N>(p, m, now ^ 1, raw, chunks.tokens(next), next < 0, a, bias);
    see_shared_stores();  // waits for everything that was asked for before
    __syncthreads();  // x is there
    if (next < p.length) ask_dt(chunks.after(next));
    uint4 z[PUT];
    mixer_ask(q, z, head, token0, replay ? 0 : tokens);
    u32 x[CHUNK / 16][4];  // of this warp's 16 channels, times what is left of them at the end
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) {
      load_transposed(x[k], (const u16*)(m.x + swizzled(16 * k + r8 + i4 / 2 * 8, 2 * warp + i4 % 2)));
      const u32 w0 = ((const u32*)m.weight[now])[8 * k + t], w1 = ((const u32*)m.weight[now])[8 * k + 4 + t];
      x[k][0] = mul_halves(x[k][0], w0), x[k][1] = mul_halves(x[k][1], w0);
      x[k][2] = mul_halves(x[k][2], w1), x[k][3] = mul_halves(x[k][3], w1);
    }
    const float whole = short_exp2(m.sum[now][CHUNK - 1]);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] *= whole;
    products_begin();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) product_across(s, x[k], across_at(m.b[now] + k * 2048, PANEL));
    products_commit();
    if (keeps) {  // at most KEPT - 1 tokens; slimba_push keeps the rest of them
      const Kept kept = mixer_kept<N>(p, b);
#pragma unroll 1
      for (int i = threadIdx.x - WIDE; i < tokens * HEAD; i += WIDE)
        keep_value(kept, kept.u, (chunks.when.at + i / HEAD) * p.inner + head * HEAD + i % HEAD,
                   m.dt[now][i / HEAD] * half_bits_to_float(*(const u16*)(m.x + swizzled(i / HEAD, i % HEAD / 8) + i % 8 * 2)));
    }
    products_wait<0>();
    __syncthreads();  // no product reads x any more
    show();
    __syncthreads();  // y is there
    if (!replay) mixer_put<N>(q, m, z, head, token0, tokens);
    t0 = next;
  }
  if (chunks.when.stored && chunks.when.stored == p.length) mixer_store<N>(p, s, mixer_row(p, b, head));
}

template <int N>
DEV void mixer(const Mixer& q, MixerShared<N>& m) {
  const Scan& p = q.scan;
  const int b = (int)(blockIdx.x / p.heads), head = (int)(blockIdx.x % p.heads), first = head * HEAD;
  const Chunks chunks = {span_of((int)position(p.state, slot_of(p.state, b)), p.length), p.length};
  for (int i = threadIdx.x; i < (MIXER_TAPS + 1) * HEAD; i += 2 * WIDE) {
    const int k = i / HEAD, channel = first + i % HEAD;
    m.conv[k][i % HEAD] = k < MIXER_TAPS  ? ((const float*)q.conv_weight)[k * p.state.channels + channel]
                          : q.conv_bias ? ((const float*)q.conv_bias)[channel]
                                        : 0.0f;
  }
  for (int i = threadIdx.x; i < HEAD; i += 2 * WIDE) m.skip[i] = ((const float*)p.d)[p.d_per_channel ? first + i : head];
  if (threadIdx.x < WIDE) mixer_outputs<N>(q, m, chunks, b, head);
  else mixer_states<N>(q, m, chunks, b, head);
}

// The shared memory of a block begins at 16 bytes; operands want 1024.
#define MIXER(N)                                             \
  KERNEL(slimba_mixer_##N, Mixer, 2 * WIDE, 2) {             \
    SHARED(smem);                                            \
    mixer<N>(p, *(MixerShared<N>*)align_shared(smem, 1024)); \
  }
MIXER(64)
MIXER(128)
