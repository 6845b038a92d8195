// A product of int4 or int8 codes with one vector that may be transformed and rounded, for the shapes that models have
// (runtime/backends/cuda_codes.py says which): y = W f(norm(x)).
//
// A warp owns one or more pieces of 256 columns and multiplies all tiles of the block by them, and everything that the input
// does not decide is in registers before `ready`, or on its way to shared memory: with int4 all weights of a projection. All blocks read the same
// vector, so it comes by 16 bytes a lane: two bits of the column and the last one in a lane's registers, the others in its
// number, and the transform of a piece is additions and shuffles. Blocks of several pieces go on in shared memory, where
// each lane finds the columns of the words that it fills afterwards. The fixed point of matrix.cuh takes the
// length of the vector for its largest entry, which needs no look at the transformed ones. Rounded vectors are one slice.
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_turn.py.
#define PIECE 256
#define PIECE_ROOM 320  // floats, 8 more after each 32: free of bank conflicts, by lanes and by words
DEV int padded(int column) { return column + column / 32 * 8; }

template <int FORMAT, int CG, int PIECES, int TW, int ROUND>
struct CodesShared {
  static constexpr int SLICES = ROUND ? 1 : 3, STRIDE = FORMAT == INT4 ? 272 : 320;  // free of bank conflicts as they are read
  float turned[CG * PIECES][PIECE_ROOM];
  u8 q[CG * PIECES][SLICES][STRIDE];
  float part[2][TW * TILE][CG | 1], squares[CG], weighted[CG], top[CG];
};

// Stages 1 to 128 of the transform over a warp's 256 columns.
DEV void turn_warp(float (&e)[8]) {
  const int lane = threadIdx.x % WARP;
  auto across = [&](int step) {
    const float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = fmaf(e[i], sign, shuffle_xor(e[i], step));
  };
  butterfly(e, 1);
  butterfly(e, 2);
  across(1);
  across(2);
  across(4);
  across(8);
  across(16);
  butterfly(e, 4);
}

// The other stages, over HW pieces, of what lies in `turned`; ends with a barrier.
template <int CG, int PIECES, int HW>
DEV void turn_pieces(float* turned, float root) {
#pragma unroll 1
  for (int unit = threadIdx.x; unit < PIECE * (CG * PIECES / HW); unit += CG * WARP) {
    float v[HW], *at = turned + unit / PIECE * (HW * PIECE_ROOM) + padded(unit % PIECE);
#pragma unroll
    for (int i = 0; i < HW; ++i) v[i] = at[i * PIECE_ROOM];
#pragma unroll
    for (int step = 1; step < HW; step *= 2) butterfly(v, step);
#pragma unroll
    for (int i = 0; i < HW; ++i) at[i * PIECE_ROOM] = v[i] * root;
  }
  __syncthreads();
}

// Codes of TW tiles over a piece, and of int4 the scales of rows g and g + 8, two groups each.
template <int FORMAT, int TW>
struct CodesRaw {
  static constexpr int STEPS = FORMAT == INT4 ? 2 : 4;
  uint4 row[TW][2][STEPS];
  u32 scale[TW][2];
};
// staged: where the codes go instead, a thread's own in shared memory, `stride` apart.
template <int FORMAT, int TW, int STAGED>
DEV void load_codes(const Segment& s, int tile0, int blocks, int piece, CodesRaw<FORMAT, TW>& out, uint4* staged,
                    int stride) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < TW; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = (tile0 + i * blocks) * TILE + g + 8 * h;
      const bool there = row < (int)s.rows;
      const u8* from = (const u8*)s.data + (i64)row * s.stride + piece * (64 * out.STEPS) + t * 16;
#pragma unroll
      for (int k = 0; k < out.STEPS; ++k) {
        if (!STAGED) out.row[i][h][k] = there ? load_weights(from + k * 64) : uint4{0, 0, 0, 0};
        else if (there) copy_async(staged + ((i * 2 + h) * out.STEPS + k) * stride, from + k * 64);
      }
      if (FORMAT == INT4) out.scale[i][h] = there ? ((const u32*)s.scale)[row * ((int)s.groups / 2) + piece] : 0;
    }
}

