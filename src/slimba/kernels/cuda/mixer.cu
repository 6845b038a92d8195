// Convolution of x, Mamba-2's recurrence by chunks and the gate in one pass over many tokens, with products of warpgroups (sm_90).
//
// The equations are those of ssd.cu. A block is one warpgroup and owns one head of one sequence; warp w has tokens 16 w .. of a
// chunk as rows of C B^T and of y, and channels 16 w .. as rows of the state, which stays in registers in float32. While the
// tensor cores multiply C by B and by the state, the warps convolve x; the next chunk is copied meanwhile.
// What leaves, with a gate: g = y silu(z), each token's 64 entries divided by their root mean square r, and the sum of
// their squares, from which slimba_rejoin makes norm(y silu(z)) weight: float16 keeps 11 bits of g whatever its size.
// Naive twin: tests/runtime/numpy_reference.py. Tests: tests/runtime/test_cuda_mixer.py.
#define MIXER_TAPS 4
#define WIDE 128  // threads of a block

struct Mixer {
  Scan scan;  // xbc: after the convolution, only columns of B and C are read
  i64 x, x_stride, conv_weight, conv_bias;  // before the convolution, float16
  i64 z, z_stride, squares;  // gate float16, or 0; squares float32 [tokens][heads]
};

template <int N>
struct MixerShared {  // operands are panels of 64 rows of 64 numbers, 128 bytes a row, swizzled (warpgroup.cuh)
  static constexpr int PANEL = CHUNK * 128, PANELS = N / 64;
  u8 b[2][PANELS * PANEL], c[2][PANELS * PANEL];  // [s][n], of this chunk and the next
  u8 state[PANELS * PANEL];                       // [p][n]
  u8 x[PANEL];                                    // [s][p]; then y
  u8 raw[2][(CHUNK + MIXER_TAPS - 1) * 128];      // x before the convolution, from three tokens before the chunk on
  float dt[2][CHUNK], sum[2][CHUNK], within[2][CHUNK];  // as in ssd.cu, sums times log2 e
  u16 weight[2][CHUNK];
  float conv[MIXER_TAPS + 1][HEAD], skip[HEAD];  // weights, bias; D
};

// dt, its sums and decays of a chunk, by one warp; raw: of tokens 2 lane and 2 lane + 1.
template <int N>
DEV void mixer_decays(const Scan& p, MixerShared<N>& m, int to, const float (&raw)[2], int tokens, bool replay, float a, float bias) {
  const int lane = threadIdx.x % WARP;
  float dt[2], v[2];
  for (int k = 0; k < 2; ++k) {
    const bool there = 2 * lane + k < tokens;
    dt[k] = !there ? 0.0f : replay ? 1.0f : softplus(raw[k] + bias, param_float(p.dt_low), param_float(p.dt_high));
    v[k] = dt[k] * a * LOG2E;
  }
  float total = v[0] + v[1];
  for (int by = 1; by < WARP; by *= 2) {
    const float before = shuffle_up(total, by);
    if (lane >= by) total += before;
  }
  float sum[2] = {total - v[1], total};
  if (replay) sum[0] = raw[0] * LOG2E, sum[1] = raw[1] * LOG2E;
  const float end = shuffle(sum[1], WARP - 1), last = shuffle(sum[1], lane | 7);
  for (int k = 0; k < 2; ++k) {
    m.dt[to][2 * lane + k] = dt[k];
    m.sum[to][2 * lane + k] = sum[k];
    m.within[to][2 * lane + k] = dt[k] * short_exp2(last - sum[k]);
    m.weight[to][2 * lane + k] = float_to_half_bits(dt[k] * short_exp2(end - sum[k]));
  }
}

// The state in registers to memory in its type. Entry 4 j + k: channel 16 warp + lane / 4 + k / 2 * 8, n = 8 j + 2 (lane % 4) + k % 2.
template <int N>
DEV void mixer_store(const Scan& p, const float (&s)[N / 2], i64 row0) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const i64 type = p.state_type, ssm = state_array(p.state, 0), first = row0 + threadIdx.x / WARP * 16 + g;
  float to_code[2] = {0.0f, 0.0f};
  if (type == STATE_INT8) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float most = largest_of_row<N / 8>(k, [&](int j, int i) { return s[4 * j + i]; });
      const Int8Scale code = int8_scale(float_to_bits(most));
      to_code[k] = code.to_code;
      if (t == 0) ((float*)state_array(p.state, 1))[first + 8 * k] = code.step;
    }
  }
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      close_entry(type, ssm, (first + k / 2 * 8) * N + 8 * j + 2 * t + k % 2, s[4 * j + k], to_code[k / 2]);
}

