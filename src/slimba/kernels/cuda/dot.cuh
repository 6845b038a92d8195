// A product of signs and int8 rows with one vector, for the shapes that models have (cuda_lean.py says which): y = W x with
// as little as possible between the kernel before and the result. What the input does not decide is loaded before `ready`.
//
// A warp owns 128 X columns (X words for each of 4 lanes) of all rows of the block and waits for nobody until its sums are there:
// it puts its columns into fixed point with a scale of its own, which the sums are multiplied by. The norm's sum of
// squares is one of the sums, because its inverse multiplies results as well as inputs. One barrier, then two or four threads add a row up.
//
// Fixed point: column 32 W + 8 b + j of the block's input is X = x S 2^(7 - j), S a power of two, |X| < 2^30, in four signed bytes
// ("slices"), which are four columns of the tensor core's right operand. Signs masked with 0x01010101 << j are bytes
// of value 2^j or 0, the left operand, with no shift: 2^j X = 128 S x for every j. y = 2 sum of the chosen x - sum of all x.
template <int CW, int X, int TW, int RW, int P, int LR>
struct DotShared {
  float x[CW][160 * X + 4];  // a warp's columns, 32 at a time with a gap of 8: they are written four by four and read 8 apart
  u32 q[CW][4][32 * X + 2], q2[P ? CW : 1][4][8 * P + 2];  // slices; words of the plane's
  float2 part[CW][TW * TILE], part2[P ? CW : 1][P ? TW * TILE : 1], rank[LR ? CW : 1][TILE];
  float of_rank[CW][TILE];
  alignas(16) float sums[CW][8];  // of squares, of x, of the plane's x, of the int8 rows
};

// Four columns that share j: their slices to q[s], `stride` words apart.
DEV void dot_slices(const float (&e)[4], float to_fixed, u32* q, int stride) {
  u32 z[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) z[b] = ((u32)__float2int_rn(e[b] * to_fixed) + 0x00808080u) ^ 0x00808080u;
  const u32 lo01 = byte_perm(z[0], z[1], 0x5140u), lo23 = byte_perm(z[2], z[3], 0x5140u);
  const u32 hi01 = byte_perm(z[0], z[1], 0x7362u), hi23 = byte_perm(z[2], z[3], 0x7362u);
  q[0] = byte_perm(lo01, lo23, 0x5410u), q[stride] = byte_perm(lo01, lo23, 0x7632u);
  q[2 * stride] = byte_perm(hi01, hi23, 0x5410u), q[3 * stride] = byte_perm(hi01, hi23, 0x7632u);
}

// Adds rows g and g + 8 of a tile, lanes t < 2 with two slices each; unit: the value of one in the lower. Of signs both together are below
// 2^30, because a slice is at most 2^7 and what it meets 255 / 8 on average over the columns of a word; of CODES they are not.
template <bool CODES = false>
DEV void dot_put(const int (&acc)[4], float unit, float2* out) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (t < 2) {
      const int low = acc[2 * h], high = acc[2 * h + 1];
      ((float*)(out + g + 8 * h))[t] = unit * (CODES ? fmaf((float)high, 256.0f, (float)low) : (float)(low + high * 256));
    }
}

