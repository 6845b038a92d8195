// Products of signs and int8 rows with two to tens of vectors, for the shapes that models have: the kernel before leaves the vectors
// as the tensor core's right operand, so that a lane reads its part in a few wide loads and begins to multiply.
//
// Rows, columns and the second plane are divided as in dot.cuh: a block has TW tiles of 16 rows and RW int8 rows, a warp 128 X
// columns of them all, lane t of four X words of 32 columns. Piece q of word x of the warps' lanes are 512 bytes side by side, lane
// 4 v + t having four pairs of vector v in float16: pair i of a word are its columns i and i + 16. operand_places in cuda_eight.py says
// where each column lies. Vectors come without the norm's division, which the sums are multiplied by; so that
// float16 holds them they are multiplied by a power of two near the inverse RMS that the residual stream had a layer before.
//
// Vectors come in groups of eight. A block keeps its weights and multiplies SPLIT-th of the groups one after another; blocks
// of the grid's second dimension take the others.
//
// MASKED: a word of signs masked with 0x00010001 << j, j < 8, is a pair of halves of value 2^(j - 24) or 0, a left operand with
// no further work; the vectors hold 2^-j x, and y = 2 sum of the chosen x - sum of all x. Else signs become 1 and -1.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_eight.py.
#define EIGHT 8  // vectors of a group
#define EIGHT_SQUARES 3  // fours of sums of squares of a lane, at most
#define EIGHT_ROOM 20  // floats of a tile's rows of one vector: the lanes of a warp write to different banks

struct Eight {
  Matrix m;
  Output out;
  StateRef state;
  i64 batch, x, x2, unit;               // operands; what a sum of masked signs, or of signs, is multiplied by
  i64 squares, n_squares, eps;          // float32 [B][n_squares], of what the vectors were before the norm's weights
  i64 scale, next_scale;                // float32 [B]: what the vectors were multiplied by, or 0; where the next such number goes, or 0
  i64 places, next, next2, next_range;  // of ADD: where a row goes as an operand of the product after, struct Place each, and by what number
  i64 next_squares, n_next;             // float32 [B][n_next], TW blocks of them
  i64 group, group2;                    // bytes of a group's operands in next and next2
};

template <int TW, int VECTORS>
struct EightPart {
  float part[TW][VECTORS][EIGHT_ROOM];
};
template <int CW, int TW, int VECTORS, bool AHEAD>
struct EightParts {};  // where no operands come while sums are added, these take the operands' place
template <int CW, int TW, int VECTORS>
struct EightParts<CW, TW, VECTORS, true> {
  EightPart<TW, VECTORS> parts[CW];
};
// VECTORS that a block multiplies at once, V eights; GROUPS of so many.
template <int CW, int TW, int PIECES, int V, int GROUPS, bool AHEAD>
struct EightShared : EightParts<CW, TW, V * EIGHT, AHEAD> {
  static constexpr int VECTORS = V * EIGHT;
  union {
    uint4 x[V][PIECES][WARP];
    EightPart<AHEAD ? 1 : TW, VECTORS> sums;
  } warp[CW];
  float row8[CW][VECTORS];
  float factor[VECTORS], range[VECTORS];
  i64 rings[GROUPS * VECTORS];
  DEV_MEMBER auto& sums_of(int w) {
    if constexpr (AHEAD) return this->parts[w].part;
    else return warp[w].sums.part;
  }
};

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

