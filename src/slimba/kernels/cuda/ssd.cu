// Mamba-2's recurrence over many tokens by chunks, on tensor cores (Dao & Gu 2024, arXiv 2405.21060, section 6). Naive
// twin: the recurrence in scan.cu, and tests/runtime/numpy_reference.py.
//
// With c_t the sum of dt a over a chunk up to t, S the state before the chunk:
//   y_t = sum over s <= t of exp(c_t - c_s) dt_s (C_t . B_s) x_s  +  exp(c_t) C_t S^T  +  D x_t
//   S  <- exp(c_Q) S + sum over s of exp(c_Q - c_s) dt_s x_s B_s^T
// A block owns one head of one sequence and walks over its chunks of Q = 64 tokens; the state stays in registers in float32,
// products are float16 with float32 sums. Headdim 64, N 64 or 128; other shapes take scan.cu. A state stored in bfloat16 or
// int8 is rounded once, after the last multiple of KEPT tokens (step.cuh); tokens beyond it are a chunk of their own, and
// those that were kept when the call begins are one without outputs.
template <int N>
struct SsdShared {  // rows are padded by 16 bytes, so that eight of them lie in different banks; of this chunk and the next
  static constexpr int XS = HEAD + 8, NS = N + 8;
  u16 x[2][CHUNK * XS], b[2][CHUNK * NS], c[2][CHUNK * NS];  // [s][p], [s][n]
  u16 state[HEAD * NS];                                      // [p][n]
  u16 weight[CHUNK];                                         // exp(c_Q - c_s) dt_s
  float dt[CHUNK], sum[CHUNK];                               // dt_s and c_s
  float within[CHUNK];                                       // exp(c_e - c_s) dt_s, e the last of the 16 tokens around s
  u32 top[2][HEAD];
};

// The state in registers, laid out as in ssd(), to memory in its type.
template <int N>
DEV void ssd_store(const Scan& p, SsdShared<N>& m, const float (&s)[N / 16][4], i64 row0) {
  constexpr int TILES = N / 16;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, tile = warp % 4, half = warp / 4;
  const i64 type = p.state_type, ssm = state_array(p.state, 0);
  float* scales = (float*)state_array(p.state, 1);
  float to_code[2] = {0.0f, 0.0f};
  if (type == STATE_INT8) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float most = largest_of_row<TILES>(k, [&](int j, int i) { return s[j][i]; });
      if (t == 0) m.top[half][16 * tile + g + 8 * k] = float_to_bits(most);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int r = 16 * tile + g + 8 * k;
      const Int8Scale code = int8_scale(m.top[0][r] > m.top[1][r] ? m.top[0][r] : m.top[1][r]);
      to_code[k] = code.to_code;
      if (t == 0 && half == 0) scales[row0 + r] = code.step;
    }
  }
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const i64 row = row0 + 16 * tile + g + k / 2 * 8;
      close_entry(type, ssm, row * N + half * (N / 2) + 8 * j + 2 * t + k % 2, s[j][k], to_code[k / 2]);
    }
}