// Everything of a chunk from memory: B, C and x with the three tokens before it. t0 < 0: kept tokens, whose x is no raw one.
template <int N>
DEV void mixer_fetch(const Mixer& q, MixerShared<N>& m, int to, i64 t0, int tokens, int b, int head, int group, const Kept& kept) {
  const Scan& p = q.scan;
  constexpr int PANEL = MixerShared<N>::PANEL, PIECES = N / 8;
  const i64 token0 = (i64)b * p.length + t0, first = (i64)head * HEAD;
  const int piece = threadIdx.x % PIECES;
  const u16* from = (const u16*)p.xbc + p.inner + group * N + piece * 8;
  const i64 to_c = p.groups * N;
  const int col = threadIdx.x % 8 * 8;
  const u16* from_x = (const u16*)q.x + first + col;
  if (t0 > 0 && tokens == CHUNK) {  // nearly always: everything is copied
    constexpr int ROWS = WIDE / PIECES, RAW_ROWS = WIDE / 8;
    const int row = threadIdx.x / PIECES, at = piece / 8 * PANEL + swizzled(row, piece % 8), raw_row = threadIdx.x / 8;
    static_assert(ROWS % 8 == 0, "rows of a thread are swizzled alike");
    const u16* row_b = from + (token0 + row) * p.xbc_stride;
    const u16* row_x = from_x + (token0 + raw_row - (MIXER_TAPS - 1)) * q.x_stride;
    u8* own = m.raw[to] + raw_row * 128 + col * 2;
#pragma unroll
    for (int k = 0; k < CHUNK / ROWS; ++k) {
      copy_async(m.b[to] + at + k * ROWS * 128, row_b);
      copy_async(m.c[to] + at + k * ROWS * 128, row_b + to_c);
      row_b += ROWS * p.xbc_stride;
    }
#pragma unroll
    for (int k = 0; k < CHUNK / RAW_ROWS; ++k) {
      copy_async(own + k * RAW_ROWS * 128, row_x);
      row_x += RAW_ROWS * q.x_stride;
    }
    if (raw_row < MIXER_TAPS - 1) copy_async(own + CHUNK * 128, row_x);
    return;
  }
#pragma unroll 1
  for (int row = threadIdx.x / PIECES; row < CHUNK; row += WIDE / PIECES) {
    const int at = piece / 8 * PANEL + swizzled(row, piece % 8);
    uint4 *own_b = (uint4*)(m.b[to] + at), *own_c = (uint4*)(m.c[to] + at);
    if (row >= tokens || t0 < 0) {
      *own_b = row < tokens ? kept_octet(kept, kept.b, (row * p.groups + group) * N + piece * 8) : uint4{0, 0, 0, 0};
      *own_c = uint4{0, 0, 0, 0};
    } else {
      copy_async(own_b, from + (token0 + row) * p.xbc_stride);
      copy_async(own_c, from + (token0 + row) * p.xbc_stride + to_c);
    }
  }
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < CHUNK + MIXER_TAPS - 1; row += WIDE / 8) {
    const i64 t = t0 + row - (MIXER_TAPS - 1);  // of this call
    uint4* own = (uint4*)(m.raw[to] + row * 128 + col * 2);
    if (t0 < 0) {
      const int at = row - (MIXER_TAPS - 1);
      *own = at >= 0 && at < tokens ? kept_octet(kept, kept.u, at * p.inner + first + col) : uint4{0, 0, 0, 0};
    } else if (t < 0) {
      const i64 slot = slot_of(p.state, b), time = position(p.state, slot) + t + MIXER_TAPS;  // before this call
      const float* ring = ring_row(p.state, slot, time) + first + col;
      u32 two[4];
      for (int k = 0; k < 4; ++k) two[k] = pack_halves(ring[2 * k], ring[2 * k + 1]);
      *own = uint4{two[0], two[1], two[2], two[3]};
    } else if (row - (MIXER_TAPS - 1) >= tokens) {
      *own = uint4{0, 0, 0, 0};
    } else {
      copy_async(own, from_x + ((i64)b * p.length + t) * q.x_stride);
    }
  }
}

