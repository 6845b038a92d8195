// Products of signs and int8 rows with two to eight vectors, for the shapes that models have: the kernel before leaves the vectors
// as the tensor core's right operand, so that a lane reads its part in a few wide loads and begins to multiply.
//
// Rows, columns and the second plane are divided as in dot.cuh: a block has TW tiles of 16 rows and RW int8 rows, a warp 128 X
// columns of them all, lane t of four X words of 32 columns. Piece q of word x of the warps' lanes are 512 bytes side by side, lane
// 4 v + t having four pairs of vector v in float16: pair i of a word are its columns i and i + 16. operand_places in cuda_eight.py says
// where each column lies. Vectors come without the norm's division, which the sums are multiplied by; so that
// float16 holds them they are multiplied by a power of two near the inverse RMS that the residual stream had a layer before.
//
// MASKED: a word of signs masked with 0x00010001 << j, j < 8, is a pair of halves of value 2^(j - 24) or 0, a left operand with
// no further work; the vectors hold 2^-j x, and y = 2 sum of the chosen x - sum of all x. Else signs become 1 and -1.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_eight.py.
#define EIGHT 8  // vectors
#define EIGHT_SQUARES 3  // fours of sums of squares of a lane, at most
#define EIGHT_ROOM 20  // floats of a tile's rows of one vector: the lanes of a warp write to different banks

struct Eight {
  Matrix m;
  Output out;
  StateRef state;
  i64 batch, x, x2, unit;               // operands; what a sum of masked signs, or of signs, is multiplied by
  i64 squares, n_squares, eps;          // float32 [B][n_squares], of what the vectors were before the norm's weights
  i64 scale, next_scale;                // float32 [8]: what the vectors were multiplied by, or 0; where the next such number goes, or 0
  i64 places, next, next2, next_range;  // of ADD: where a row goes as an operand of the product after, struct Place each, and by what number
  i64 next_squares, n_next;             // float32 [B][n_next], TW blocks of them
};

template <int CW, int TW, int PIECES>
struct EightShared {
  union {
    uint4 x[PIECES][WARP];
    float part[TW][EIGHT][EIGHT_ROOM];  // when its operands are multiplied
  } warp[CW];
  float row8[CW][EIGHT];
  float factor[EIGHT], range[EIGHT];
  i64 rings[EIGHT];
};

DEV float power_of_two(float v) { return bits_to_float(float_to_bits(v) & 0x7f800000u); }

// Asks for a warp's piece of operands. By way of shared memory, because the assembler moves loads into registers between the products.
DEV void ask_piece(uint4 (&to)[WARP], i64 from, int piece) {
  const int lane = threadIdx.x % WARP;
  copy_async(&to[lane], (const u8*)from + (piece * WARP + lane) * 16);
}

// Rows g and g + 8 of a tile, bits 2 k and 2 k + 1 of the words and 16 above.
template <bool MASKED>
DEV void eight_signs(u32 w0, u32 w1, int k, u32 (&a)[4]) {
  if (MASKED) {
    const u32 first = 0x00010001u << 2 * (k % 4), second = first << 1;
    if (k >= 4) w0 >>= 8, w1 >>= 8;
    a[0] = w0 & first, a[1] = w1 & first, a[2] = w0 & second, a[3] = w1 & second;
  } else {
    sign_operand(w0, w1, k, a);
  }
}

// A result joins the residual stream, and from there the operands of the next product. All lanes come here, 16 with the rows of a vector.
DEV void eight_add(const Eight& p, const Place& place, int entry, int row, int b, bool there, float u, float range) {
  if (there) ((float*)p.out.y)[b * (int)p.out.stride + row] = u;
  if (!p.places) return;
  if (there) put_operand(p.next, p.next2, place, b, u * range);
  float squares = there ? u * u : 0.0f;
#pragma unroll
  for (int by = 8; by; by /= 2) squares += shuffle_xor(squares, by);
  if (threadIdx.x % TILE == 0 && b < (int)p.batch) ((float*)p.next_squares)[b * (int)p.n_next + entry] = squares;
}