// Sums of the vectors' columns by `codes` and by `ones`. TURNED: two eights are the rows of one left operand, and there are no codes.
template <int V, bool TURNED>
DEV void add_totals(float (&sum)[V][4], const uint2 (&two)[V], u32 codes0, u32 codes1, u32 ones0, u32 ones1) {
  if (TURNED) return mma_f16(sum[0], two[0].x, two[V - 1].x, two[0].y, two[V - 1].y, ones0, ones1);
#pragma unroll
  for (int e = 0; e < V; ++e) mma_f16(sum[e], codes0, ones0, codes1, ones1, two[e].x, two[e].y);
}
// Of vector 2 t + k of an eight, by ones.
template <int V, bool TURNED>
DEV float total_of(const float (&sum)[V][4], int e, int k) {
  return TURNED ? shuffle(sum[0][1 + 2 * e], 4 * (2 * (threadIdx.x % 4) + k)) : sum[e][2 + k];
}
// A result joins the residual stream, and from there the operands of the next product. All lanes come here, 16 with the rows of a vector.
DEV void eight_add(const Eight& p, const Place& place, int entry, int row, int b, bool there, float u, float range) {
  if (there) ((float*)p.out.y)[b * (int)p.out.stride + row] = u;
  if (!p.places) return;
  if (there) put_operand(p.next + b / EIGHT * p.group, p.next2 + b / EIGHT * p.group2, place, b % EIGHT, u * range);
  float squares = there ? u * u : 0.0f;
#pragma unroll
  for (int by = 8; by; by /= 2) squares += shuffle_xor(squares, by);
  if (threadIdx.x % TILE == 0 && b < (int)p.batch) ((float*)p.next_squares)[b * (int)p.n_next + entry] = squares;
}

// CW warps, X words of 32 columns a lane, TW tiles and RW int8 rows (at most 1) a block, P words of a second plane a warp, PM: which
// of the tiles may have the plane. V eights of vectors at once, GROUPS of so many, of which a block takes each SPLIT-th.
template <int CW, int X, int TW, int RW, int P, int PM, bool MASKED, int V, int GROUPS, int SPLIT>
DEV void eight(const Eight& p, u8* smem) {
  static_assert(V <= 2, "the rows of one operand");
  constexpr int VECTORS = V * EIGHT, COLUMNS = 128 * X;
  constexpr int ROUNDS = (TW * TILE * VECTORS + CW * WARP - 1) / (CW * WARP);  // of finishing
  typedef SignTiles<X, TW, P, PM> Tiles;
  constexpr int XP = Tiles::XP, PAIRS = Tiles::PAIRS;
  constexpr int PIECES = 4 * X, PIECES2 = P ? XP * PAIRS / 4 : 0;  // of a lane's operands, and of the plane's
  constexpr u32 ONES = 0x00010001u;
  constexpr bool AHEAD = GROUPS > SPLIT, TURNED = V > 1 && !RW;
  typedef EightShared<CW, TW, PIECES + PIECES2, V, GROUPS, AHEAD> Shared;
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
  const int of = threadIdx.x / TILE % VECTORS;
  int rows[ROUNDS];  // of the matrix, or -1
  Place place[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k) {
    const int i = ((int)threadIdx.x + k * CW * WARP) / (TILE * VECTORS);
    const LeanRows r = lean_rows<SIGN>(m, i < TW ? block + i * blocks : -1);
    const int local = r.local + threadIdx.x % TILE;
    rows[k] = r.there && local < r.rows ? r.first + local : -1;
    if (adds && p.places && rows[k] >= 0) place[k] = load_place(p.places, rows[k]);
  }
  release_next();  // here, behind the weights, or the step takes 4 % longer (docs/log.md)
  await_previous();

  auto ask = [&](int group) {
    const i64 x = p.x + (i64)group * (2 * VECTORS) * m.cols, x2 = p.x2 + (i64)group * (2 * VECTORS) * m.plane_kpad;
    // Steps 3, 2, 7 and 6 of a word come first, which have the odd pieces
#pragma unroll
    for (int first = 1; first >= 0; --first) {
#pragma unroll
      for (int e = 0; e < V; ++e)
#pragma unroll
        for (int i = first; i < PIECES; i += 2) ask_piece(v.warp[warp].x[e][i], x + e * (2 * EIGHT) * m.cols, warp * PIECES + i);
      commit_copies();
    }
#pragma unroll
    for (int e = 0; e < V; ++e)
#pragma unroll
      for (int i = 0; i < PIECES2; ++i)
        ask_piece(v.warp[warp].x[e][PIECES + i], x2 + e * (2 * EIGHT) * m.plane_kpad, warp * PIECES2 + i);
#pragma unroll
    for (int of = warp; of < VECTORS; of += CW)
#pragma unroll
      for (int i = lane; i < EIGHT_SQUARES * WARP; i += WARP)
        if (group * VECTORS + of < batch && 4 * i < (int)p.n_squares) {
          const int n = (int)p.n_squares / 4;
          copy_async(fours + of * n + i, (const uint4*)p.squares + (group * VECTORS + of) * n + i);
        }
    commit_copies();
  };
  int group = SPLIT == 1 ? 0 : blockIdx.y;
  ask(group);

#pragma unroll 1
  do {
    const int first = group * VECTORS, b = first + of;
    if (AHEAD) tiles.refresh_bits();
    if (AHEAD && RW) {
#pragma unroll
      for (int x = 0; x < 2 * X; ++x) {
        uint4& c = codes[x / 2][x % 2];
        refresh(c.x), refresh(c.y), refresh(c.z), refresh(c.w);
      }
    }
    float residual[ROUNDS];
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k)
      residual[k] = adds && rows[k] >= 0 && b < batch ? load_fresh((const float*)p.out.y + b * (int)p.out.stride + rows[k]) : 0.0f;
    constexpr int OWN = (VECTORS + CW - 1) / CW;  // vectors of whose squares a warp takes care: its number and each CW-th
    float scaled[OWN], range[OWN];
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
      const bool sums = warp + k * CW < VECTORS && first + warp + k * CW < batch;
      scaled[k] = p.scale && sums ? load_fresh((const float*)p.scale + first + warp + k * CW) : 1.0f;
      range[k] = p.next_range && sums ? load_fresh((const float*)p.next_range + first + warp + k * CW) : 1.0f;
    }

    float acc[TW][V][4] = {}, more[TW][V][4] = {};
    float both[V][4] = {}, total2[V][4] = {};  // of the int8 row and of ones, for sums of all columns