// x of a chunk after convolution and silu, as an operand: a lane has two channels, warps 8, 20, 20 and 16 tokens, as the first
// computes the decays besides.
template <int N>
DEV void mixer_convolve(MixerShared<N>& m, int now, bool replay) {
  constexpr int ROWS = 4;  // at once: all loads before any store
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float2 w[MIXER_TAPS + 1];
#pragma unroll
  for (int k = 0; k < MIXER_TAPS + 1; ++k) w[k] = *(const float2*)(m.conv[k] + 2 * lane);
  const int end = warp < 3 ? 20 * warp + 8 : CHUNK;
#pragma unroll 1
  for (int row0 = warp ? 20 * warp - 12 : 0; row0 < end; row0 += ROWS) {
    const u8* raw = m.raw[now] + row0 * 128 + lane * 4;
    u32 in[ROWS + MIXER_TAPS - 1], out[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS + MIXER_TAPS - 1; ++i) in[i] = *(const u32*)(raw + i * 128);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float2 sum = w[MIXER_TAPS];
#pragma unroll
      for (int k = 0; k < MIXER_TAPS; ++k) {
        sum.x = fmaf(w[k].x, low_half(in[i + k]), sum.x);
        sum.y = fmaf(w[k].y, high_half(in[i + k]), sum.y);
      }
      out[i] = pack_halves(short_silu(sum.x), short_silu(sum.y));
    }
    if (replay)
#pragma unroll
      for (int i = 0; i < ROWS; ++i) out[i] = in[i + MIXER_TAPS - 1];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) *(u32*)(m.x + swizzled(row0 + i, lane / 4) + lane % 4 * 4) = out[i];
  }
}

// Sixteen tokens of y from where they lie, gated, to memory; z: what gates them.
DEV void mixer_put(const Mixer& q, const u8* y, const uint4 (&z)[4], int head, i64 token0, int tokens) {
  const Scan& p = q.scan;
  const int lane = threadIdx.x % WARP, row0 = threadIdx.x / WARP * 16 + lane / 8, piece = lane % 8;
#pragma unroll 1  // faster than four times the instructions
  for (int k = 0; k < 4; ++k) {
    const int row = row0 + 4 * k;
    uint4 out = *(const uint4*)(y + swizzled(row, piece));
    const uint4 gate = k == 0 ? z[0] : k == 1 ? z[1] : k == 2 ? z[2] : z[3];
    if (q.z) {
      float g[8], squares = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 yy = word(out, i), zz = word(gate, i);
        g[2 * i] = low_half(yy) * short_silu(low_half(zz)), g[2 * i + 1] = high_half(yy) * short_silu(high_half(zz));
        squares += g[2 * i] * g[2 * i] + g[2 * i + 1] * g[2 * i + 1];
      }
      squares += shuffle_xor(squares, 1), squares += shuffle_xor(squares, 2), squares += shuffle_xor(squares, 4);
      const float by = fast_rsqrt(squares / HEAD + MIXER_LEAST);
      out.x = pack_halves(g[0] * by, g[1] * by), out.y = pack_halves(g[2] * by, g[3] * by);
      out.z = pack_halves(g[4] * by, g[5] * by), out.w = pack_halves(g[6] * by, g[7] * by);
      if (piece == 0 && row < tokens) ((float*)q.squares)[(token0 + row) * p.heads + head] = squares;
    }
    if (row < tokens) *(uint4*)((u16*)p.y + (token0 + row) * p.y_stride + head * HEAD + piece * 8) = out;
  }
}