template <int N>
DEV void ssd(const Scan& p, SsdShared<N>& m) {
  constexpr int XS = SsdShared<N>::XS, NS = SsdShared<N>::NS, TILES = N / 16, STEPS = N / 16;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int tile = warp % 4, half = warp / 4;  // 16 tokens and 32 channels; 16 channels and N / 2 entries of the state
  const int r8 = lane % 8, i4 = lane / 8;      // row and matrix that this lane names when matrices are loaded
  const int b = (int)(blockIdx.x / p.heads), head = (int)(blockIdx.x % p.heads), group = head / (int)(p.heads / p.groups);
  const i64 type = p.state_type, ssm = state_array(p.state, 0), first = (i64)head * HEAD;
  const i64 slot = slot_of(p.state, b), row0 = (p.state.layer * state_array(p.state, 4) + slot) * p.inner + first;
  const Span when = span_of((int)position(p.state, slot), p.length);
  const Kept kept = kept_of(p.state, type, slot, p.inner, p.groups * N, p.heads);
  const float* scales = (const float*)state_array(p.state, 1);
  const float a = ((const float*)p.a)[head], bias = ((const float*)p.dt_bias)[head];
  const float d_head = p.d_per_channel ? 0.0f : ((const float*)p.d)[head];

  float s[TILES][4];  // entry k of tile j: channel 16 tile + g + 8 (k / 2), n = half N / 2 + 8 j + 2 t + k % 2
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const i64 row = row0 + 16 * tile + g + k / 2 * 8;
      s[j][k] = open_entry(type, ssm, row * N + half * (N / 2) + 8 * j + 2 * t + k % 2, type == STATE_INT8 ? scales[row] : 0.0f);
    }

  // The state's chunks: kept tokens (t0 < 0), those up to the last writing, and the rest.
  const auto tokens_of = [&](i64 t0) {
    return t0 < 0 ? when.before : (int)least(CHUNK, (t0 < when.stored ? when.stored : p.length) - t0);
  };
  const u16* xbc = (const u16*)p.xbc;
  float raw[2] = {0, 0};  // dt of tokens 2 lane and 2 lane + 1 before softplus, in warp 0
  constexpr int X_ROWS = THREADS / (HEAD / 8), N_ROWS = THREADS / (N / 8);  // rows that the block fetches at once
  const int x_row = threadIdx.x / (HEAD / 8), x_col = threadIdx.x % (HEAD / 8) * 8;
  const int n_row = threadIdx.x / (N / 8), n_col = threadIdx.x % (N / 8) * 8, stride = (int)p.xbc_stride;
  const auto fetch_chunk = [&](i64 t0, int to) {
    const int tokens = tokens_of(t0);
    const i64 token0 = (i64)b * p.length + t0;
    u16 *x = m.x[to] + x_row * XS + x_col, *b_to = m.b[to] + n_row * NS + n_col, *c_to = m.c[to] + n_row * NS + n_col;
    const u16* from_x = xbc + (token0 + x_row) * stride + first + x_col;
    const u16* from_b = xbc + (token0 + n_row) * stride + p.inner + group * N + n_col;
    const i64 to_c = p.groups * N;
    if (tokens == CHUNK && t0 >= 0) {
#pragma unroll
      for (int k = 0; k < CHUNK / X_ROWS; ++k) copy_async(x + k * X_ROWS * XS, from_x + k * X_ROWS * stride);
#pragma unroll
      for (int k = 0; k < CHUNK / N_ROWS; ++k) {
        copy_async(b_to + k * N_ROWS * NS, from_b + k * N_ROWS * stride);
        copy_async(c_to + k * N_ROWS * NS, from_b + k * N_ROWS * stride + to_c);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < CHUNK / X_ROWS; ++k) {
        const int at = k * X_ROWS + x_row;
        uint4* own = (uint4*)(x + k * X_ROWS * XS);
        if (at >= tokens) *own = uint4{0, 0, 0, 0};
        else if (t0 < 0) *own = kept_octet(kept, kept.u, at * p.inner + first + x_col);
        else copy_async(own, from_x + k * X_ROWS * stride);
      }
#pragma unroll 1
      for (int k = 0; k < CHUNK / N_ROWS; ++k) {
        const int at = k * N_ROWS + n_row;
        uint4 *own_b = (uint4*)(b_to + k * N_ROWS * NS), *own_c = (uint4*)(c_to + k * N_ROWS * NS);
        if (at >= tokens || t0 < 0) {
          *own_b = at < tokens ? kept_octet(kept, kept.b, (at * p.groups + group) * N + n_col) : uint4{0, 0, 0, 0};
          *own_c = uint4{0, 0, 0, 0};
        } else {
          copy_async(own_b, from_b + k * N_ROWS * stride);
          copy_async(own_c, from_b + k * N_ROWS * stride + to_c);
        }
      }
    }
    if (warp == 0)
      for (int k = 0; k < 2; ++k) {
        const int at = 2 * lane + k;
        if (t0 < 0) raw[k] = kept.l[(at < tokens ? at : tokens - 1) * p.heads + head];
        else raw[k] = at < tokens ? ((const float*)p.dt)[(token0 + at) * p.dt_stride + head] : 0.0f;
      }
  };

  int now = 0;
  i64 t0 = when.before ? -when.before : 0;
  fetch_chunk(t0, now);
  commit_copies();
