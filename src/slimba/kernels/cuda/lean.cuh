// A product of signs and int8 rows with one vector, for the shapes that models have (cuda_bake.py says which): y = W x with
// as few instructions between the kernel before and the result as we could find.
//
// Fixed point, slices and the order of columns are those of matrix.cuh. A warp owns 256 columns, which it norms and cuts
// into slices for itself; its lanes hold them as the right operand of the tensor core and multiply all tiles of the block by them, so
// that the block waits for itself three times: for the norm, for the sums of the warps, and before a second plane. Everything that the input does not decide is loaded before `ready`.
#define SLICE 320  // bytes of 256 columns of a slice: 64 mod 128, so that two slices lie in different banks

template <int CG, int TW, int RW, int PG, int LR>
struct LeanShared {
  u8 lr[CG][LR ? 8 * WARP : 1][16];  // right low-rank factor, as its lanes read it
  u8 q[CG][3][SLICE], q2[PG ? PG : 1][3][SLICE];
  int tile[TW][CG][TILE][4], plane[PG ? TW : 1][PG ? PG : 1][TILE][4];  // partial sums; 3 of 4 slices
  int row8[RW ? RW : 1][CG][4], factor[CG][TILE][4], total[CG][4], total2[PG ? PG : 1][4];
  float of_rank[CG][TILE], squares[CG], top[CG];
};

// Words of bits of 8 bytes a row at lane t, rows g and g + 8.
struct LeanBits {
  uint2 row[2];
};
DEV LeanBits lean_bits(const u8* data, int stride, int row0, int first, int rows, int column_byte) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  LeanBits out;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + g + 8 * h;
    out.row[h] = row >= first && row < rows ? load_pair(data + (i64)row * stride + column_byte + 8 * t) : uint2{0, 0};
  }
  return out;
}
// Sums of a tile over 256 columns to out[TILE][4]. x: pieces of the lane's slice.
DEV void lean_tile(const LeanBits& w, const uint4 (&x)[4], int (*out)[4]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  int acc[2][4] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const u32 m = 0x01010101u;
    mma_u8s8(acc[j & 1], w.row[0].x >> j & m, w.row[1].x >> j & m, w.row[0].y >> j & m, w.row[1].y >> j & m,
             word(x[j / 4], j % 4), word(x[2 + j / 4], j % 4));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int* row = out[g + 8 * h] + 2 * t;
    if (t < 2) *(int2*)row = int2{acc[0][2 * h] + acc[1][2 * h], acc[0][2 * h + 1] + acc[1][2 * h + 1]};
  }
}

// Adds the partial sums of one slice of one row over `count` groups of columns, `step` numbers apart.
template <int COUNT>
DEV int lean_sum(const int* at, int step) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum += at[i * step];
  return sum;
}