#pragma unroll
    for (int k = 3; k >= 0; --k) {  // of a word of codes column j counts 2^j if MASKED
      if (k == 3) wait_copies<2>();
      if (k == 1) wait_copies<1>();
#pragma unroll
      for (int x = 0; x < X; ++x)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int step = 4 * half + k;
          uint2 two[V];
#pragma unroll
          for (int e = 0; e < V; ++e) two[e] = *((const uint2*)&v.warp[warp].x[e][4 * x + step / 2][lane] + k % 2);
          u32 a[4];
          if (MASKED || RW) {
            u32 one = 0, other = 0;
            if (RW) code_operand(codes[x], step, one, other);
            if (RW && MASKED) other = add_halves(other, other);
            add_totals<V, TURNED>(both, two, one, other, MASKED ? ONES << 2 * k : 0, MASKED ? ONES << (2 * k + 1) : 0);
          }
#pragma unroll
          for (int i = 0; i < TW; ++i) {
            eight_signs<MASKED>(tiles.bits[i][0][x], tiles.bits[i][1][x], step, a);
#pragma unroll
            for (int e = 0; e < V; ++e) mma_f16(acc[i][e], a[0], a[1], a[2], a[3], two[e].x, two[e].y);
          }
        }
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (RW && MASKED && k) both[e][0] *= 4, both[e][1] *= 4;
    }
    wait_copies<0>();
#pragma unroll
    for (int x = 0; x < (P ? XP : 0); ++x)
#pragma unroll
      for (int step = 0; step < PAIRS / 2; ++step) {
        uint2 two[V];
#pragma unroll
        for (int e = 0; e < V; ++e)
          two[e] = *((const uint2*)&v.warp[warp].x[e][PIECES + x * (PAIRS / 4) + step / 2][lane] + step % 2);
        u32 a[4];
        if (MASKED) add_totals<V, (V > 1)>(total2, two, 0, 0, ONES << 2 * (step % 4), ONES << (2 * (step % 4) + 1));
#pragma unroll
        for (int i = 0; i < TW; ++i) {
          if (!(PM >> i & 1) || !tiles.planes[i]) continue;
          eight_signs<MASKED>(tiles.bits2[i][0][x], tiles.bits2[i][1][x], step, a);
#pragma unroll
          for (int e = 0; e < V; ++e) mma_f16(more[i][e], a[0], a[1], a[2], a[3], two[e].x, two[e].y);
        }
      }
    float squares[OWN] = {};
#pragma unroll
    for (int k = 0; k < OWN; ++k)
