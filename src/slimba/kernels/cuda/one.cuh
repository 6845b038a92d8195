// Products of signs and int8 rows with one vector that the kernel before leaves as the tensor core's right operand, for the
// shapes that models have; and the recurrence of quick.cuh leaving one.
//
// An entry is two halves, the nearest float16 and what that leaves out, in two columns of the operand; the six others repeat them. Rows,
// columns and the second plane are divided as in eight.cuh, whose signs these are. Piece q of word x of the warps' lanes are 128
// bytes side by side: 16 for lanes t = 0 to 3 of the first halves and 16 for those of the second. Entries come without the norm's
// division, which the sums are multiplied by, and times a power of two near the inverse RMS that the residual stream
// had a layer before, or as they are (out_proj).
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_one.py, tests/runtime/test_cuda_one_step.py.
#define ONE_LANES 8  // with operands of their own
#define ONE_REST 64  // bytes from an entry's first half to its second

struct One {
  Matrix m;
  Output out;
  StateRef state;
  i64 x, x2, unit;           // operands; what a sum of masked signs, or of signs, is multiplied by
  i64 squares, n_squares, eps;  // float32, whose sum is that of the vector's squares before the norm's weights
  i64 scale, next_scale;     // float32: what the vector was multiplied by, or 0; where the next such number goes, or 0
  i64 places, next, next2, next_range, next_squares;  // of ADD: as in struct Eight; 2 TW squares a block
};
struct OneRecurrence {
  Recurrence r;
  i64 places, next, next2, squares;  // of the channels; squares: one of each warp of each block
};

DEV void put_halves(i64 at, float v) {
  const u16 half = float_to_half_bits(v);
  *(u16*)at = half;
  *(u16*)(at + ONE_REST) = float_to_half_bits(v - half_bits_to_float(half));
}
DEV void put_entry(i64 x, i64 x2, const Place& place, float v) {
  put_halves(x + place.at, v * place.by);
  if (place.at2 >= 0) put_halves(x2 + place.at2, v * place.by2);
}

// N rows a block, each finished by K threads: floats from one warp's sums to the next, so that a warp reads from different banks.
template <int CW, int N, int PIECES>
struct OneShared {
  static constexpr int K = 4 * N <= CW * WARP ? 4 : 2, STRIDE = (N + WARP - 1) / WARP * WARP + WARP / K;
  uint4 x[CW][PIECES][ONE_LANES];
  float part[CW][STRIDE], squares[CW];
};

