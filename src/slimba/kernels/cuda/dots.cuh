// A product of signs and int8 rows with up to eight vectors, as dot.cuh does it with one: the vectors are the columns of the
// tensor core's right operand, in float16 times a power of two for every vector and warp.
//
// Lane t of four owns X words of 32 columns; columns c and c + 16 of a word are a pair of halves, in the signs (sign_pair) and in
// the codes (int8_pair) as in mid.cu. The chosen columns of the second plane are among the warp's own.
#define DOTS_BATCH 8

template <int CW, int X, int TW, int RW, int P, int LR>
struct DotsShared {
  u32 weight[CW][X][4][16];                    // of the lanes' pairs, float16
  u16 x[P ? CW : 1][DOTS_BATCH][128 * X + 8];  // the warp's columns, float16
  float part[CW][TW * TILE][DOTS_BATCH], part2[P ? CW : 1][P ? TW * TILE : 1][DOTS_BATCH];
  float rank[LR ? CW : 1][TILE][DOTS_BATCH], of_rank[LR ? TILE : 1][DOTS_BATCH];
  float row8[CW][RW ? RW : 1][DOTS_BATCH], squares[CW][DOTS_BATCH];
};

// A word of 32 columns times the lane's pairs x: `left` gives the left operand of pairs 2 jj and 2 jj + 1.
template <int COUNT, typename Left>
DEV void dots_word(const u32* x, float (&acc)[4], Left left) {
#pragma unroll
  for (int jj = 0; jj < COUNT; ++jj) {
    u32 a[4];
    left(jj, a);
    mma_f16(acc, a[0], a[1], a[2], a[3], x[2 * jj], x[2 * jj + 1]);
  }
}
DEV void dots_signs(u32 w0, u32 w1, int jj, u32 (&a)[4]) {
  a[0] = sign_pair(w0, 15 - 2 * jj), a[1] = sign_pair(w1, 15 - 2 * jj);
  a[2] = sign_pair(w0, 14 - 2 * jj), a[3] = sign_pair(w1, 14 - 2 * jj);
}
DEV void dots_codes(const uint4 (&q)[2], int jj, u32& first, u32& second) {
  const int j = 2 * jj % 8;
  first = int8_pair(word(q[j / 4], j % 4), jj), second = int8_pair(word(q[j / 4], j % 4 + 1), jj);
}