#pragma unroll
      for (int i = lane; i < EIGHT_SQUARES * WARP; i += WARP) {
        if (warp + k * CW >= VECTORS || first + warp + k * CW >= batch || 4 * i >= (int)p.n_squares) continue;
        const float4 four = *(const float4*)(fours + (warp + k * CW) * (int)p.n_squares / 4 + i);
        squares[k] += (four.x + four.y) + (four.z + four.w);
      }
    sync_warp();
    if (AHEAD && group + SPLIT < GROUPS) ask(group + SPLIT);
    auto& part = v.sums_of(warp);
    float all[V][2], all2[V][2];  // of vectors 2 t and 2 t + 1
#pragma unroll
    for (int e = 0; e < (MASKED ? V : 0); ++e)
#pragma unroll
      for (int k = 0; k < 2; ++k) all[e][k] = total_of<V, TURNED>(both, e, k), all2[e][k] = total_of<V, (V > 1)>(total2, e, k);
#pragma unroll
    for (int i = 0; i < TW; ++i)
#pragma unroll
      for (int e = 0; e < V; ++e)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float y = tiles.scale[i][k / 2] * (MASKED ? fmaf(2.0f, acc[i][e][k], -all[e][k % 2]) : acc[i][e][k]);
          if (PM >> i & 1) y = fmaf(tiles.scale2[i][k / 2], MASKED ? fmaf(2.0f, more[i][e][k], -all2[e][k % 2]) : more[i][e][k], y);
          part[i][e * EIGHT + 2 * t + k % 2][g + k / 2 * 8] = y;
        }
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (RW && g == 0) v.row8[warp][e * EIGHT + 2 * t] = both[e][0], v.row8[warp][e * EIGHT + 2 * t + 1] = both[e][1];
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
      const int own = warp + k * CW;
      if (own >= VECTORS || first + own >= batch) continue;
      squares[k] = warp_sum(squares[k]);
      const float inverse = p.squares ? fast_rsqrt(squares[k] / (float)m.cols + param_float(p.eps)) : 1.0f;
      if (lane == 0) v.factor[own] = inverse * param_float(p.unit) * fast_reciprocal(scaled[k]), v.range[own] = range[k];
      if (lane == 0 && p.next_scale && block == 0) ((float*)p.next_scale)[first + own] = power_of_two(inverse);
    }
    __syncthreads();

#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      const int i = ((int)threadIdx.x + k * CW * WARP) / (TILE * VECTORS);
      if (i >= TW) break;
      const bool there = rows[k] >= 0 && b < batch;
      float y = 0;
#pragma unroll
      for (int w = 0; w < CW; ++w) y += v.sums_of(w)[i][of][threadIdx.x % TILE];
      y *= v.factor[of];
      if (m.bias && there) y += ((const float*)m.bias)[rows[k]];
      if (adds) eight_add(p, place[k], i * blocks + block, rows[k], b, there, residual[k] + y, v.range[of]);
      else if (there) put_output(p.out, v.rings[b], rows[k], b, y);
    }
    if (RW && warp == CW - 1 && lane < VECTORS && first + lane < batch && codes_row.there) {
      float y = 0;
#pragma unroll
      for (int w = 0; w < CW; ++w) y += v.row8[w][lane];
      const int row = codes_row.first + codes_row.local;
      y *= half_bits_to_float(codes_row.scale[codes_row.local]) * v.factor[lane] * (MASKED ? 1.0f / (1 << 24) : 1.0f);
      if (m.bias) y += ((const float*)m.bias)[row];
      put_output(p.out, v.rings[first + lane], row, first + lane, y);
    }
    if (AHEAD) __syncthreads();
  } while (AHEAD && (group += SPLIT) < GROUPS);
}

// The embedding of each sequence's id as the residual stream and as the first product's operands. A block a sequence.
struct EightEmbed {
  Embed e;
  i64 places, x, x2, squares, n_squares, scale, eps;
  i64 group, group2;  // bytes of eight vectors in x and x2
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
  const i64 x = p.x + b / EIGHT * p.group, x2 = p.x2 + b / EIGHT * p.group2;
  for (int c = threadIdx.x; c < cols; c += THREADS) put_operand(x, x2, load_place(p.places, c), b % EIGHT, u[c] * range);
}