// CW warps, X words of 32 columns a lane, TW tiles and RW int8 rows (at most 1) a block, P words of a second plane a warp, PM: which
// of the tiles may have the plane.
template <int CW, int X, int TW, int RW, int P, int PM, bool MASKED>
DEV void eight(const Eight& p, u8* smem) {
  constexpr int COLUMNS = 128 * X, ROUNDS = (TW * TILE * EIGHT + CW * WARP - 1) / (CW * WARP);  // of finishing
  typedef SignTiles<X, TW, P, PM> Tiles;
  constexpr int XP = Tiles::XP, PAIRS = Tiles::PAIRS;
  constexpr int PIECES = 4 * X, PIECES2 = P ? XP * PAIRS / 4 : 0;  // of a lane's operands, and of the plane's
  constexpr u32 ONES = 0x00010001u;
  typedef EightShared<CW, TW, PIECES + PIECES2> Shared;
  Shared& v = *(Shared*)smem;
  uint4* fours = (uint4*)(smem + sizeof(Shared));  // sums of squares
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, batch = (int)p.batch;
  const int block = blockIdx.x, blocks = gridDim.x;
  const bool adds = p.out.mode == ADD;

  Tiles tiles;
  tiles.load(m);
  const LeanRows codes_row = lean_rows<INT8>(m, RW ? block : -1);
  uint4 codes[X][2];  // in lanes g = 0
#pragma unroll
  for (int k = 0; k < (RW ? 2 * X : 0); ++k) {
    const u8* from = codes_row.data + (i64)codes_row.local * codes_row.stride + warp * COLUMNS + (t * X + k / 2) * 32 + k % 2 * 16;
    codes[k / 2][k % 2] = codes_row.there && g == 0 ? load_weights(from) : uint4{0, 0, 0, 0};
  }
  if (p.out.mode == IN_PROJ && (int)threadIdx.x < batch) v.rings[threadIdx.x] = (i64)next_ring_row(p.state, threadIdx.x);
  // A thread finishes a row of a vector in each round: 16 rows are those of one vector
  const int of = threadIdx.x / TILE % EIGHT;
  int rows[ROUNDS];  // of the matrix, or -1
  Place place[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k) {
    const int i = ((int)threadIdx.x + k * CW * WARP) / (TILE * EIGHT);
    const LeanRows r = lean_rows<SIGN>(m, i < TW ? block + i * blocks : -1);
    const int local = r.local + threadIdx.x % TILE;
    rows[k] = r.there && local < r.rows && of < batch ? r.first + local : -1;
    if (adds && p.places && rows[k] >= 0) place[k] = load_place(p.places, rows[k]);
  }
  release_next();  // here, behind the weights, or the step takes 4 % longer (docs/log.md)
  await_previous();

  // Steps 3, 2, 7 and 6 of a word come first, which have the odd pieces
#pragma unroll
  for (int first = 1; first >= 0; --first) {
#pragma unroll
    for (int i = first; i < PIECES; i += 2) ask_piece(v.warp[warp].x[i], p.x, warp * PIECES + i);
    commit_copies();
  }
#pragma unroll
  for (int i = 0; i < PIECES2; ++i) ask_piece(v.warp[warp].x[PIECES + i], p.x2, warp * PIECES2 + i);
#pragma unroll
  for (int i = lane; i < EIGHT_SQUARES * WARP; i += WARP)
    if (warp < batch && 4 * i < (int)p.n_squares) {
      const int at = warp * (int)p.n_squares / 4 + i;
      copy_async(fours + at, (const uint4*)p.squares + at);
    }
  commit_copies();
  float residual[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k)
    residual[k] = adds && rows[k] >= 0 ? load_fresh((const float*)p.out.y + of * (int)p.out.stride + rows[k]) : 0.0f;
  const bool sums = warp < batch;  // warp v: the squares of vector v
  const float scaled = p.scale && sums ? load_fresh((const float*)p.scale + warp) : 1.0f;
  const float range = p.next_range && sums ? load_fresh((const float*)p.next_range + warp) : 1.0f;

  float acc[TW][4] = {}, more[TW][4] = {}, both[4] = {}, total2[4] = {};  // both: of the int8 row, and sums of all columns
#pragma unroll
  for (int k = 3; k >= 0; --k) {  // of a word of codes column j counts 2^j if MASKED
    if (k == 3) wait_copies<2>();
    if (k == 1) wait_copies<1>();
#pragma unroll
    for (int x = 0; x < X; ++x)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int step = 4 * half + k;
        const uint2 two = *((const uint2*)&v.warp[warp].x[4 * x + step / 2][lane] + k % 2);
        const u32 b0 = two.x, b1 = two.y;
        u32 a[4];
        if (MASKED || RW) {
          u32 one = 0, other = 0;
          if (RW) code_operand(codes[x], step, one, other);
          if (RW && MASKED) other = add_halves(other, other);
          mma_f16(both, one, MASKED ? ONES << 2 * k : 0, other, MASKED ? ONES << (2 * k + 1) : 0, b0, b1);
        }
#pragma unroll
        for (int i = 0; i < TW; ++i) {
          eight_signs<MASKED>(tiles.bits[i][0][x], tiles.bits[i][1][x], step, a);
          mma_f16(acc[i], a[0], a[1], a[2], a[3], b0, b1);
        }
      }
    if (RW && MASKED && k) both[0] *= 4, both[1] *= 4;
  }
  wait_copies<0>();
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x)
#pragma unroll
    for (int step = 0; step < PAIRS / 2; ++step) {
      const uint2 two = *((const uint2*)&v.warp[warp].x[PIECES + x * (PAIRS / 4) + step / 2][lane] + step % 2);
      const u32 b0 = two.x, b1 = two.y;
      u32 a[4];
      if (MASKED) mma_f16(total2, ONES << 2 * (step % 4), 0, ONES << (2 * (step % 4) + 1), 0, b0, b1);
#pragma unroll
      for (int i = 0; i < TW; ++i) {
        if (!(PM >> i & 1) || !tiles.planes[i]) continue;
        eight_signs<MASKED>(tiles.bits2[i][0][x], tiles.bits2[i][1][x], step, a);
        mma_f16(more[i], a[0], a[1], a[2], a[3], b0, b1);
      }
    }
  sync_warp();