// Parameters as of `dot`.
template <int CW, int X, int TW, int RW, int P, int PM, int LR, typename Ready>
DEV void dots(const Product& p, u8* smem, Ready ready) {
  typedef DotsShared<CW, X, TW, RW, P, LR> Shared;
  constexpr int COLUMNS = 128 * X;
  constexpr int XP = P > 4 ? P / 4 : 1, SPAN = P > 4 ? 4 : P ? P : 1, PAIRS = 4 * SPAN;  // of a lane's word of the plane
  Shared& v = *(Shared*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int first = blockIdx.y * DOTS_BATCH, batch = (int)least(DOTS_BATCH, p.batch - first);
  const int block = blockIdx.x, blocks = gridDim.x, plane_rows = (int)(m.plane_stop - m.plane_start);
  const float *weight = (const float*)p.in.weight, *col_scale = (const float*)m.col_scale;
  const bool weighted = weight || col_scale;
  auto weight_of = [&](int c) { return (weight ? weight[c] : 1.0f) * (col_scale ? col_scale[c] : 1.0f); };

  u32 bits[TW][2][X], bits2[TW][2][XP];
  bool planes[TW], last_there = true;
#pragma unroll
  for (int i = 0; i < TW; ++i) {
    const LeanRows r = lean_rows<SIGN>(m, block + i * blocks);
    last_there = r.there;
    const int in_plane = r.first + r.local - (int)m.plane_start;
    planes[i] = (PM >> i & 1) && r.there && in_plane + TILE > 0 && in_plane < plane_rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = r.local + g + 8 * h, at = in_plane + g + 8 * h;
      const bool there = r.there && row < r.rows;
      load_words<X>(there, (const u32*)(r.data + (i64)row * r.stride + warp * (COLUMNS / 8)) + t * X, bits[i][h]);
      if (!(PM >> i & 1)) continue;
      const u32* plane = (const u32*)((const u8*)m.plane_data + (i64)at * m.plane_stride) + warp * P + t % SPAN * XP;
      load_words<XP>(planes[i] && there && at >= 0 && at < plane_rows, plane, bits2[i][h]);
      if (SPAN < 4) bits2[i][h][0] >>= t / SPAN * PAIRS;
    }
  }
  uint4 codes[RW ? RW : 1][X][2], right[2][X][2];  // int8 rows, in lanes g = 0; right low-rank factor
#pragma unroll
  for (int i = 0; i < RW; ++i) {
    const LeanRows r = lean_rows<INT8>(m, block + i * blocks);
#pragma unroll
    for (int k = 0; k < 2 * X; ++k) {
      const u8* from = r.data + (i64)r.local * r.stride + warp * COLUMNS + (t * X + k / 2) * 32 + k % 2 * 16;
      codes[i][k / 2][k % 2] = r.there && g == 0 ? load_weights(from) : uint4{0, 0, 0, 0};
    }
  }
#pragma unroll
  for (int i = 0; i < (LR ? 4 * X : 0); ++i)
    right[i & 1][i / 4][i >> 1 & 1] =
        load_weights((const u8*)m.lr_b + (i64)(g + 8 * (i & 1)) * m.kpad + warp * COLUMNS + 32 * (t * X + i / 4) + 16 * (i >> 1 & 1));
  for (int i = lane; i < (weighted ? 64 * X : 0); i += WARP) {  // word i / 16, pair i % 16
    const int c = warp * COLUMNS + i / 16 * 32 + i % 16;
    (&v.weight[warp][0][0][0])[i] = pack_halves(weight_of(c), weight_of(c + 16));
  }
  u32 chosen[XP][PAIRS];  // places of the lane's pairs of the plane among the warp's columns; those of no column: behind them
#pragma unroll
  for (int x = 0; x < XP; ++x)
#pragma unroll
    for (int i = 0; i < (P ? PAIRS : 0); ++i) {
      const i32* at = (const i32*)m.plane_index + (warp * P + t % SPAN * XP + x) * 32 + (SPAN < 4 ? t / SPAN * PAIRS : 0) + i;
      const int low = at[0], high = at[16], base = warp * COLUMNS;
      chosen[x][i] = (u32)(low < 0 ? COLUMNS : low - base) | (u32)(high < 0 ? COLUMNS : high - base) << 16;
    }
  if (P && t == 0) v.x[P ? warp : 0][g][COLUMNS] = 0;
  i64 ring = 0;
  if (p.out.mode == IN_PROJ && (int)threadIdx.x % DOTS_BATCH < batch) {
    const i64 slot = slot_of(p.state, first + threadIdx.x % DOTS_BATCH);
    ring = (i64)ring_row(p.state, slot, position(p.state, slot));
  }
  sync_warp();
  ready();

  const float* input = (const float*)p.in.x + (first + (g < batch ? g : batch - 1)) * (int)p.in.x_stride + warp * COLUMNS + t * X * 32;
  float4 e[X][8];
#pragma unroll
  for (int i = 0; i < 8 * X; ++i) e[i / 8][i % 8] = load_fresh_quad(input + 4 * i);
  float squares = 0, top = 0;
#pragma unroll
  for (int i = 0; i < 8 * X; ++i) {
    const float4 f = e[i / 8][i % 8];
    squares = fmaf(f.x, f.x, fmaf(f.y, f.y, fmaf(f.z, f.z, fmaf(f.w, f.w, squares))));
    top = fmaxf(fmaxf(fmaxf(fabsf(f.x), fabsf(f.y)), fmaxf(fabsf(f.z), fabsf(f.w))), top);
  }
#pragma unroll
  for (int by = 1; by < 4; by *= 2) squares += shuffle_xor(squares, by), top = fmaxf(top, shuffle_xor(top, by));
  u32 exponent = float_to_bits(top) >> 23;
  exponent = exponent < 40 ? 40 : exponent > 254 ? 254 : exponent;
  const float to_half = bits_to_float((258 - exponent) << 23);  // the largest becomes 2^4 to 2^5: room for weights
  const float one = squares - squares == 0 ? bits_to_float((exponent - 4) << 23) : bits_to_float(0x7fc00000u);
  u32 xs[X][16];
#pragma unroll
  for (int x = 0; x < X; ++x)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 low = e[x][i], high = e[x][i + 4];
      const uint4 w = weighted ? *(const uint4*)&v.weight[warp][0][t * X + x][4 * i] : uint4{0, 0, 0, 0};
      u32* to = xs[x] + 4 * i;
      to[0] = pack_halves(low.x * to_half, high.x * to_half), to[1] = pack_halves(low.y * to_half, high.y * to_half);
      to[2] = pack_halves(low.z * to_half, high.z * to_half), to[3] = pack_halves(low.w * to_half, high.w * to_half);
#pragma unroll
      for (int k = 0; k < 4 && weighted; ++k) to[k] = mul_halves(to[k], word(w, k));
#pragma unroll
      for (int k = 0; k < (P ? 4 : 0); ++k) {
        u16* own = v.x[P ? warp : 0][g] + (t * X + x) * 32 + 4 * i + k;
        own[0] = (u16)to[k], own[16] = (u16)(to[k] >> 16);
      }
    }
  if (t == 0) v.squares[warp][g] = squares;
  const float one0 = shuffle(one, 8 * t), one1 = shuffle(one, 8 * t + 4);  // of vectors 2 t and 2 t + 1
  auto put = [&](const float (&acc)[4], float (*out)[DOTS_BATCH]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) *(float2*)&out[g + 8 * h][2 * t] = float2{acc[2 * h] * one0, acc[2 * h + 1] * one1};
  };
