// in_proj of one sequence, times a vector that out_proj of the layer before leaves in fixed point, as the tensor core's right operand;
// otherwise as dot.cuh, which is what leaves it.
//
// A column is X = x w S 2^(7 - j), |X| < 2^30, in four signed bytes ("slices"); j: the bit of its sign in a byte of the word. S is a
// constant of the layer times a power of two near the inverse RMS that the residual stream had a layer before; the
// norm's division is what the sums are multiplied by. A column beyond 2^30 makes the squares NaN, and so all results.
//
// Word x of the warps' lanes t, 32 columns each, are 512 bytes: 16 for j = 0 to 3 of lanes 0 to 3 of the first slice, then of the other
// slices, then the same for j = 4 to 7. The plane's words lie alike, SPAN lanes side by side. `digit_places` in cuda_one.py says so.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_one.py, tests/runtime/test_cuda_one_step.py.
#define SLICES 4
#define MOST_FIXED 1073741824.0f  // 2^30

struct One {
  Matrix m;
  Output out;
  StateRef state;
  i64 x, x2, valid, unit;       // operands; u32 of each word of the plane, its bits that are columns; 1 / (128 S) but for the power of two
  i64 left, n_left, eps;        // float32: the vector's power of two, three not used, and numbers whose sum is that of the vector's squares
  i64 next_scale;               // where the next vector's power of two goes
};
struct Leaving {
  Product p;
  i64 places, next, next2, slice2;  // 0, or struct DigitPlace of each row as the next vector's column; bytes from a slice to the next in next2
  i64 scale, squares, next_scale;   // the next vector's power of two; where its squares go, one of each warp; or 0, and where a power of two goes
};

// Where a column goes as an operand, in bytes from those of the first slice, and what multiplies it there; in the second plane, or -1.
struct DigitPlace {
  i32 at, at2;
  float by, by2;
};
DEV u8 digit_of(float v, int slice) { return (u8)((((u32)__float2int_rn(v) + 0x00808080u) ^ 0x00808080u) >> 8 * slice); }
// K threads, which all come here, finish a row, W warps all of them; each leaves each K-th digit.
template <int K, int W>
struct LeaveDigits {
  static constexpr bool LEAVES = true;
  const Leaving& p;
  DigitPlace place;
  DEV_MEMBER void expect(int row) {
    const uint4 v = p.places && row >= 0 ? *(const uint4*)(p.places + 16 * (i64)row) : uint4{0, 0, 0, 0};
    place = {(i32)v.x, (i32)v.y, bits_to_float(v.z), bits_to_float(v.w)};
  }
  DEV_MEMBER void begin() {
    const float scale = p.places ? load_fresh((const float*)p.scale) : 0.0f;
    place.by *= scale, place.by2 *= scale;
  }
  DEV_MEMBER void operator()(bool there, float u, float inverse) const {
    if (p.next_scale && blockIdx.x == 0 && threadIdx.x == 0) *(float*)p.next_scale = power_of_two(inverse);
    if (!p.places) return;
    const float v = u * place.by, v2 = u * place.by2;
#pragma unroll
    for (int s = threadIdx.x % K; s < (there ? SLICES : 0); s += K) {
      ((u8*)p.next)[place.at + s * 16 * SLICES] = digit_of(v, s);
      if (place.at2 >= 0) ((u8*)p.next2)[place.at2 + s * p.slice2] = digit_of(v2, s);
    }
    const bool fits = fabsf(v) < MOST_FIXED && (place.at2 < 0 || fabsf(v2) < MOST_FIXED);
    float squares = !there ? 0.0f : fits ? u * u : bits_to_float(0x7fc00000u);  // the same in K threads
#pragma unroll
    for (int by = K; by < WARP; by *= 2) squares += shuffle_xor(squares, by);
    if (threadIdx.x % WARP == 0) ((float*)p.squares)[blockIdx.x * W + threadIdx.x / WARP] = squares;
  }
};
// A product of dot.cuh that leaves digits, or the power of two alone.
template <int CW, int X, int TW, int RW, int P, int PM, int B>
DEV void leaving(const Leaving& p, u8* smem) {
  constexpr int N = TW * TILE + RW, K = 4 * N <= CW * WARP ? 4 : 2, W = (N * K + WARP - 1) / WARP;
  release_next();
  dot<CW, X, TW, RW, P, PM, B, 0>(p.p, smem, AtOnce(), LeaveDigits<K, W>{p, {}});
}
DEV void one_recur(const Recurrence& p, u8* smem) {
  release_next();
  quick_recur<true>(p, smem, AtOnce());
}