// CW warps, X words of 32 columns a lane, TW tiles and RW int8 rows (at most 1) a block, P words of a second plane a warp, PM: which
// of the tiles may have the plane.
template <int CW, int X, int TW, int RW, int P, int PM, bool MASKED>
DEV void one(const One& p, u8* smem) {
  typedef SignTiles<X, TW, P, PM> Tiles;
  constexpr int XP = Tiles::XP, PAIRS = Tiles::PAIRS, COLUMNS = 128 * X;
  constexpr int PIECES = 4 * X, PIECES2 = P ? XP * PAIRS / 4 : 0, ROWS = TW * TILE, N = ROWS + RW;
  constexpr u32 ONES = 0x00010001u;
  typedef OneShared<CW, N, PIECES + PIECES2> Shared;
  constexpr int K = Shared::K;
  Shared& v = *(Shared*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, block = blockIdx.x, blocks = gridDim.x;
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
  // The row that a thread helps to finish, from each K-th warp's sum
  const int of = threadIdx.x / K, part = threadIdx.x % K;
  const bool is_code = RW && of == ROWS;
  const LeanRows r = lean_rows<SIGN>(m, of < ROWS ? block + of / TILE * blocks : -1);
  const int local = r.local + of % TILE;
  const int row = is_code ? (codes_row.there ? codes_row.first + codes_row.local : -1) : r.there && local < r.rows ? r.first + local : -1;
  const bool finishes = row >= 0 && part == 0;
  const float code_scale = is_code && finishes ? half_bits_to_float(codes_row.scale[codes_row.local]) * (MASKED ? 1.0f / (1 << 24) : 1.0f) : 1.0f;
  const float bias = m.bias && finishes ? ((const float*)m.bias)[row] : 0.0f;
  const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, 0) : 0;
  Place place = {0, -1, 0, 0};
  if (adds && p.places && finishes) place = load_place(p.places, row);
  release_next();
  await_previous();

#pragma unroll
  for (int i = lane; i < PIECES * ONE_LANES; i += WARP)
    copy_async(&v.x[warp][0][0] + i, (const uint4*)p.x + warp * PIECES * ONE_LANES + i);
  commit_copies();
#pragma unroll
  for (int i = lane; i < PIECES2 * ONE_LANES; i += WARP)
    copy_async(&v.x[warp][PIECES][0] + i, (const uint4*)p.x2 + warp * PIECES2 * ONE_LANES + i);
  commit_copies();
  const int at = 4 * (int)threadIdx.x;
  const float4 four = p.squares && at < (int)p.n_squares ? load_fresh_quad((const float*)p.squares + at) : float4{0, 0, 0, 0};
  const float scaled = p.scale ? load_fresh((const float*)p.scale) : 1.0f, range = p.next_range ? load_fresh((const float*)p.next_range) : 1.0f;
  const float residual = adds && finishes ? load_fresh((const float*)p.out.y + row) : 0.0f;
  wait_copies<1>();
  sync_warp();

  float acc[TW][4] = {}, more[TW][4] = {}, both[4] = {}, total2[4] = {};  // both: of the int8 row and of ones, for sums of all columns
#pragma unroll
  for (int k = 3; k >= 0; --k) {  // of a word of codes column j counts 2^j if MASKED
#pragma unroll
    for (int x = 0; x < X; ++x)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int step = 4 * half + k;
        const uint2 two = *((const uint2*)&v.x[warp][4 * x + step / 2][lane % ONE_LANES] + k % 2);
        if (MASKED || RW) {
          u32 first = 0, second = 0;
          if (RW) code_operand(codes[x], step, first, second);
          if (RW && MASKED) second = add_halves(second, second);
          mma_f16(both, first, MASKED ? ONES << 2 * k : 0, second, MASKED ? ONES << (2 * k + 1) : 0, two.x, two.y);
        }
#pragma unroll
        for (int i = 0; i < TW; ++i) {
          u32 a[4];
          eight_signs<MASKED>(tiles.bits[i][0][x], tiles.bits[i][1][x], step, a);
          mma_f16(acc[i], a[0], a[1], a[2], a[3], two.x, two.y);
        }
      }
    if (RW && MASKED && k) both[0] *= 4, both[1] *= 4;
  }
  if (P) wait_copies<0>(), sync_warp();
#pragma unroll
  for (int x = 0; x < (P ? XP : 0); ++x)
#pragma unroll
    for (int step = 0; step < PAIRS / 2; ++step) {
      const uint2 two = *((const uint2*)&v.x[warp][PIECES + x * (PAIRS / 4) + step / 2][lane % ONE_LANES] + step % 2);
      if (MASKED) mma_f16(total2, 0, ONES << 2 * (step % 4), 0, ONES << (2 * (step % 4) + 1), two.x, two.y);
#pragma unroll
      for (int i = 0; i < TW; ++i) {
        if (!(PM >> i & 1) || !tiles.planes[i]) continue;
        u32 a[4];
        eight_signs<MASKED>(tiles.bits2[i][0][x], tiles.bits2[i][1][x], step, a);
        mma_f16(more[i], a[0], a[1], a[2], a[3], two.x, two.y);
      }
    }
  // Columns 2 t and 2 t + 1 of a product are the two halves' sums, the same for every t
  const float all = both[2] + both[3], all2 = total2[2] + total2[3];