#pragma unroll
  for (int i = 0; i < TW; ++i) {
    if (i == TW - 1 && !last_there) break;
    float acc[4] = {};
#pragma unroll
    for (int x = 0; x < X; ++x)
      dots_word<8>(xs[x], acc, [&](int jj, u32 (&a)[4]) { dots_signs(bits[i][0][x], bits[i][1][x], jj, a); });
    put(acc, v.part[warp] + i * TILE);
  }
#pragma unroll
  for (int i = 0; i < RW; ++i) {
    float acc[4] = {};
#pragma unroll
    for (int x = 0; x < X; ++x)
      dots_word<8>(xs[x], acc, [&](int jj, u32 (&a)[4]) {
        a[1] = a[3] = 0;
        dots_codes(codes[i][x], jj, a[0], a[2]);
      });
    if (g == 0) *(float2*)&v.row8[warp][i][2 * t] = float2{acc[0] * one0, acc[1] * one1};
  }
  if (LR) {
    float acc[4] = {};
#pragma unroll
    for (int x = 0; x < X; ++x)
      dots_word<8>(xs[x], acc, [&](int jj, u32 (&a)[4]) {
        dots_codes(right[0][x], jj, a[0], a[2]);
        dots_codes(right[1][x], jj, a[1], a[3]);
      });
    put(acc, v.rank[LR ? warp : 0]);
  }
  if (P) {
    sync_warp();
    const u16* own = v.x[P ? warp : 0][g];
    u32 ys[XP][PAIRS];
#pragma unroll
    for (int x = 0; x < XP; ++x)
#pragma unroll
      for (int i = 0; i < PAIRS; ++i)
        ys[x][i] = own[chosen[x][i] & 0xffff] | (u32)own[chosen[x][i] >> 16] << 16;
#pragma unroll
    for (int i = 0; i < TW; ++i) {
      if (!(PM >> i & 1) || !planes[i]) continue;
      float acc[4] = {};
#pragma unroll
      for (int x = 0; x < XP; ++x)
        dots_word<2 * SPAN>(ys[x], acc, [&](int jj, u32 (&a)[4]) { dots_signs(bits2[i][0][x], bits2[i][1][x], jj, a); });
      put(acc, v.part2[P ? warp : 0] + (P ? i * TILE : 0));
    }
  }
  __syncthreads();

  const int b = threadIdx.x % DOTS_BATCH;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < CW; ++w) sum += v.squares[w][b];
  const float norm = p.in.groups ? fast_rsqrt(sum / (float)m.cols + param_float(p.in.eps)) : 1.0f;
  if (LR) {
    if (threadIdx.x < TILE * DOTS_BATCH) {
      const int k = threadIdx.x / DOTS_BATCH;
      float y = 0;
#pragma unroll
      for (int w = 0; w < CW; ++w) y += v.rank[LR ? w : 0][k][b];
      v.of_rank[LR ? k : 0][b] = y * half_bits_to_float(((const u16*)m.lr_b_scale)[k]);
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int unit = threadIdx.x / DOTS_BATCH; unit < TW * TILE + RW; unit += CW * WARP / DOTS_BATCH) {
    const bool of_tile = unit < TW * TILE;
    LeanRows r = of_tile ? lean_rows<SIGN>(m, block + unit / TILE * blocks) : lean_rows<INT8>(m, block + (unit - TW * TILE) * blocks);
    if (of_tile) r.local += unit % TILE;
    if (!r.there || r.local >= r.rows || b >= batch) continue;
    const int row = r.first + r.local, lr_row = row - (int)m.lr_start, plane_row = row - (int)m.plane_start;
    float y = 0;
    if (of_tile) {
#pragma unroll
      for (int w = 0; w < CW; ++w) y += v.part[w][unit][b];
    } else if (RW) {
#pragma unroll
      for (int w = 0; w < CW; ++w) y += v.row8[w][RW ? unit - TW * TILE : 0][b];
    }
    y *= half_bits_to_float(r.scale[r.local]);
    if (P && of_tile && plane_row >= 0 && plane_row < plane_rows) {
      float second = 0;
#pragma unroll
      for (int w = 0; w < CW; ++w) second += v.part2[P ? w : 0][P ? unit : 0][b];
      y = fmaf(half_bits_to_float(((const u16*)m.plane_scale)[plane_row]), second, y);
    }
    if (LR && lr_row >= 0 && row < (int)m.lr_stop) {
      const uint4 left = load_weights((const u8*)m.lr_a + (i64)lr_row * 16);
      float corrected = 0;
#pragma unroll
      for (int k = 0; k < 16; ++k) corrected = fmaf((float)(i8)(word(left, k / 4) >> (k % 4 * 8)), v.of_rank[LR ? k : 0][b], corrected);
      y = fmaf(half_bits_to_float(((const u16*)m.lr_a_scale)[lr_row]), corrected, y);
    }
    put_output(p.out, ring, row, first + b, fmaf(y, norm, m.bias ? ((const float*)m.bias)[row] : 0.0f));
  }
}