// N rows of tiles a block, each finished by K threads: halves of a warp's sums, so far from the next warp's that a warp reads from
// different banks. sums: of all columns, of the plane's, of squares, of the int8 row.
template <int CW, int N, bool PLANE>
struct OneShared {
  static constexpr int K = 4 * (N + 1) <= CW * WARP ? 4 : 2, STRIDE = N + 16 / K;
  float4 sums[CW];
  float by;  // what sums are multiplied by but for the norm
  float2 part[CW][STRIDE], part2[PLANE ? CW : 1][PLANE ? STRIDE : 1];
};
DEV void to_words(const uint4& from, u32* to) { to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w; }

// CW warps, X words of 32 columns a lane, TW tiles and RW int8 rows (at most 1) a block, P words of a second plane a warp, PM: which
// of the tiles may have it, B: blocks.
template <int CW, int X, int TW, int RW, int P, int PM, int B>
DEV void one(const One& p, u8* smem) {
  typedef DotTiles<X, TW, P, PM, B> Tiles;
  constexpr int XP = Tiles::XP, SPAN = Tiles::SPAN, BITS = Tiles::BITS, COLUMNS = 128 * X;
  constexpr int UNITS = 2 * SLICES * 4 * X, UNITS2 = 2 * SLICES * P, ROWS = TW * TILE, N = ROWS + RW;  // of 16 bytes of a warp
  constexpr u32 ONES = 0x01010101u;
  typedef OneShared<CW, ROWS, (P > 0)> Shared;
  constexpr int K = Shared::K;
  release_next();
  Shared& v = *(Shared*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, block = blockIdx.x;
  Tiles tiles;
  tiles.load(m);
  u32 valid[XP];
  load_words<XP>(P > 0, (const u32*)p.valid + warp * P + t % SPAN * XP, valid);
  if (P && SPAN < 4) valid[0] >>= t / SPAN * BITS;
  const LeanRows codes_row = lean_rows<INT8>(m, RW ? block : -1);
  uint4 codes[X][2];  // in lanes g = 0
#pragma unroll
  for (int k = 0; k < (RW ? 2 * X : 0); ++k) {
    const u8* from = codes_row.data + (i64)codes_row.local * codes_row.stride + warp * COLUMNS + (t * X + k / 2) * 32 + k % 2 * 16;
    codes[k / 2][k % 2] = codes_row.there && g == 0 ? load_weights(from) : uint4{0, 0, 0, 0};
  }
  // The row that a thread helps to finish, from each K-th warp's sum
  const int of = threadIdx.x / K, part = threadIdx.x % K;
  const bool is_code = RW && of == ROWS;
  const LeanRows r = lean_rows<SIGN>(m, of < ROWS ? block + of / TILE * B : -1);
  const int local = r.local + of % TILE;
  const int row = is_code ? (codes_row.there ? codes_row.first + codes_row.local : -1) : r.there && local < r.rows ? r.first + local : -1;
  const bool finishes = row >= 0 && part == 0;
  const int plane_row = row - (int)m.plane_start, plane_rows = (int)(m.plane_stop - m.plane_start);
  const bool second = P && row >= 0 && !is_code && plane_row >= 0 && plane_row < plane_rows;
  const float row_scale = row < 0 ? 0.0f : half_bits_to_float(is_code ? codes_row.scale[codes_row.local] : r.scale[local]);
  const float row_scale2 = second ? half_bits_to_float(((const u16*)m.plane_scale)[plane_row]) : 0.0f;
  const float bias = m.bias && finishes ? ((const float*)m.bias)[row] : 0.0f;
  const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, 0) : 0;  // not put into the address of a result yet: the wait would wait for it
  const uint4* from = (const uint4*)p.x + (warp * UNITS + g % SLICES * 4 + t);
  const uint4* from2 = (const uint4*)p.x2 + (warp * UNITS2 + g % SLICES * SPAN + t % SPAN);
  const float* left = (const float*)p.left + 4 * threadIdx.x;
  await_previous();

  u32 xs[X][8], xs2[XP][8];
#pragma unroll
  for (int i = 0; i < 2 * X; ++i)
    to_words(load_fresh_four(from + i * SLICES * 4), &xs[i / 2][i % 2 * 4]);
#pragma unroll
  for (int i = 0; i < (P ? 2 * XP : 0); ++i)  // of a lane's BITS columns the others are not used
    to_words(load_fresh_four(from2 + i * SLICES * SPAN), &xs2[i / 2][i % 2 * 4]);
  float4 four = p.left && 4 * (int)threadIdx.x < (int)p.n_left ? load_fresh_quad(left) : float4{threadIdx.x ? 0.0f : 1.0f, 0, 0, 0};

  // Columns 2 t and 2 t + 1 of a product are two slices' sums, lanes t and t + 2 have the same. Sums of signs are below 2^30 (dot.cuh)
  const float unit = t & 1 ? 65536.0f : 1.0f;
  auto put = [&](const int (&sums)[4], int h, float2* to) {
    if (t < 2) ((float*)to)[t] = unit * (float)(sums[2 * h] + sums[2 * h + 1] * 256);
  };
#pragma unroll
  for (int i = 0; i < TW; ++i) {
    int acc[4] = {};
#pragma unroll
    for (int x = 0; x < X; ++x)
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const u32 a = tiles.bits[i][0][x], b = tiles.bits[i][1][x];
        mma_u8s8(acc, a & ONES << j, b & ONES << j, a & ONES << (j + 1), b & ONES << (j + 1), xs[x][j], xs[x][j + 1]);
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) put(acc, h, v.part[warp] + i * TILE + 8 * h + g);
  }
  auto whole = [&](int low, int high) {
    const float half = unit * fmaf((float)high, 256.0f, (float)low);
    return half + shuffle_xor(half, 1);
  };
  // Of the int8 row in rows g = 0 and of all columns in the others; the columns of a j have the unit of 2^j
  int both[4] = {}, total2[4] = {};
