// Products of signs and int8 rows with a few to some hundred vectors, for the shapes that models have: the weights of a block
// stay in its registers, the vectors pass by, 8 NT at a time, in float16 as slimba_mid_norm leaves them.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_kernels.py.
//
// Rows, columns and the second plane are divided as in dot.cuh: a block has TW tiles of 16 rows and RW int8 rows, a warp 128 X
// columns of them all, lane t of four X words of 32 columns. What slimba_mid_norm calls a pair of columns is a right operand as it
// lies in memory. One barrier an iteration, since partial sums alternate between two places.
template <int CW, int TW, int RW, int NT>
struct StillShared {
  float part[2][CW][TW][TILE][8 * NT + 2];  // rows 2 mod 8 apart: sixteen rows of two vectors lie in different banks
  float row8[2][CW][RW ? RW : 1][8 * NT];
};

// COUNT pairs from memory, one 32-bit word each.
template <int COUNT>
DEV void still_pairs(const u16* from, u32* to) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const uint4 four = load_fresh_four(from + 2 * i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// Parameters as of `dot`; NT eights of vectors at a time.
template <int CW, int X, int TW, int RW, int P, int PM, int NT>
DEV void still(const Mid& p, u8* smem) {
  constexpr int COLUMNS = 128 * X;
  typedef SignTiles<X, TW, P, PM> Tiles;
  constexpr int XP = Tiles::XP, SPAN = Tiles::SPAN, PAIRS = Tiles::PAIRS;
  StillShared<CW, TW, RW, NT>& v = *(StillShared<CW, TW, RW, NT>*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, batch = (int)p.batch;
  const int block = blockIdx.x, blocks = gridDim.x;

  Tiles tiles;
  tiles.load(m);
  uint4 codes[RW ? RW : 1][X][2];  // int8 rows, in lanes g = 0
#pragma unroll
  for (int i = 0; i < RW; ++i) {
    const LeanRows r = lean_rows<INT8>(m, block + i * blocks);
#pragma unroll
    for (int k = 0; k < 2 * X; ++k) {
      const u8* from = r.data + (i64)r.local * r.stride + warp * COLUMNS + (t * X + k / 2) * 32 + k % 2 * 16;
      codes[i][k / 2][k % 2] = r.there && g == 0 ? load_weights(from) : uint4{0, 0, 0, 0};
    }
  }
  i64* rings = (i64*)(smem + sizeof(StillShared<CW, TW, RW, NT>));  // where the convolution's new inputs go
  for (int b = threadIdx.x; b < (p.out.mode == IN_PROJ ? batch : 0); b += CW * WARP) {
    const i64 slot = slot_of(p.state, b);
    rings[b] = (i64)ring_row(p.state, slot, position(p.state, slot));
  }
  release_next();
  await_previous();

#pragma unroll 1
  for (int first = 0, turn = 0; first < batch; first += 8 * NT, turn ^= 1) {
    u32 xs[NT][X][16], xs2[NT][XP][PAIRS];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int b = first + 8 * n + g < batch ? first + 8 * n + g : batch - 1;
#pragma unroll
      for (int x = 0; x < X; ++x)
        still_pairs<16>((const u16*)p.x + b * (int)m.kpad + warp * COLUMNS + (t * X + x) * 32, xs[n][x]);
#pragma unroll
      for (int x = 0; x < (P ? XP : 0); ++x) {
        const int word = warp * P + t % SPAN * XP + x, pair = SPAN < 4 ? t / SPAN * PAIRS : 0;
        still_pairs<PAIRS>((const u16*)p.x2 + b * (int)m.plane_kpad + word * 32 + 2 * pair, xs2[n][x]);
      }
    }
#pragma unroll
    for (int i = 0; i < TW; ++i) {
      if (!tiles.there[i]) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int x = 0; x < X; ++x) refresh(tiles.bits[i][h][x]);
#pragma unroll
        for (int x = 0; x < (PM >> i & 1 ? XP : 0); ++x) refresh(tiles.bits2[i][h][x]);
      }
      float acc[NT][4] = {};
#pragma unroll
      for (int x = 0; x < X; ++x)
#pragma unroll
        for (int jj = 0; jj < 8; ++jj) {
          u32 a[4];
          sign_operand(tiles.bits[i][0][x], tiles.bits[i][1][x], jj, a);
#pragma unroll
          for (int n = 0; n < NT; ++n) mma_f16(acc[n], a[0], a[1], a[2], a[3], xs[n][x][2 * jj], xs[n][x][2 * jj + 1]);
        }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[n][k] *= tiles.scale[i][k / 2];
      if ((PM >> i & 1) && tiles.planes[i]) {
        float more[NT][4] = {};
#pragma unroll
        for (int x = 0; x < XP; ++x)
#pragma unroll
          for (int jj = 0; jj < 2 * SPAN; ++jj) {
            u32 a[4];
            sign_operand(tiles.bits2[i][0][x], tiles.bits2[i][1][x], jj, a);
#pragma unroll
            for (int n = 0; n < NT; ++n) mma_f16(more[n], a[0], a[1], a[2], a[3], xs2[n][x][2 * jj], xs2[n][x][2 * jj + 1]);
          }
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[n][k] = fmaf(more[n][k], tiles.scale2[i][k / 2], acc[n][k]);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          *(float2*)&v.part[turn][warp][i][g + 8 * h][8 * n + 2 * t] = float2{acc[n][2 * h], acc[n][2 * h + 1]};
    }
#pragma unroll
    for (int i = 0; i < RW; ++i) {
      if (!lean_rows<INT8>(m, block + i * blocks).there) continue;
#pragma unroll
      for (int k = 0; k < 2 * X; ++k) {
        uint4& four = codes[i][k / 2][k % 2];
        refresh(four.x), refresh(four.y), refresh(four.z), refresh(four.w);
      }
      float acc[NT][4] = {};
#pragma unroll
      for (int x = 0; x < X; ++x)
#pragma unroll
        for (int jj = 0; jj < 8; ++jj) {
          u32 a0, a2;
          code_operand(codes[i][x], jj, a0, a2);
#pragma unroll
          for (int n = 0; n < NT; ++n) mma_f16(acc[n], a0, 0, a2, 0, xs[n][x][2 * jj], xs[n][x][2 * jj + 1]);
        }
#pragma unroll
      for (int n = 0; n < NT; ++n)
        if (g == 0) *(float2*)&v.row8[turn][warp][i][8 * n + 2 * t] = float2{acc[n][0], acc[n][1]};
    }
    __syncthreads();
    auto put = [&](const LeanRows& r, int b, float y) {  // row r.local of its segment
      const int row = r.first + r.local, lr_row = row - (int)m.lr_start;
      if (m.rank && lr_row >= 0 && row < (int)m.lr_stop) {
        const i8* left = (const i8*)m.lr_a + (i64)lr_row * m.rank;
        const u16* factor = (const u16*)p.factors + (i64)b * m.rank;
        float corrected = 0;
#pragma unroll
        for (int k = 0; k < (int)m.rank; ++k) corrected = fmaf((float)left[k], half_bits_to_float(factor[k]), corrected);
        y = fmaf(half_bits_to_float(((const u16*)m.lr_a_scale)[lr_row]), corrected, y);
      }
      if (m.bias) y += ((const float*)m.bias)[row];
      put_output(p.out, p.out.mode == IN_PROJ ? rings[b] : 0, row, b, y);
    };
#pragma unroll 1
    for (int task = warp; task < TW * 4 * NT; task += CW) {  // sixteen rows of two vectors
      const int i = task / (4 * NT), of = task % (4 * NT) * 2 + lane / 16;
      LeanRows r = lean_rows<SIGN>(m, block + i * blocks);
      r.local += lane % 16;
      if (!r.there || r.local >= r.rows || first + of >= batch) continue;
      float y = 0;
#pragma unroll
      for (int w = 0; w < CW; ++w) y += v.part[turn][w][i][lane % 16][of];
      put(r, first + of, y);
    }
    if (RW && (int)threadIdx.x < RW * 8 * NT) {
      const int i = threadIdx.x / (8 * NT), of = threadIdx.x % (8 * NT);
      const LeanRows r = lean_rows<INT8>(m, block + i * blocks);
      if (r.there && first + of < batch) {
        float y = 0;
#pragma unroll
        for (int w = 0; w < CW; ++w) y += v.row8[turn][w][RW ? i : 0][of];
        put(r, first + of, y * half_bits_to_float(r.scale[r.local]));
      }
    }
  }
}