// Sums over the warp of up to eight numbers at once: lanes give away halves of what they have. v[i] is in lane 4 i, of up to four in 8 i.
template <int N>
DEV float dot_sums(const float (&v)[N]) {
  const int lane = threadIdx.x % WARP;
  float a[4] = {}, b[2];
  auto of = [&](int i) { return i < N ? v[i < N ? i : 0] : 0.0f; };
  auto fold = [&](float low, float high, int by) {
    const bool upper = lane & by;
    return (upper ? high : low) + shuffle_xor(upper ? low : high, by);
  };
  if (N > 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = fold(of(i), of(i + 4), 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = N > 4 ? fold(a[i], a[i + 2], 8) : fold(of(i), of(i + 2), 16);
  float sum = fold(b[0], b[1], N > 4 ? 4 : 8);
#pragma unroll
  for (int by = N > 4 ? 2 : 4; by; by /= 2) sum += shuffle_xor(sum, by);
  return sum;
}

// A block's tiles of signs, number block + i B of the matrix; `planes`: which of them have the second plane.
template <int X, int TW, int P, int PM, int B>
struct DotTiles {
  static constexpr int XP = P > 4 ? P / 4 : 1, SPAN = P > 4 ? 4 : P ? P : 1, BITS = 2 * SPAN;  // a lane's words of the plane, bits of one
  u32 bits[TW][2][X], bits2[TW][2][XP];  // rows g and g + 8
  bool planes[TW], last_there = true;

  DEV_MEMBER void load(const Matrix& m) {
    constexpr int COLUMNS = 128 * X;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int block = blockIdx.x, plane_rows = (int)(m.plane_stop - m.plane_start);
    ASSUME(block < B);
    // With one segment of signs, in whole tiles, what a lane reads of them lies at constant distances.
    int signs = 0, only = 0;
#pragma unroll
    for (int k = 0; k < MAX_SEGMENTS; ++k)
      if (k < (int)m.segments && m.segment[k].format == SIGN) ++signs, only = k;
    const Segment& s = m.segment[only];
    const bool plain = signs == 1 && s.rows % TILE == 0 && m.plane_start % TILE == 0 && plane_rows % TILE == 0 && s.first % TILE == 0;
    const i64 first_row = (i64)block * TILE + g;
    const u8* lane_bits = (const u8*)s.data + first_row * s.stride + warp * (COLUMNS / 8) + 4 * t * X;
    const u8* lane_plane = (const u8*)m.plane_data + (first_row + s.first - m.plane_start) * m.plane_stride + 4 * (warp * P + t % SPAN * XP);
#pragma unroll
    for (int i = 0; i < TW; ++i) {
      const LeanRows r = lean_rows<SIGN>(m, block + i * B);
      last_there = r.there;
      const int in_plane = r.first + r.local - (int)m.plane_start;
      planes[i] = (PM >> i & 1) && r.there && in_plane + TILE > 0 && in_plane < plane_rows;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = r.local + g + 8 * h, at = in_plane + g + 8 * h;
        const i64 further = i * B * TILE + 8 * h;
        const bool there = r.there && (plain || row < r.rows);
        const u8* from = plain ? lane_bits + further * s.stride : r.data + (i64)row * r.stride + warp * (COLUMNS / 8) + 4 * t * X;
        load_words<X>(there, (const u32*)from, bits[i][h]);
        if (!(PM >> i & 1)) continue;
        const u8* plane = plain ? lane_plane + further * m.plane_stride
                                : (const u8*)m.plane_data + (i64)at * m.plane_stride + 4 * (warp * P + t % SPAN * XP);
        load_words<XP>(planes[i] && there && (plain || (at >= 0 && at < plane_rows)), (const u32*)plane, bits2[i][h]);
        if (SPAN < 4) bits2[i][h][0] >>= t / SPAN * BITS;
      }
    }
  }
};

// Leave: what else becomes of a row's result, `y` being what is stored, and of the inverse RMS. All threads of a row come there: expect
// before `ready`, with -1 where there is no row, begin after it.
struct LeaveNothing {
  static constexpr bool LEAVES = false;
  DEV_MEMBER void expect(int) {}
  DEV_MEMBER void begin() {}
  DEV_MEMBER void operator()(bool, float, float) const {}
};
// CW warps, X words of 32 columns a lane, TW tiles and RW int8 rows a block, P words of a second plane a warp (those of its columns
// that the plane has, filled up), PM: which of the tiles may have the plane, B: blocks, LR: 16 ranks of a correction, or 0.
template <int CW, int X, int TW, int RW, int P, int PM, int B, int LR, typename Ready, typename Leave>
DEV void dot(const Product& p, u8* smem, Ready ready, Leave leave) {
  constexpr u32 ONES = 0x01010101u;
  constexpr int COLUMNS = 128 * X, K = 4 * (TW * TILE + RW) <= CW * WARP ? 4 : 2;  // K threads finish a row
  constexpr int XP = P > 4 ? P / 4 : 1, SPAN = P > 4 ? 4 : P ? P : 1, BITS = 2 * SPAN;  // a lane's words of the plane, bits of one
  DotShared<CW, X, TW, RW, P, LR>& v = *(DotShared<CW, X, TW, RW, P, LR>*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x, plane_rows = (int)(m.plane_stop - m.plane_start);
  ASSUME(block < B);
  const float *weight = (const float*)p.in.weight, *col_scale = (const float*)m.col_scale;

  DotTiles<X, TW, P, PM, B> tiles;
  tiles.load(m);
  auto& bits = tiles.bits;
  auto& bits2 = tiles.bits2;
  const auto& planes = tiles.planes;
  u32 codes[RW ? RW : 1][X];
#pragma unroll
  for (int i = 0; i < RW; ++i) {
    const LeanRows r = lean_rows<INT8>(m, block + i * B);
#pragma unroll
    for (int x = 0; x < X; ++x)
      codes[i][x] = r.there ? ((const u32*)(r.data + (i64)r.local * r.stride + warp * COLUMNS))[lane + 32 * x] : 0;
  }
  uint4 right[2][X][2];  // right low-rank factor: ranks g and g + 8 of the lane's words
#pragma unroll
  for (int i = 0; i < (LR ? 4 * X : 0); ++i)
    right[i & 1][i >> 1 & (X - 1)][i / (2 * X)] = load_weights(
        (const u8*)m.lr_b + (i64)(g + 8 * (i & 1)) * m.kpad + warp * COLUMNS + 32 * (t * X + (i >> 1 & (X - 1))) + 16 * (i / (2 * X)));
  const int own = warp * COLUMNS + 4 * lane;  // the columns that the lane reads: own + 128 x + 0 to 3
  float4 w[X];
#pragma unroll
  for (int x = 0; x < X; ++x) {
    w[x] = weight ? *(const float4*)(weight + own + 128 * x) : float4{1, 1, 1, 1};
    if (!col_scale) continue;
    const float4 c = *(const float4*)(col_scale + own + 128 * x);
    w[x].x *= c.x, w[x].y *= c.y, w[x].z *= c.z, w[x].w *= c.w;
  }
  int chosen[XP][4];  // where the columns of the plane lie in v.x; the last place holds 0
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int place = (warp * P + lane / 8 + 4 * x) * 32 + lane % 8 + 8 * b;
      const int column = lane + 32 * x < 8 * P ? ((const i32*)m.plane_index)[place] - warp * COLUMNS : -1;
      chosen[x][b] = column >= 0 ? column + column / 32 * 8 : 160 * X;
    }
  // what finishing a row takes: threads K r + k have a K-th of the sums of row r of the tiles, then of the int8 rows
  const int unit = threadIdx.x / K, k = lane % K;
  const bool of_tile = unit < TW * TILE;
  LeanRows r = of_tile ? lean_rows<SIGN>(m, block + unit / TILE * B)
                       : lean_rows<INT8>(m, unit - TW * TILE < RW ? block + (unit - TW * TILE) * B : -1);
  if (of_tile) r.local += unit % TILE;
  r.there = r.there && r.local < r.rows;
  const int row = r.first + r.local, lr_row = row - (int)m.lr_start, plane_row = row - (int)m.plane_start;
  const bool low_rank = LR && r.there && lr_row >= 0 && row < (int)m.lr_stop;
  const bool second = P && r.there && of_tile && plane_row >= 0 && plane_row < plane_rows;
  const float scale = r.there ? half_bits_to_float(r.scale[r.local]) : 0.0f;
  const float bias = r.there && m.bias ? ((const float*)m.bias)[row] : 0.0f;
  const float scale2 = second ? half_bits_to_float(((const u16*)m.plane_scale)[plane_row]) : 0.0f;
  const float lr_scale = low_rank ? half_bits_to_float(((const u16*)m.lr_a_scale)[lr_row]) : 0.0f;
  u32 left[4 / K];
#pragma unroll
  for (int i = 0; i < 4 / K; ++i) left[i] = low_rank ? ((const u32*)((const u8*)m.lr_a + (i64)lr_row * 16))[4 / K * k + i] : 0;
  const float rank_scale = LR ? half_bits_to_float(((const u16*)m.lr_b_scale)[lane / 2]) : 0.0f;
  const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, 0) : 0;
  leave.expect(r.there ? row : -1);
  ready();
  leave.begin();

  // All blocks want all of the input at once: few wide requests for it take a third of the time of many narrow ones.
  float4 in[X];
#pragma unroll
  for (int x = 0; x < X; ++x) in[x] = load_fresh_quad((const float*)p.in.x + own + 128 * x);
  const float residual = r.there && (k == 0 || Leave::LEAVES) && p.out.mode == ADD ? load_fresh((const float*)p.out.y + row) : 0.0f;
  float squares = 0, total = 0, total2 = 0;
  u32 top = 0;
#pragma unroll
  for (int x = 0; x < X; ++x) {
    squares = fmaf(in[x].x, in[x].x, fmaf(in[x].y, in[x].y, fmaf(in[x].z, in[x].z, fmaf(in[x].w, in[x].w, squares))));
    in[x].x *= w[x].x, in[x].y *= w[x].y, in[x].z *= w[x].z, in[x].w *= w[x].w;
    *(float4*)&v.x[warp][own % 128 + own % 128 / 32 * 8 + 160 * x] = in[x];
    total += (in[x].x + in[x].y) + (in[x].z + in[x].w);
    const float most = fmaxf(fmaxf(fabsf(in[x].x), fabsf(in[x].y)), fmaxf(fabsf(in[x].z), fabsf(in[x].w)));
    const u32 bits = total - total == 0.0f ? float_to_bits(most) : INF_BITS;  // the largest of a NaN is the other number
    top = bits > top ? bits : top;
  }
  if (P && lane == 0) v.x[warp][160 * X] = 0.0f;
  sync_warp();
  top = warp_max_bits(top) >> 23;  // exponent
  float e[X][4], e2[XP][4];
#pragma unroll
  for (int x = 0; x < X; ++x)
#pragma unroll
    for (int b = 0; b < 4; ++b) e[x][b] = v.x[warp][lane / 8 * 40 + lane % 8 + 8 * b + 160 * x];
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x)
#pragma unroll
    for (int b = 0; b < 4; ++b) e2[x][b] = v.x[warp][chosen[x][b]];
  const bool damaged = top == 255;
  const u32 exponent = top > 30 ? top : 30;
  const float fixed = bits_to_float((damaged ? 1 : 276 - exponent) << 23);  // S
  const float one = damaged ? bits_to_float(0x7fc00000u) : bits_to_float((exponent - 29) << 23);  // 1 / (128 S)
  const float by = fixed * bits_to_float((134 - lane % 8) << 23);