#pragma unroll
  for (int i = 0; i < TW; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float y = tiles.scale[i][k / 2] * (MASKED ? fmaf(2.0f, acc[i][k], -both[2 + k % 2]) : acc[i][k]);
      if (PM >> i & 1) y = fmaf(tiles.scale2[i][k / 2], MASKED ? fmaf(2.0f, more[i][k], -total2[k % 2]) : more[i][k], y);
      v.warp[warp].part[i][2 * t + k % 2][g + k / 2 * 8] = y;
    }
  if (RW && g == 0) v.row8[warp][2 * t] = both[0], v.row8[warp][2 * t + 1] = both[1];
  if (sums) {
    float squares = 0;
#pragma unroll
    for (int i = lane; i < EIGHT_SQUARES * WARP; i += WARP) {
      if (4 * i >= (int)p.n_squares) continue;
      const float4 four = *(const float4*)(fours + warp * (int)p.n_squares / 4 + i);
      squares += (four.x + four.y) + (four.z + four.w);
    }
    squares = warp_sum(squares);
    const float inverse = p.squares ? fast_rsqrt(squares / (float)m.cols + param_float(p.eps)) : 1.0f;
    if (lane == 0) v.factor[warp] = inverse * param_float(p.unit) * fast_reciprocal(scaled), v.range[warp] = range;
    if (lane == 0 && p.next_scale && block == 0) ((float*)p.next_scale)[warp] = power_of_two(inverse);
  }
  __syncthreads();

#pragma unroll
  for (int k = 0; k < ROUNDS; ++k) {
    const int i = ((int)threadIdx.x + k * CW * WARP) / (TILE * EIGHT);
    if (i >= TW) break;
    float y = 0;
#pragma unroll
    for (int w = 0; w < CW; ++w) y += v.warp[w].part[i][of][threadIdx.x % TILE];
    y *= v.factor[of];
    if (m.bias && rows[k] >= 0) y += ((const float*)m.bias)[rows[k]];
    if (adds) eight_add(p, place[k], i * blocks + block, rows[k], of, rows[k] >= 0, residual[k] + y, v.range[of]);
    else if (rows[k] >= 0) put_output(p.out, v.rings[of], rows[k], of, y);
  }
  if (RW && warp == CW - 1 && lane < batch && codes_row.there) {
    float y = 0;
#pragma unroll
    for (int w = 0; w < CW; ++w) y += v.row8[w][lane];
    const int row = codes_row.first + codes_row.local;
    y *= half_bits_to_float(codes_row.scale[codes_row.local]) * v.factor[lane] * (MASKED ? 1.0f / (1 << 24) : 1.0f);
    if (m.bias) y += ((const float*)m.bias)[row];
    put_output(p.out, v.rings[lane], row, lane, y);
  }
}

// The embedding of each sequence's id as the residual stream and as the first product's operands. A block a sequence.
struct EightEmbed {
  Embed e;
  i64 places, x, x2, squares, n_squares, scale, eps;
};
DEV void eight_embed(const EightEmbed& p, u8* smem) {
  const int b = blockIdx.x, cols = (int)p.e.m.cols, warp = threadIdx.x / WARP;
  float *u = (float*)p.e.u + b * cols, *part = (float*)smem;
  await_previous();
  release_next();
  const i64 id = ((const i32*)p.e.ids)[b];
  float squares = 0;
  for (int c = threadIdx.x; c < cols; c += THREADS) {
    const float value = embedding_entry(p.e.m, id, c);
    u[c] = value;
    squares += value * value;
  }
  squares = warp_sum(squares);
  if (threadIdx.x % WARP == 0) part[warp] = squares;
  __syncthreads();
  squares = 0;
  for (int w = 0; w < WARPS; ++w) squares += part[w];
  const float range = power_of_two(fast_rsqrt(squares / (float)cols + param_float(p.eps)));
  for (int i = threadIdx.x; i < (int)p.n_squares; i += THREADS) ((float*)p.squares)[b * (int)p.n_squares + i] = i ? 0.0f : squares;
  if (threadIdx.x == 0) ((float*)p.scale)[b] = range;
  for (int c = threadIdx.x; c < cols; c += THREADS) put_operand(p.x, p.x2, load_place(p.places, c), b, u[c] * range);
}