// gram (C B^T of this warp's 16 tokens) times what decays between the tokens, halves, as left operands.
template <int N>
DEV void mixer_weigh(const MixerShared<N>& m, int now, const float (&gram)[CHUNK / 2], u32 (&w)[CHUNK / 16][4]) {
  const int lane = threadIdx.x % WARP, tile = threadIdx.x / WARP, t = lane % 4, u0 = 16 * tile + lane / 4, u1 = u0 + 8;
  const float sum0 = m.sum[now][u0], sum1 = m.sum[now][u1];
#pragma unroll
  for (int j = 0; j < CHUNK / 16; ++j) {
    if (j > tile) {
      w[j][0] = w[j][1] = w[j][2] = w[j][3] = 0;
      continue;
    }
    float e[8];
    if (j < tile) {  // exp(c_to - c_from) by way of the last token of those around `from`
      const float last = m.sum[now][16 * j + 15], by0 = short_exp2(sum0 - last), by1 = short_exp2(sum1 - last);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 v = *(const float2*)(m.within[now] + 16 * j + 8 * i + 2 * t);
#pragma unroll
        for (int k = 0; k < 4; ++k) e[4 * i + k] = (k % 2 ? v.y : v.x) * (k < 2 ? by0 : by1);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int from = 16 * j + 8 * i + 2 * t + k % 2, to = k < 2 ? u0 : u1;
          const float by = short_exp2(fminf((k < 2 ? sum0 : sum1) - m.sum[now][from], 0.0f)), dt = m.dt[now][from];
          e[4 * i + k] = (from <= to ? dt : 0.0f) * by;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) w[j][i] = pack_halves(gram[8 * j + 2 * i] * e[2 * i], gram[8 * j + 2 * i + 1] * e[2 * i + 1]);
  }
}

template <int N>
DEV void mixer(const Mixer& q, MixerShared<N>& m) {
  const Scan& p = q.scan;
  constexpr int PANEL = MixerShared<N>::PANEL;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, r8 = lane % 8, i4 = lane / 8;
  const int b = (int)(blockIdx.x / p.heads), head = (int)(blockIdx.x % p.heads), group = head / (int)(p.heads / p.groups);
  const i64 type = p.state_type, ssm = state_array(p.state, 0), first = (i64)head * HEAD;
  const i64 slot = slot_of(p.state, b), row0 = (p.state.layer * state_array(p.state, 4) + slot) * p.inner + first;
  const Span when = span_of((int)position(p.state, slot), p.length);
  const Kept kept = kept_of(p.state, type, slot, p.inner, p.groups * N, p.heads);
  const float a = ((const float*)p.a)[head], bias = ((const float*)p.dt_bias)[head];
  const auto tokens_of = [&](i64 t0) {  // of the chunk: kept tokens (t0 < 0), those up to the last writing, and the rest
    return t0 < 0 ? when.before : (int)least(CHUNK, (t0 < when.stored ? when.stored : p.length) - t0);
  };
  const auto after = [&](i64 t0) { return t0 < 0 ? 0 : t0 + tokens_of(t0); };
  float raw[2] = {0, 0};
  const auto ask_dt = [&](i64 t0) {  // before softplus
    if (warp || t0 >= p.length) return;
    const int tokens = tokens_of(t0);
    for (int k = 0; k < 2; ++k) {
      const int at = 2 * lane + k;
      if (t0 < 0) raw[k] = kept.l[(at < tokens ? at : tokens - 1) * p.heads + head];
      else raw[k] = at < tokens ? ((const float*)p.dt)[((i64)b * p.length + t0 + at) * p.dt_stride + head] : 0.0f;
    }
  };
  const int own = swizzled(16 * warp + g, 0) + 4 * t;  // this lane's two numbers of piece 0; row 8 below: 1024 on
  i64 t0 = when.before ? -when.before : 0;
  mixer_fetch<N>(q, m, 0, t0, tokens_of(t0), b, head, group, kept);
  commit_copies();
  ask_dt(t0);
  if (!warp) mixer_decays<N>(p, m, 0, raw, tokens_of(t0), t0 < 0, a, bias);
  ask_dt(after(t0));
  for (int i = threadIdx.x; i < (MIXER_TAPS + 1) * HEAD; i += WIDE) {
    const int k = i / HEAD, channel = (int)first + i % HEAD;
    m.conv[k][i % HEAD] = k < MIXER_TAPS  ? ((const float*)q.conv_weight)[k * p.state.channels + channel]
                          : q.conv_bias ? ((const float*)q.conv_bias)[channel]
                                        : 0.0f;
  }
  for (int i = threadIdx.x; i < HEAD; i += WIDE) m.skip[i] = ((const float*)p.d)[p.d_per_channel ? first + i : head];
  float s[N / 2];  // as mixer_store says
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const i64 row = row0 + 16 * warp + g + k / 2 * 8;
      const float scale = type == STATE_INT8 ? ((const float*)state_array(p.state, 1))[row] : 0.0f;
      s[4 * j + k] = open_entry(type, ssm, row * N + 8 * j + 2 * t + k % 2, scale);
    }