#pragma unroll
  for (int x = 0; x < X; ++x) dot_slices(e[x], by, &v.q[warp][0][lane + 32 * x], 32 * X + 2);
  const float by_plane = fixed * bits_to_float((134 - lane % BITS) << 23);
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x) {
#pragma unroll
    for (int b = 0; b < 4; ++b) total2 += e2[x][b];
    if (lane + 32 * x < 8 * P) dot_slices(e2[x], by_plane, &v.q2[warp][0][lane + 32 * x], 8 * P + 2);
  }
  sync_warp();
  u32 xs[X][8], xs2[XP][BITS];
#pragma unroll
  for (int x = 0; x < X; ++x)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 two = *(const uint2*)&v.q[warp][g % 4][(t * X + x) * 8 + 2 * i];
      xs[x][2 * i] = two.x, xs[x][2 * i + 1] = two.y;
    }
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x)
#pragma unroll
    for (int i = 0; i < BITS; i += 2) {
      const uint2 two = *(const uint2*)&v.q2[warp][g % 4][(t % SPAN * XP + x) * 8 + (SPAN < 4 ? t / SPAN * BITS : 0) + i];
      xs2[x][i] = two.x, xs2[x][i + 1] = two.y;
    }
  float sums[3 + RW] = {squares, total, total2};