#pragma unroll
  for (int j = 7; j >= 0; --j) {
    const u32 one = 0x01010101u;
#pragma unroll
    for (int i = 0; i < 4; ++i) both[i] *= 2;
#pragma unroll
    for (int x = 0; x < X; x += 2) {
      const int y = x + 1 < X ? x + 1 : x;  // X = 1: half of the product is empty
      const u32 first = RW ? word(codes[x][j / 4], j % 4) : 0, second = RW && X > 1 ? word(codes[y][j / 4], j % 4) : 0;
      mma_s8s8(both, first, one, second, X > 1 ? one : 0, xs[x][j], X > 1 ? xs[y][j] : 0);
    }
  }
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x) {
    u32 own[BITS];
#pragma unroll
    for (int i = 0; i < BITS; ++i) own[i] = SPAN == 4 ? xs2[x][i] : SPAN == 2 ? xs2[x][t / 2 * 4 + i] : xs2[x][t * 2 + i];
#pragma unroll
    for (int i = 0; i < BITS; ++i) xs2[x][i] = own[i];
#pragma unroll
    for (int i = 0; i < BITS; i += 2) mma_u8s8(total2, valid[x] & ONES << i, 0, valid[x] & ONES << (i + 1), 0, own[i], own[i + 1]);
  }
#pragma unroll
  for (int k = 0; k < (P ? TW : 0); ++k) {
    if (!(PM >> k & 1) || !tiles.planes[k]) continue;
    int acc[4] = {};
#pragma unroll
    for (int x = 0; x < XP; ++x)
#pragma unroll
      for (int i = 0; i < BITS; i += 2) {
        const u32 a = tiles.bits2[k][0][x] & valid[x], b = tiles.bits2[k][1][x] & valid[x];
        mma_u8s8(acc, a & ONES << i, b & ONES << i, a & ONES << (i + 1), b & ONES << (i + 1), xs2[x][i], xs2[x][i + 1]);
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) put(acc, h, v.part2[P ? warp : 0] + (P ? k * TILE + 8 * h + g : 0));
  }
  if (threadIdx.x == 0) v.by = param_float(p.unit) * fast_reciprocal(four.x), four.x = 0;
  const float4 sums = {whole(both[2], both[3]), P ? whole(total2[0], total2[1]) : 0.0f,
                       warp_sum((four.x + four.y) + (four.z + four.w)), RW ? whole(both[0], both[1]) : 0.0f};
  if (lane == 0) v.sums[warp] = sums;
  __syncthreads();
  if (warp * (WARP / K) >= N) return;
  float result = 0, result2 = 0, all = 0, all2 = 0, sum = 0;
#pragma unroll
  for (int w = part; w < CW; w += K) {
    const float4 of_warp = v.sums[w];
    all += of_warp.x, all2 += of_warp.y, sum += of_warp.z;
    if (is_code) result += of_warp.w;
    if (of >= ROWS) continue;
    const float2 two = v.part[w][of];
    result += two.x + two.y;
    if (!second) continue;
    const float2 other = v.part2[P ? w : 0][P ? of : 0];
    result2 += other.x + other.y;
  }
  float y = row_scale * (is_code ? result : fmaf(2.0f, result, -all));
  if (P) y = fmaf(row_scale2, fmaf(2.0f, result2, -all2), y);
#pragma unroll
  for (int by = 1; by < K; by *= 2) y += shuffle_xor(y, by), sum += shuffle_xor(sum, by);
  const float inverse = p.left ? fast_rsqrt(sum / (float)m.cols + param_float(p.eps)) : 1.0f;
  if (p.next_scale && block == 0 && threadIdx.x == 0) *(float*)p.next_scale = power_of_two(inverse);
  if (finishes) put_output(p.out, ring, row, 0, fmaf(y, inverse * v.by, bias));
}