#pragma unroll 1
  for (; t0 < p.length; now ^= 1) {
    const bool replay = t0 < 0, keeps = !replay && t0 >= when.stored;
    const int tokens = tokens_of(t0);
    const i64 token0 = (i64)b * p.length + t0, after = replay ? 0 : t0 + tokens;
    if (keeps && when.stored && t0 == when.stored) ssd_store<N>(p, m, s, row0);
    __syncthreads();  // the chunk before is done
    if (warp == 0) {
      float dt[2], v[2];
      for (int k = 0; k < 2; ++k) {
        const bool there = 2 * lane + k < tokens;
        dt[k] = !there ? 0.0f : replay ? 1.0f : softplus(raw[k] + bias, param_float(p.dt_low), param_float(p.dt_high));
        v[k] = dt[k] * a;
      }
      float total = v[0] + v[1];
      for (int by = 1; by < WARP; by *= 2) {
        const float before = shuffle_up(total, by);
        if (lane >= by) total += before;
      }
      float sum[2] = {total - v[1], total};
      if (replay) sum[0] = raw[0], sum[1] = raw[1];
      const float end = shuffle(sum[1], WARP - 1), last = shuffle(sum[1], lane | 7);
      for (int k = 0; k < 2; ++k) {
        m.dt[2 * lane + k] = dt[k];
        m.sum[2 * lane + k] = sum[k];
        m.within[2 * lane + k] = dt[k] * fast_exp(last - sum[k]);
        m.weight[2 * lane + k] = float_to_half_bits(dt[k] * fast_exp(end - sum[k]));
      }
    }
    if (after < p.length) fetch_chunk(after, now ^ 1);
    commit_copies();
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        *(u32*)(m.state + (16 * tile + g + 8 * k) * NS + half * (N / 2) + 8 * j + 2 * t) = pack_halves(s[j][2 * k], s[j][2 * k + 1]);
    wait_copies<1>();
    __syncthreads();
    const u16 *mx = m.x[now], *mb = m.b[now], *mc = m.c[now];
    const float end = m.sum[CHUNK - 1];

    // C_t . B_s for this warp's 16 tokens and all s up to them, and C_t S^T for its 32 channels
    float gram[8][4] = {}, from_state[4][4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      u32 c[4], w[4];
      load_matrices(c, mc + (16 * tile + r8 + i4 % 2 * 8) * NS + 16 * k + i4 / 2 * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j > tile) break;
        load_matrices(w, mb + (16 * j + r8 + i4 / 2 * 8) * NS + 16 * k + i4 % 2 * 8);
        mma_f16(gram[2 * j], c[0], c[1], c[2], c[3], w[0], w[1]);
        mma_f16(gram[2 * j + 1], c[0], c[1], c[2], c[3], w[2], w[3]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_matrices(w, m.state + (32 * half + 16 * j + r8 + i4 / 2 * 8) * NS + 16 * k + i4 % 2 * 8);
        mma_f16(from_state[2 * j], c[0], c[1], c[2], c[3], w[0], w[1]);
        mma_f16(from_state[2 * j + 1], c[0], c[1], c[2], c[3], w[2], w[3]);
      }
    }
    const int u0 = 16 * tile + g, u1 = u0 + 8;
    const float sum0 = m.sum[u0], sum1 = m.sum[u1], decay0 = fast_exp(sum0), decay1 = fast_exp(sum1);
    float y[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) y[j][k] = from_state[j][k] * (k < 2 ? decay0 : decay1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > tile) break;
      if (j < tile) {  // exp(c_to - c_from) by way of the last token of those around `from`
        const float last = m.sum[16 * j + 15], by0 = fast_exp(sum0 - last), by1 = fast_exp(sum1 - last);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 w = *(const float2*)(m.within + 16 * j + 8 * i + 2 * t);
#pragma unroll
          for (int k = 0; k < 4; ++k) gram[2 * j + i][k] *= (k % 2 ? w.y : w.x) * (k < 2 ? by0 : by1);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int from = 16 * j + 8 * i + 2 * t + k % 2, to = k < 2 ? u0 : u1;
            const float w = m.dt[from] * fast_exp((k < 2 ? sum0 : sum1) - m.sum[from]);
            gram[2 * j + i][k] = from <= to ? gram[2 * j + i][k] * w : 0.0f;
          }
      }
      const u32 w0 = pack_halves(gram[2 * j][0], gram[2 * j][1]), w1 = pack_halves(gram[2 * j][2], gram[2 * j][3]);
      const u32 w2 = pack_halves(gram[2 * j + 1][0], gram[2 * j + 1][1]);
      const u32 w3 = pack_halves(gram[2 * j + 1][2], gram[2 * j + 1][3]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32 x[4];
        load_transposed(x, mx + (16 * j + r8 + i4 % 2 * 8) * XS + 32 * half + 16 * i + i4 / 2 * 8);
        mma_f16(y[2 * i], w0, w1, w2, w3, x[0], x[1]);
        mma_f16(y[2 * i + 1], w0, w1, w2, w3, x[2], x[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int at = k ? u1 : u0, c = 32 * half + 8 * j + 2 * t;
        if (at >= tokens || replay) continue;
        const float d0 = p.d_per_channel ? ((const float*)p.d)[first + c] : d_head;
        const float d1 = p.d_per_channel ? ((const float*)p.d)[first + c + 1] : d_head;
        const u32 x2 = *(const u32*)(mx + at * XS + c);
        *(u32*)((u16*)p.y + (token0 + at) * p.y_stride + first + c) =
            pack_halves(fmaf(d0, low_half(x2), y[j][2 * k]), fmaf(d1, high_half(x2), y[j][2 * k + 1]));
      }

    if (keeps) {  // at most KEPT - 1 tokens; slimba_push keeps the rest of them
      for (int i = threadIdx.x; i < tokens * HEAD; i += THREADS)
        keep_value(kept, kept.u, (when.at + i / HEAD) * p.inner + first + i % HEAD,
                   m.dt[i / HEAD] * half_bits_to_float(mx[i / HEAD * XS + i % HEAD]));
      break;
    }
    const float whole = fast_exp(end);
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) s[j][k] *= whole;
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) {
      u32 x[4], w[4];
      load_transposed(x, mx + (16 * k + r8 + i4 / 2 * 8) * XS + 16 * tile + i4 % 2 * 8);
      const u32 w0 = ((const u32*)m.weight)[8 * k + t], w1 = ((const u32*)m.weight)[8 * k + 4 + t];
      x[0] = mul_halves(x[0], w0), x[1] = mul_halves(x[1], w0), x[2] = mul_halves(x[2], w1), x[3] = mul_halves(x[3], w1);
#pragma unroll
      for (int j = 0; j < TILES / 2; ++j) {
        load_transposed(w, mb + (16 * k + r8 + i4 % 2 * 8) * NS + half * (N / 2) + 16 * j + i4 / 2 * 8);
        mma_f16(s[2 * j], x[0], x[1], x[2], x[3], w[0], w[1]);
        mma_f16(s[2 * j + 1], x[0], x[1], x[2], x[3], w[2], w[3]);
      }
    }
    t0 = after;
  }
  if (when.stored && when.stored == p.length) ssd_store<N>(p, m, s, row0);
}

KERNEL(slimba_ssd_64, Scan, THREADS, 2) {
  SHARED(smem);
  ssd<64>(p, *(SsdShared<64>*)smem);
}
KERNEL(slimba_ssd_128, Scan, THREADS, 2) {
  SHARED(smem);
  ssd<128>(p, *(SsdShared<128>*)smem);
}