// TW tiles and RW int8 rows a warp; PG groups of 256 columns of a second plane, or 0; LR: 16 ranks of a correction, or 0.
template <int CG, int TW, int RW, int PG, int LR, typename Ready>
DEV void lean(const Product& p, u8* smem, Ready ready) {
  typedef LeanShared<CG, TW, RW, PG, LR> Shared;
  constexpr int PH = PG ? CG / PG : 1, PW = (TW + PH - 1) / PH;  // warps that share columns of the plane, its tiles of a warp
  Shared& v = *(Shared*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, cg = threadIdx.x / WARP;
  const int block = blockIdx.x, blocks = gridDim.x, plane_rows = (int)(m.plane_stop - m.plane_start);
  const float *weight = (const float*)p.in.weight, *col_scale = (const float*)m.col_scale;

  LeanBits bits[TW], bits2[PW];
#pragma unroll
  for (int i = 0; i < TW; ++i) {
    const LeanRows r = lean_rows<SIGN>(m, block + i * blocks);
    bits[i] = lean_bits(r.data, r.stride, r.local, 0, r.there ? r.rows : 0, cg * 32);
  }
  const int pg = PG ? cg % PG : 0, ph = PG ? cg / PG : 0;
#pragma unroll
  for (int i = 0; i < PW && PG; ++i) {
    const int tile = ph + i * PH;
    const LeanRows r = lean_rows<SIGN>(m, block + tile * blocks);
    const bool there = r.there && tile < TW && ph < PH;
    bits2[i] = lean_bits((const u8*)m.plane_data, (int)m.plane_stride, r.first + r.local - (int)m.plane_start, 0, there ? plane_rows : 0, pg * 32);
  }
  uint2 codes[RW ? RW : 1];
#pragma unroll
  for (int i = 0; i < RW; ++i) {
    const LeanRows r = lean_rows<INT8>(m, block + i * blocks);
    codes[i] = r.there ? load_pair(r.data + (i64)r.local * r.stride + cg * 256 + lane * 8) : uint2{0, 0};
  }
  if (LR) {  // rows g and g + 8 of words 2 t and 2 t + 1
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + 8 * (i & 1), at = cg * 256 + 64 * (lane % 4) + (i >> 1 & 1) * 32 + (i >> 2) * 16;
      copy_async(v.lr[cg][i * WARP + lane], (const u8*)m.lr_b + (i64)row * m.kpad + at);
    }
  }
  commit_copies();
  const int column = cg * 256 + lane / 4 * 32 + lane % 4 * 2;  // and the next, and both 8, 16, 24 further
  float2 w[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    w[b] = weight ? *(const float2*)(weight + column + 8 * b) : float2{1, 1};
    if (col_scale) w[b].x *= col_scale[column + 8 * b], w[b].y *= col_scale[column + 8 * b + 1];
  }
  i32 place[4][2];  // of the lane's columns in the second plane's slices
#pragma unroll
  for (int i = 0; i < 4 && PG; ++i)
    for (int k = 0; k < 2; ++k) {
      const int c = ((const i32*)p.plane_inverse)[column + 8 * (i) + k], of = c % 256;
      const int at = ((of / 32 % 2 * 2 + of % 8 / 4) * 4 + of / 64) * 16 + of % 4 * 4 + of / 8 % 4;
      place[i][k] = c < 0 ? -1 : c / 256 * 3 * SLICE + at;
    }
  for (int i = threadIdx.x; i < PG * 3 * SLICE / 4; i += CG * WARP) ((u32*)v.q2)[i] = 0;
  // what finishing a row takes: thread 4 r + s has slice s of row r of the block's tiles, then of its int8 rows
  const int entry = threadIdx.x, slice = lane % 4;
  const bool of_tile = entry < TW * TILE * 4;
  const int unit = of_tile ? entry / 4 / TILE : entry / 4 - TW * TILE;
  LeanRows r = of_tile ? lean_rows<SIGN>(m, block + unit * blocks) : lean_rows<INT8>(m, unit < RW ? block + unit * blocks : -1);
  if (of_tile) r.local += entry / 4 % TILE;
  r.there = r.there && r.local < r.rows;
  const int row = r.first + r.local, lr_row = row - (int)m.lr_start, plane_row = row - (int)m.plane_start;
  const bool finishes = r.there && slice == 0, low = LR && finishes && lr_row >= 0 && row < (int)m.lr_stop;
  const bool second = PG && r.there && of_tile && plane_row >= 0 && plane_row < plane_rows;
  const float scale = finishes ? half_bits_to_float(r.scale[r.local]) : 0.0f, bias = finishes && m.bias ? ((const float*)m.bias)[row] : 0.0f;
  const float lr_scale = low ? half_bits_to_float(((const u16*)m.lr_a_scale)[lr_row]) : 0.0f;
  const float scale2 = second ? half_bits_to_float(((const u16*)m.plane_scale)[plane_row]) : 0.0f;
  const uint4 left = low ? load_weights((const u8*)m.lr_a + (i64)lr_row * 16) : uint4{0, 0, 0, 0};
  const float rank_scale = LR ? half_bits_to_float(((const u16*)m.lr_b_scale)[lane / 2]) : 0.0f;
  const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, 0) : 0;
  ready();

  const float* x = (const float*)p.in.x + column;
  float e[4][2], squares = 0;
  u32 top = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const float2 two = load_fresh_pair(x + 8 * b);
    e[b][0] = two.x, e[b][1] = two.y;
  }
  const float residual = finishes && p.out.mode == ADD ? load_fresh((const float*)p.out.y + row) : 0.0f;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    squares = fmaf(e[b][0], e[b][0], fmaf(e[b][1], e[b][1], squares));
    e[b][0] *= w[b].x, e[b][1] *= w[b].y;
    const u32 one = float_to_bits(e[b][0]) & 0x7fffffffu, two = float_to_bits(e[b][1]) & 0x7fffffffu, most = one > two ? one : two;
    top = most > top ? most : top;
  }
  top = warp_max_bits(top);
  if (p.in.groups) squares = warp_sum(squares);
  if (lane == 0) v.squares[cg] = squares, v.top[cg] = bits_to_float(top);
  __syncthreads();
  squares = 0;
  top = 0;
#pragma unroll
  for (int i = 0; i < CG; ++i) {
    squares += v.squares[i];
    const u32 other = float_to_bits(v.top[i]);
    top = other > top ? other : top;
  }
  const float most = bits_to_float(top), norm = p.in.groups ? fast_rsqrt(squares / (float)m.cols + param_float(p.in.eps)) : 1.0f;
  const bool damaged = top >= INF_BITS, zero = most < 1e-30f;
  const float to_fixed = damaged || zero ? 0.0f : LIMIT * fast_reciprocal(most);
  const float unit_value = damaged ? bits_to_float(0x7fc00000u) : zero ? 0.0f : norm * fast_reciprocal(to_fixed);

  u32 d[2][3];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    int fixed[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) fixed[b] = damaged ? 0 : __float2int_rn(e[b][k] * to_fixed);
    slice_words(fixed, d[k]);
  }
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int at = ((lane / 4 % 2 * 2 + lane % 4 / 2) * 4 + lane / 8) * 16 + lane % 2 * 8;
    *(uint2*)(v.q[cg][s] + at) = uint2{d[0][s], d[1][s]};
  }