// To `sum`, what a piece adds to a tile's rows g and g + 8 in the slices of this lane. x: the lane's parts of its slice.
template <int FORMAT, int TW, int ROUND>
DEV void codes_tile(const CodesRaw<FORMAT, TW>& w, int i, const uint4 (&x)[4], float (&sum)[2]) {
  const u32 high = 0xf0f0f0f0u;
  auto whole = [&](const int (&acc)[4], int h) {  // of the slices that this lane has of row g + 8 h
    if (ROUND) return (float)acc[2 * h];
    return threadIdx.x % 4 ? (float)acc[2 * h] : fmaf((float)acc[2 * h], 65536.0f, 256.0f * (float)acc[2 * h + 1]);
  };
  if (FORMAT == INT4) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      int acc[4] = {};  // 16 times the sums
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const u32 a = word(w.row[i][0][step], k), b = word(w.row[i][1][step], k);
        const uint4& at = x[2 * step + k / 2];
        mma_s8s8(acc, a << 4 & high, b << 4 & high, a & high, b & high, word(at, k % 2 * 2), word(at, k % 2 * 2 + 1));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 scale = w.scale[i][h];
        sum[h] = fmaf(step ? high_half(scale) : low_half(scale), whole(acc, h), sum[h]);
      }
    }
  } else {
    int acc[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 a = w.row[i][0][k % CodesRaw<FORMAT, TW>::STEPS], b = w.row[i][1][k % CodesRaw<FORMAT, TW>::STEPS];
      mma_s8s8(acc[0], a.x, b.x, a.y, b.y, x[k].x, x[k].y);
      mma_s8s8(acc[1], a.z, b.z, a.w, b.w, x[k].z, x[k].w);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) acc[0][n] += acc[1][n];
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] += whole(acc[0], h);
  }
}

// The block's x to slices in shared memory; what a product of them is to be multiplied by. w: the norm's weights.
template <int FORMAT, int CG, int PIECES, int HW, int ROUND, typename Shared>
DEV float codes_input(const Product& p, const float4 (&w)[PIECES][2], Shared& v) {
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, cg = threadIdx.x / WARP;
  const float root = HW ? 1.0f / sqrtf((float)PIECE * HW) : 1.0f;
  float e[PIECES][8], squares = 0, weighted = 0;
#pragma unroll
  for (int k = 0; k < PIECES; ++k)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 four = load_fresh_quad((const float*)p.in.x + (cg * PIECES + k) * PIECE + j * 128 + lane * 4);
      e[k][4 * j] = four.x, e[k][4 * j + 1] = four.y, e[k][4 * j + 2] = four.z, e[k][4 * j + 3] = four.w;
    }
#pragma unroll
  for (int k = 0; k < PIECES; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4& of = w[k][i / 4];
      squares = fmaf(e[k][i], e[k][i], squares);
      e[k][i] *= i % 4 == 0 ? of.x : i % 4 == 1 ? of.y : i % 4 == 2 ? of.z : of.w;
      weighted = fmaf(e[k][i], e[k][i], weighted);
    }
    if (HW) turn_warp(e[k]);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      *(float4*)(v.turned[cg * PIECES + k] + padded(j * 128 + lane * 4)) =
          float4{e[k][4 * j], e[k][4 * j + 1], e[k][4 * j + 2], e[k][4 * j + 3]};
  }
  squares = warp_sum(squares);
  weighted = warp_sum(weighted);
  if (lane == 0) v.squares[cg] = squares, v.weighted[cg] = weighted;
  __syncthreads();
  squares = weighted = 0;
#pragma unroll
  for (int i = 0; i < CG; ++i) squares += v.squares[i], weighted += v.weighted[i];
  if (HW > 1) turn_pieces<CG, PIECES, HW ? HW : 1>(&v.turned[0][0], root);
  const int first = lane / 4 * 40 + lane % 4 * 2;  // padded: column lane / 4 * 32 + lane % 4 * 2; then 8, 16, 24 further