#pragma unroll
  for (int i = 0; i < RW; ++i) {
    sums[3 + i] = 0;
#pragma unroll
    for (int x = 0; x < X; ++x)
#pragma unroll
      for (int b = 0; b < 4; ++b) sums[3 + i] = fmaf((float)(i8)(codes[i][x] >> 8 * b), e[x][b], sums[3 + i]);
  }
  constexpr int APART = RW > 1 ? 4 : 8;
  const float summed = dot_sums(sums);
  if (lane % APART == 0) v.sums[warp][lane / APART] = summed;
  const float by_slice = t & 1 ? one * 65536.0f : one;
#pragma unroll
  for (int i = 0; i < TW; ++i) {
    if (i == TW - 1 && !tiles.last_there) break;
    int acc[4] = {};
#pragma unroll
    for (int x = 0; x < X; ++x)
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        mma_u8s8(acc, bits[i][0][x] & ONES << j, bits[i][1][x] & ONES << j, bits[i][0][x] & ONES << (j + 1),
                 bits[i][1][x] & ONES << (j + 1), xs[x][j], xs[x][j + 1]);
    dot_put(acc, by_slice, v.part[warp] + i * TILE);
  }
#pragma unroll
  for (int i = 0; i < TW; ++i) {
    if (!(PM >> i & 1) || !planes[i]) continue;
    int acc[4] = {};
#pragma unroll
    for (int x = 0; x < XP; ++x)
#pragma unroll
      for (int j = 0; j < BITS; j += 2) {
        const u32(&one_row)[XP] = bits2[i][0], (&other)[XP] = bits2[i][1];
        mma_u8s8(acc, one_row[x] & ONES << j, other[x] & ONES << j, one_row[x] & ONES << (j + 1), other[x] & ONES << (j + 1),
                 xs2[x][j], xs2[x][j + 1]);
      }
    dot_put(acc, by_slice, v.part2[P ? warp : 0] + (P ? i * TILE : 0));
  }
  if (LR) {  // the columns of a j have the unit of 2^j
    int acc[4] = {};
#pragma unroll
    for (int j = 7; j >= 0; --j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] *= 2;
      auto code = [&](int h, int x) { return word(right[h][x][j / 4], j % 4); };
#pragma unroll
      for (int x = 0; x < X; x += 2) {
        const int y = x + 1 < X ? x + 1 : x;  // X = 1: half of the product is empty
        mma_s8s8(acc, code(0, x), code(1, x), X > 1 ? code(0, y) : 0, X > 1 ? code(1, y) : 0, xs[x][j], X > 1 ? xs[y][j] : 0);
      }
    }
    dot_put<true>(acc, by_slice, v.rank[LR ? warp : 0]);
  }
  __syncthreads();

  if (warp * (WARP / K) >= TW * TILE + RW) return;
  float y = 0;
  squares = total = total2 = 0;