#pragma unroll 1
  for (int now = 0; t0 < p.length; now ^= 1) {
    const bool replay = t0 < 0, keeps = !replay && t0 >= when.stored;
    const int tokens = tokens_of(t0);
    const i64 token0 = (i64)b * p.length + t0, next = after(t0);
    if (keeps && when.stored && t0 == when.stored) mixer_store<N>(p, s, row0);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        *(u32*)(m.state + j / 8 * PANEL + (own ^ (j % 8 << 4)) + k * 1024) = pack_halves(s[4 * j + 2 * k], s[4 * j + 2 * k + 1]);
    wait_copies<0>();
    see_shared_stores();
    __syncthreads();
    float gram[CHUNK / 2] = {}, y[HEAD / 2] = {};
    settle(gram), settle(y);
    products_begin();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) product_both(gram, operand_at(m.c[now] + k / 4 * PANEL), operand_at(m.b[now] + k / 4 * PANEL), k % 4);
    products_commit();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) product_both(y, operand_at(m.c[now] + k / 4 * PANEL), operand_at(m.state + k / 4 * PANEL), k % 4);
    products_commit();

    if (next < p.length) mixer_fetch<N>(q, m, now ^ 1, next, tokens_of(next), b, head, group, kept);
    commit_copies();
    mixer_convolve<N>(m, now, replay);
    if (!warp && next < p.length) mixer_decays<N>(p, m, now ^ 1, raw, tokens_of(next), next < 0, a, bias);
    see_shared_stores();  // waits for everything that was asked for before
    products_wait<1>();
    u32 w[CHUNK / 16][4];
    mixer_weigh<N>(m, now, gram, w);
    uint4 z[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = 16 * warp + lane / 8 + 4 * k;
      if (q.z && row < tokens && !replay) z[k] = *(const uint4*)((const u16*)q.z + (token0 + row) * q.z_stride + first + lane % 8 * 8);
    }
    products_wait<0>();
    const float decay0 = short_exp2(m.sum[now][16 * warp + g]), decay1 = short_exp2(m.sum[now][16 * warp + g + 8]);
#pragma unroll
    for (int i = 0; i < HEAD / 2; ++i) y[i] *= i % 4 < 2 ? decay0 : decay1;
    __syncthreads();  // x is there, and nobody reads the state any more
    if (next < p.length) ask_dt(after(next));
    products_begin();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) product_across(y, w[k], across_at(m.x + k * 2048, PANEL));
    products_commit();
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
    if (keeps)  // at most KEPT - 1 tokens; slimba_push keeps the rest of them
      for (int i = threadIdx.x; i < tokens * HEAD; i += WIDE)
        keep_value(kept, kept.u, (when.at + i / HEAD) * p.inner + first + i % HEAD,
                   m.dt[now][i / HEAD] * half_bits_to_float(*(const u16*)(m.x + swizzled(i / HEAD, i % HEAD / 8) + i % 8 * 2)));
    products_wait<1>();
    __syncthreads();  // nobody reads x any more
    if (!replay) {
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
      sync_warp();
      mixer_put(q, m.x, z, head, token0, tokens);
    }
    products_wait<0>();
    if (keeps) return;
    t0 = next;
  }
  if (when.stored && when.stored == p.length) mixer_store<N>(p, s, row0);
}

KERNEL(slimba_mixer_64, Mixer, WIDE, 2) {
  SHARED(smem);
  mixer<64>(p, *(MixerShared<64>*)align_shared(smem, 1024));
}
KERNEL(slimba_mixer_128, Mixer, WIDE, 2) {
  SHARED(smem);
  mixer<128>(p, *(MixerShared<128>*)align_shared(smem, 1024));
}
