// What mixer.cu is made of: its arguments and shared memory, copies of a chunk, decays, convolution, gate.
#define MIXER_TAPS 4
#define WIDE 128  // threads of a warpgroup
#define LOG2E 1.4426950408889634f

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

DEV float short_silu(float v) { return v * short_reciprocal(1.0f + short_exp2(v * -LOG2E)); }
DEV int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }  // of 16 bytes

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
  const i64 type = p.state_type, ssm = state_array(p.state, 0), first = row0 + threadIdx.x / WARP % 4 * 16 + g;
  float to_code[2] = {0.0f, 0.0f};
  if (type == STATE_INT8) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float most = 0;
      bool bad = false;
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
        for (int e = 0; e < 2; ++e) {
          const float v = fabsf(s[4 * j + 2 * k + e]);
          bad |= float_to_bits(v) >= INF_BITS;
          most = fmaxf(most, v);
        }
      if (bad) most = bits_to_float(INF_BITS);
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
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

// Found again where it is needed, which is seldom: not kept in registers.
template <int N>
DEV Kept mixer_kept(const Scan& p, int b) {
  return kept_of(p.state, p.state_type, slot_of(p.state, b), p.inner, p.groups * N, p.heads);
}
DEV i64 mixer_row(const Scan& p, int b, int head) {
  return (p.state.layer * state_array(p.state, 4) + slot_of(p.state, b)) * p.inner + (i64)head * HEAD;
}

// Everything of a chunk from memory: B, C and x with the three tokens before it. t0 < 0: kept tokens, whose x is no raw one.
template <int N>
DEV void mixer_fetch(const Mixer& q, MixerShared<N>& m, int to, i64 t0, int tokens, int b, int head, int group) {
  const Scan& p = q.scan;
  constexpr int PANEL = MixerShared<N>::PANEL, PIECES = N / 8;
  const i64 token0 = (i64)b * p.length + t0, first = (i64)head * HEAD;
  const int thread = threadIdx.x - WIDE, piece = thread % PIECES;
  const u16* from = (const u16*)p.xbc + p.inner + group * N + piece * 8;
  const i64 to_c = p.groups * N;
  const int col = thread % 8 * 8;
  const u16* from_x = (const u16*)q.x + first + col;
  if (t0 > 0 && tokens == CHUNK) {  // nearly always: everything is copied
    constexpr int ROWS = WIDE / PIECES, RAW_ROWS = WIDE / 8;
    const int row = thread / PIECES, at = piece / 8 * PANEL + swizzled(row, piece % 8), raw_row = thread / 8;
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
  const Kept kept = mixer_kept<N>(p, b);
#pragma unroll 1
  for (int row = thread / PIECES; row < CHUNK; row += WIDE / PIECES) {
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
  for (int row = thread / 8; row < CHUNK + MIXER_TAPS - 1; row += WIDE / 8) {
    const i64 t = t0 + row - (MIXER_TAPS - 1);  // of this call
    uint4* own = (uint4*)(m.raw[to] + row * 128 + col * 2);
    if (t0 < 0) {
      const int at = row - (MIXER_TAPS - 1);
      *own = at >= 0 && at < tokens ? kept_octet(kept, kept.u, at * p.inner + first + col) : uint4{0, 0, 0, 0};
    } else if (t < 0) {
      const i64 slot = slot_of(p.state, b);
      const float* ring = ring_row(p.state, slot, position(p.state, slot) + t + MIXER_TAPS) + first + col;  // before this call
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

// x of a chunk after convolution and silu, as an operand: a lane has two channels, a warp eight tokens, but the one that
// computes decays four.
template <int N>
DEV void mixer_convolve(MixerShared<N>& m, int now, bool replay) {
  constexpr int ROWS = 4;  // at once: all loads before any store
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float2 w[MIXER_TAPS + 1];
#pragma unroll
  for (int k = 0; k < MIXER_TAPS + 1; ++k) w[k] = *(const float2*)(m.conv[k] + 2 * lane);
  const int end = warp < 4 || warp == 7 ? 8 * warp + 8 : 8 * warp + 4;
#pragma unroll 1
  for (int row0 = warp < 5 ? 8 * warp : 8 * warp - 4; row0 < end; row0 += ROWS) {
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

// Eight tokens of each warp: what gates them, and y from where it lies, gated, to memory.
#define PUT 2  // 16 bytes of a lane
DEV int put_row(int k) { return threadIdx.x / WARP * 8 + threadIdx.x % WARP / 8 + 4 * k; }
DEV void mixer_ask(const Mixer& q, uint4 (&z)[PUT], int head, i64 token0, int tokens) {
#pragma unroll
  for (int k = 0; k < PUT; ++k)
    z[k] = q.z && put_row(k) < tokens ? *(const uint4*)((const u16*)q.z + (token0 + put_row(k)) * q.z_stride + head * HEAD + threadIdx.x % 8 * 8)
                                      : uint4{0, 0, 0, 0};
}
template <int N>
DEV void mixer_put(const Mixer& q, const MixerShared<N>& m, const uint4 (&z)[PUT], int head, i64 token0, int tokens) {
  const Scan& p = q.scan;
  const int piece = threadIdx.x % 8;
  uint4 y[PUT];
#pragma unroll
  for (int k = 0; k < PUT; ++k) y[k] = *(const uint4*)(m.x + swizzled(put_row(k), piece));
#pragma unroll
  for (int k = 0; k < PUT; ++k) {
    const int row = put_row(k);
    uint4 out = y[k];
    if (q.z) {
      float g[8], squares = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 yy = word(out, i), zz = word(z[k], i);
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