#pragma unroll
  for (int k = 0; k < PIECES; ++k)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float2 two = *(const float2*)(v.turned[cg * PIECES + k] + first + 8 * b);
      e[k][2 * b] = HW == 1 ? two.x * root : two.x, e[k][2 * b + 1] = HW == 1 ? two.y * root : two.y;
    }
  const float norm = p.in.groups ? fast_rsqrt(squares / (float)m.cols + param_float(p.in.eps)) : 1.0f;
  const bool damaged = !(weighted < bits_to_float(INF_BITS));
  float to_fixed = 0, unit = 0;
  if (ROUND) {
    u32 top = 0;
    if (ROUND == ROUND_TOKEN) {
#pragma unroll
      for (int i = 0; i < 8 * PIECES; ++i) {
        const u32 bits = float_to_bits(e[i / 8][i % 8]) & 0x7fffffffu;
        top = bits > top ? bits : top;
      }
      top = warp_max_bits(top);
      if (lane == 0) v.top[cg] = bits_to_float(top);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < CG; ++i) top = float_to_bits(v.top[i]) > top ? float_to_bits(v.top[i]) : top;
    }
    const CodeScale code = code_scale(ROUND, top, m.input_step);
    to_fixed = ROUND == ROUND_FIXED ? code.to_code * norm : code.to_code;
    unit = ROUND == ROUND_FIXED ? code.step : code.step * norm;
  } else if (weighted > 0) {
    to_fixed = LIMIT * fast_rsqrt(weighted);
    unit = norm * fast_reciprocal(to_fixed);
  }
  if (damaged) to_fixed = 0, unit = bits_to_float(0x7fc00000u);
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece) {
    u32 d[2][3];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int fixed[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float of = damaged ? 0.0f : e[piece][2 * b + k];
        fixed[b] = ROUND ? (int)code_of(of, to_fixed) : __float2int_rn(of * to_fixed);
      }
      if (ROUND) d[k][0] = (u32)(u8)fixed[0] | (u32)(u8)fixed[1] << 8 | (u32)(u8)fixed[2] << 16 | (u32)(u8)fixed[3] << 24;
      else slice_words(fixed, d[k]);
    }
#pragma unroll
    for (int s = 0; s < v.SLICES; ++s) *(uint2*)(v.q[cg * PIECES + piece][s] + lane * 8) = uint2{d[0][s], d[1][s]};
  }
  sync_warp();
  return FORMAT == INT4 ? unit / 16 : unit;
}

// CG warps of PIECES x 256 columns; TW tiles at a time, all there are of the block unless LOOP; HW pieces of a block of the
// transform, 0 for none; STAGED: codes wait in shared memory, not in registers. done: is told each row's number and value by
// the thread that finishes it.
template <int FORMAT, int CG, int PIECES, int TW, int HW, int ROUND, int LOOP, int STAGED, typename Ready,
          typename Done = Unchosen>