#pragma unroll
  for (int i = 0; i < 4 && PG; ++i)  // the chosen columns once more, side by side
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int s = 0; s < 3; ++s)
        if (place[i][k] >= 0) v.q2[0][s][place[i][k]] = (u8)(d[k][s] >> 8 * (i));
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int sum = warp_sum(dot4(d[0][s], 0x01010101u, dot4(d[1][s], 0x01010101u, 0)));
    if (lane == 0) v.total[cg][s] = sum;
  }
#pragma unroll
  for (int i = 0; i < RW; ++i)
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const int sum = warp_sum(dot4(codes[i].x, d[0][s], dot4(codes[i].y, d[1][s], 0)));
      if (lane == 0) v.row8[i][cg][s] = sum;
    }
  wait_copies<0>();
  sync_warp();
  const int g = lane / 4, t = lane % 4;
  uint4 xs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) xs[i] = *(const uint4*)(v.q[cg][g < 3 ? g : 2] + (i * 4 + t) * 16);
#pragma unroll
  for (int i = 0; i < TW; ++i) lean_tile(bits[i], xs, v.tile[i][cg]);
  if (LR) {
    int acc[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 *lr = (const uint4*)v.lr[cg][4 * half * WARP] + lane;
      const uint4 a0 = lr[0], a1 = lr[WARP], a2 = lr[2 * WARP], a3 = lr[3 * WARP];
      const uint4 b0 = xs[half], b1 = xs[2 + half];
#pragma unroll
      for (int k = 0; k < 4; ++k) mma_s8s8(acc, word(a0, k), word(a1, k), word(a2, k), word(a3, k), word(b0, k), word(b1, k));
    }
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (t < 2) *(int2*)(v.factor[cg][g + 8 * k] + 2 * t) = int2{acc[2 * k], acc[2 * k + 1]};
  }
  __syncthreads();
  if (PG) {
#pragma unroll
    for (int i = 0; i < 4; ++i) xs[i] = *(const uint4*)(v.q2[pg][g < 3 ? g : 2] + (i * 4 + t) * 16);
    if (ph == 0) {
      int sum = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) sum = dot4(word(xs[i / 4], i % 4), 0x01010101u, sum);
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (t == 0 && g < 3) v.total2[pg][g] = sum;
    }
#pragma unroll
    for (int i = 0; i < PW; ++i)
      if (ph + i * PH < TW && ph < PH) lean_tile(bits2[i], xs, v.plane[ph + i * PH][pg]);
    __syncthreads();
  }

  if (cg * WARP >= TW * TILE * 4 + RW * 4) return;
  float y = 0;
  if (LR && cg * WARP < TW * TILE * 4) {  // B x, two lanes a rank
    int sum[3] = {0, 0, 0};
#pragma unroll
    for (int i = lane % 2; i < CG; i += 2) {
      const uint4 four = *(const uint4*)v.factor[i][lane / 2];
      sum[0] += (int)four.x, sum[1] += (int)four.y, sum[2] += (int)four.z;
    }
#pragma unroll
    for (int s = 0; s < 3; ++s) sum[s] += shuffle_xor(sum[s], 1);
    if (lane % 2 == 0) v.of_rank[cg][lane / 2] = rank_scale * combine((float)sum[0], (float)sum[1], (float)sum[2]);
    sync_warp();
#pragma unroll
    for (int k = 0; k < 16; ++k) y = fmaf((float)(i8)(word(left, k / 4) >> (k % 4 * 8)), v.of_rank[cg][k], y);
    y *= lr_scale;
  }
  auto finish = [&](float mine, float by) {  // the row of four lanes that have a slice each
    const float one = shuffle(mine, lane & ~3 | 1), two = shuffle(mine, lane & ~3 | 2);
    y = fmaf(by, combine(mine, one, two), y);
  };
  const int at = entry / 4 % TILE;
  if (of_tile) {
    const int sum = lean_sum<CG>(&v.tile[unit][0][at][slice], TILE * 4), all = lean_sum<CG>(&v.total[0][slice], 4);
    finish((float)(2 * sum - all), scale);
    if (PG) {
      const int sum2 = lean_sum<PG>(&v.plane[unit][0][at][slice], TILE * 4), all2 = lean_sum<PG>(&v.total2[0][slice], 4);
      finish((float)(2 * sum2 - all2), scale2);
    }
  } else {
    finish((float)(unit < RW ? lean_sum<CG>(&v.row8[unit][0][slice], 4) : 0), scale);
  }
  if (!finishes) return;
  y = fmaf(y, unit_value, bias);
  if (p.out.mode == ADD) ((float*)p.out.y)[row] = residual + y;
  else put_output(p.out, ring, row, 0, y);
}