#pragma unroll
  for (int i = 0; i < CW; i += K) {
    const float4 part = *(const float4*)v.sums[i + k];
    squares += part.x, total += part.y, total2 += part.z;
  }
  if (of_tile) {
    float sum = 0, sum2 = 0;
#pragma unroll
    for (int i = 0; i < CW; i += K) {
      const float2 two = v.part[i + k][unit];
      sum += two.x + two.y;
      if (P && second) {
        const float2 other = v.part2[P ? i + k : 0][P ? unit : 0];
        sum2 += other.x + other.y;
      }
    }
    y = scale * (2 * sum - total);
    if (P) y = fmaf(scale2, 2 * sum2 - total2, y);
  } else if (RW && unit < TW * TILE + RW) {
    for (int i = 0; i < CW; i += K) y = fmaf(scale, v.sums[i + k][3 + unit - TW * TILE], y);
  }
  if (LR) {  // B x, two lanes a rank
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CW; i += 2) {
      const float2 two = v.rank[LR ? i + lane % 2 : 0][lane / 2];
      sum += two.x + two.y;
    }
    sum += shuffle_xor(sum, 1);
    if (lane % 2 == 0) v.of_rank[warp][lane / 2] = rank_scale * sum;
    sync_warp();
    float corrected = 0;
#pragma unroll
    for (int i = 0; i < 16 / K; ++i) corrected = fmaf((float)(i8)(left[i / 4] >> i % 4 * 8), v.of_rank[warp][16 / K * k + i], corrected);
    y = fmaf(lr_scale, corrected, y);
  }
#pragma unroll
  for (int by2 = 1; by2 < K; by2 *= 2) y += shuffle_xor(y, by2), squares += shuffle_xor(squares, by2);
  const bool finishes = r.there && k == 0;
  if (!Leave::LEAVES && !finishes) return;
  const float norm = p.in.groups ? fast_rsqrt(squares / (float)m.cols + param_float(p.in.eps)) : 1.0f;
  y = fmaf(y, norm, bias);
  if (p.out.mode == ADD) y += residual;
  if (finishes && p.out.mode == ADD) ((float*)p.out.y)[row] = y;
  else if (finishes) put_output(p.out, ring, row, 0, y);
  leave(r.there, y, norm);
}
template <int CW, int X, int TW, int RW, int P, int PM, int B, int LR, typename Ready>
DEV void dot(const Product& p, u8* smem, Ready ready) {
  dot<CW, X, TW, RW, P, PM, B, LR>(p, smem, ready, LeaveNothing());
}