DEV void codes(const Product& p, u8* smem, Ready ready, Done&& done = {}) {
  typedef CodesShared<FORMAT, CG, PIECES, TW, ROUND> Shared;
  Shared& v = *(Shared*)smem;
  const Matrix& m = p.m;
  const Segment& s = m.segment[0];
  const int lane = threadIdx.x % WARP, cg = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x, blocks = gridDim.x, rows = (int)s.rows, tiles = (rows + TILE - 1) / TILE;
  constexpr int SLOTS = 2 * CodesRaw<FORMAT, TW>::STEPS, STRIDE = CG * WARP;  // of a tile and piece
  uint4* staged = (uint4*)(smem + (sizeof(Shared) + 15) / 16 * 16) + threadIdx.x;
  CodesRaw<FORMAT, TW> raw[PIECES], next[PIECES];
#pragma unroll
  for (int k = 0; k < PIECES; ++k)
    load_codes<FORMAT, TW, STAGED>(s, block, blocks, cg * PIECES + k, raw[k], staged + k * TW * SLOTS * STRIDE, STRIDE);
  if (STAGED) commit_copies();
  float4 w[PIECES][2];
#pragma unroll
  for (int k = 0; k < 2 * PIECES; ++k) {
    const float* weight = (const float*)p.in.weight + cg * (PIECES * PIECE) + k * 128 + lane * 4;
    w[k / 2][k % 2] = p.in.weight ? *(const float4*)weight : float4{1, 1, 1, 1};
  }
  const int unit = (int)threadIdx.x / TILE;  // the tile of the row that this thread finishes
  int row = (block + unit * blocks) * TILE + (int)threadIdx.x % TILE;
  bool finishes = unit < TW && row < rows;
  float scale = FORMAT == INT8 && finishes ? half_bits_to_float(((const u16*)s.scale)[row]) : 1.0f;
  float bias = finishes && m.bias ? ((const float*)m.bias)[row] : 0.0f;
  const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, 0) : 0;
  ready();
  const float residual = !LOOP && finishes && p.out.mode == ADD ? load_fresh((const float*)p.out.y + row) : 0.0f;
  const float by = codes_input<FORMAT, CG, PIECES, HW, ROUND>(p, w, v);
  const int slice = g < v.SLICES ? g : v.SLICES - 1;
  uint4 x[PIECES][4];
#pragma unroll
  for (int i = 0; i < 4 * PIECES; ++i)
    x[i / 4][i % 4] = *(const uint4*)(v.q[cg * PIECES + i / 4][slice] +
                                      (FORMAT == INT4 ? i % 4 / 2 * 128 + t * 32 + i % 2 * 16 : i % 4 * 64 + t * 16));
  if (STAGED) wait_copies<0>();
#pragma unroll 1
  for (int round = 0; block + round * TW * blocks < tiles; ++round) {
    const int tile0 = block + round * TW * blocks;
    if (LOOP)
#pragma unroll
      for (int k = 0; k < PIECES; ++k)
        load_codes<FORMAT, TW, 0>(s, tile0 + TW * blocks, blocks, cg * PIECES + k, next[k], staged, 0);
    float(*part)[CG | 1] = v.part[round & 1];
#pragma unroll
    for (int i = 0; i < TW; ++i) {
      if (tile0 + i * blocks >= tiles) break;
      float sum[2] = {};
#pragma unroll
      for (int k = 0; k < PIECES; ++k) {
        if (STAGED)
#pragma unroll
          for (int j = 0; j < SLOTS; ++j)
            raw[k].row[i][j / (SLOTS / 2)][j % (SLOTS / 2)] = staged[((k * TW + i) * SLOTS + j) * STRIDE];
        codes_tile<FORMAT, TW, ROUND>(raw[k], i, x[k], sum);
      }
      if (!ROUND)
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[h] += shuffle_xor(sum[h], 1);
      if (t == 0) part[i * TILE + g][cg] = sum[0], part[i * TILE + g + 8][cg] = sum[1];
    }
    __syncthreads();
    if (finishes) {
      float y = 0;
#pragma unroll
      for (int i = 0; i < CG; ++i) y += part[threadIdx.x][i];
      y = fmaf(y, by * scale, bias);
      if (!LOOP && p.out.mode == ADD) ((float*)p.out.y)[row] = residual + y;
      else put_output(p.out, ring, row, 0, y);
      done(row, y);
    }
    if (!LOOP) break;
#pragma unroll
    for (int k = 0; k < PIECES; ++k) raw[k] = next[k];
    row += TW * blocks * TILE;
    finishes = unit < TW && row < rows;
    scale = FORMAT == INT8 && finishes ? half_bits_to_float(((const u16*)s.scale)[row]) : 1.0f;
    bias = finishes && m.bias ? ((const float*)m.bias)[row] : 0.0f;
  }
}