#pragma unroll
  for (int i = 0; i < 2 * TW; ++i) {
    const float (&a)[4] = acc[i / 2], (&b)[4] = more[i / 2];
    const float signs = a[i % 2 * 2] + a[i % 2 * 2 + 1], others = b[i % 2 * 2] + b[i % 2 * 2 + 1];
    float y = tiles.scale[i / 2][i % 2] * (MASKED ? fmaf(2.0f, signs, -all) : signs);
    if (PM >> i / 2 & 1) y = fmaf(tiles.scale2[i / 2][i % 2], MASKED ? fmaf(2.0f, others, -all2) : others, y);
    if (t == i % 4) v.part[warp][i / 2 * TILE + i % 2 * 8 + g] = y;
  }
  if (RW && lane == 0) v.part[warp][ROWS] = both[0] + both[1];
  const float squares = warp_sum((four.x + four.y) + (four.z + four.w));
  if (lane == 0) v.squares[warp] = squares;
  __syncthreads();
  if (of >= (N + WARP / K - 1) / (WARP / K) * (WARP / K)) return;  // warps with nothing to finish
  float y = 0, sum = 0;
#pragma unroll
  for (int w = 0; w < CW / K; ++w) {
    if (of < N) y += v.part[w * K + part][of];
    sum += v.squares[w * K + part];
  }
#pragma unroll
  for (int by = 1; by < K; by *= 2) y += shuffle_xor(y, by), sum += shuffle_xor(sum, by);
  const float inverse = p.squares ? fast_rsqrt(sum / (float)m.cols + param_float(p.eps)) : 1.0f;
  if (p.next_scale && block == 0 && threadIdx.x == 0) *(float*)p.next_scale = power_of_two(inverse);
  y = fmaf(y, inverse * param_float(p.unit) * fast_reciprocal(scaled) * code_scale, bias);
  if (!adds) {
    if (finishes) put_output(p.out, ring, row, 0, y);
    return;
  }
  const float u = residual + y;
  if (finishes) ((float*)p.out.y)[row] = u;
  if (!p.places) return;
  if (finishes) put_entry(p.next, p.next2, place, u * range);
  const float own = warp_sum(finishes ? u * u : 0.0f);
  if (lane == 0) ((float*)p.next_squares)[block * (ROWS * K / WARP) + warp] = own;
}

// The embedding of the sequence's id as the residual stream and as the first product's operands; one block.
struct OneEmbed {
  Embed e;
  i64 places, x, x2, squares, n_squares, scale, eps;
};
DEV void one_embed(const OneEmbed& p, u8* smem) {
  const int cols = (int)p.e.m.cols, warp = threadIdx.x / WARP;
  float *u = (float*)p.e.u, *part = (float*)smem;
  await_previous();
  release_next();
  const i64 id = ((const i32*)p.e.ids)[0];
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
  for (int i = threadIdx.x; i < (int)p.n_squares; i += THREADS) ((float*)p.squares)[i] = i ? 0.0f : squares;
  if (threadIdx.x == 0) *(float*)p.scale = range;
  for (int c = threadIdx.x; c < cols; c += THREADS) put_entry(p.x, p.x2, load_place(p.places, c), u[c] * range);
}

// What the recurrence leaves for out_proj: an entry of a finishing lane's channel, and the squares of a warp's rows.
struct LeaveEntries {
  const OneRecurrence& p;
  Place place;
  DEV_MEMBER void expect(int channel) { place = load_place(p.places, channel); }
  DEV_MEMBER void operator()(int, int, bool finishes, float y) const {
    if (finishes) put_entry(p.next, p.next2, place, y);
    float squares = finishes ? y * y : 0.0f;
#pragma unroll
    for (int by = 8; by < WARP; by *= 2) squares += shuffle_xor(squares, by);
    if (threadIdx.x % WARP == 0) ((float*)p.squares)[blockIdx.x * WARPS + threadIdx.x / WARP] = squares;
  }
};
DEV void one_recur(const OneRecurrence& p, u8* smem) {
  release_next();
  quick_recur(p.r, smem, AtOnce(), LeaveEntries{p, {}});
}
