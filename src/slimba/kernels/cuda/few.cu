// Products of float16, bfloat16 or int8 rows with two to eight vectors, weights as in ring.cuh, vectors as slimba_mid_norm
// leaves them: in natural order for floats, in the order of codes for int8, whose codes become halves in registers.
//
// A vector in float16 is one row of the left operand; times bfloat16 rows it is two, its upper and its lower bits, exactly.
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_stream.py.
#define FEW 8

template <int FORMAT, int CG, int TILES, int LOOP>
struct FewShared {
  static constexpr int STRIDE = 576, ROWS = FORMAT == BF16 ? 16 : FEW;  // bytes of 256 columns of a vector: rows two apart share banks
  u8 x[CG][ROWS][STRIDE];
  float part[LOOP ? 2 : 1][CG][TILES * SLIM * FEW];
  i64 rings[FEW];
};

template <int FORMAT, int CG, int TILES, int GROUP, int DEPTH, int LOOP>
DEV void few(const Mid& p, u8* smem) {
  typedef FewShared<FORMAT, CG, TILES, LOOP> Shared;
  Shared& v = *(Shared*)smem;
  const Segment& s = p.m.segment[0];
  const int lane = threadIdx.x % WARP, cg = threadIdx.x / WARP, g = lane / 4, t = lane % 4, batch = (int)p.batch;
  const int blocks = gridDim.x, rows = (int)s.rows, tiles = (rows + SLIM - 1) / SLIM;
  typedef Ring<FORMAT, GROUP, DEPTH> Weights;
  Weights ring;
  ring.start(s, cg);
  if (p.out.mode == IN_PROJ && (int)threadIdx.x < batch)
    v.rings[threadIdx.x] = (i64)next_ring_row(p.state, threadIdx.x);
  release_next();
  await_previous();
  const u16* x = (const u16*)p.x + cg * 256 + lane * 8;
#pragma unroll
  for (int b = 0; b < FEW; ++b)  // those beyond the batch repeat the last
    copy_async(v.x[cg][b] + lane * 16, x + (b < batch ? b : batch - 1) * (int)p.m.kpad);
  commit_copies();
  wait_copies<0>();
  if constexpr (FORMAT == BF16) {
#pragma unroll
    for (int b = 0; b < FEW; ++b) {
      const uint4 halves = *(const uint4*)(v.x[cg][b] + lane * 16);
      u32 hi[4], lo[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = low_half(word(halves, i)), c = high_half(word(halves, i));
        hi[i] = pack_bfloats(a, c);
        lo[i] = pack_bfloats(a - bits_to_float(hi[i] << 16), c - bits_to_float(hi[i] & 0xffff0000u));
      }
      *(uint4*)(v.x[cg][b] + lane * 16) = uint4{hi[0], hi[1], hi[2], hi[3]};
      *(uint4*)(v.x[cg][b + FEW] + lane * 16) = uint4{lo[0], lo[1], lo[2], lo[3]};
    }
  }
  sync_warp();
#pragma unroll 1
  for (int round = 0; (int)blockIdx.x + round * TILES * blocks < tiles; ++round) {
    float(*parts)[TILES * SLIM * FEW] = v.part[LOOP ? round & 1 : 0];
    int first = 0;
    const auto put = [&](int tile, const float (&acc)[4]) {
      const bool both = FORMAT == BF16;
      const float2 sum = {both ? acc[0] + acc[2] : acc[0], both ? acc[1] + acc[3] : acc[1]};
      *(float2*)(parts[cg] + ((first + tile) * FEW + g) * SLIM + 2 * t) = sum;
    };
    const u8* from = v.x[cg][g];
    const auto multiply = [&](int step, const auto& w, auto& acc) {
      if constexpr (FORMAT == INT8) {
        const u8* at = from + (2 * step + t / 2) * 64 + t % 2 * 16;  // words of codes 4 (t % 2) .. of 32 columns
        const uint4 low = *(const uint4*)at, high = *(const uint4*)(at + 32);
#pragma unroll
        for (int q = 0; q < GROUP; ++q)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const u32 a = word(w[q], 2 * h), b = word(w[q], 2 * h + 1);
            mma_f16(acc[q], word(low, 2 * h), 0, word(low, 2 * h + 1), 0, int8_pair(a, 0), int8_pair(b, 0));
            mma_f16(acc[q], word(high, 2 * h), 0, word(high, 2 * h + 1), 0, int8_pair(a, 4), int8_pair(b, 4));
          }
      } else {
        const uint4 hi = *(const uint4*)(from + step * 64 + t * 16);
        uint4 lo = {0, 0, 0, 0};
        if constexpr (FORMAT == BF16) lo = *(const uint4*)(v.x[cg][g + FEW] + step * 64 + t * 16);
#pragma unroll
        for (int q = 0; q < GROUP; ++q) multiply_floats<FORMAT>(acc[q], hi, lo, w[q]);
      }
    };
#pragma unroll 1
    for (; first < TILES; first += GROUP) ring.template group<float>(multiply, put);
    __syncthreads();
#pragma unroll 1
    for (int o = threadIdx.x; o < TILES * SLIM * FEW; o += CG * WARP) {  // a vector after the other
      const int tile = o / SLIM % TILES, b = o / (SLIM * TILES);
      const int row = ((int)blockIdx.x + (round * TILES + tile) * blocks) * SLIM + o % SLIM;
      if (row >= rows || b >= batch) continue;
      float y = 0;
#pragma unroll
      for (int i = 0; i < CG; ++i) y += parts[i][(tile * FEW + b) * SLIM + o % SLIM];
      if (FORMAT == INT8) y *= half_bits_to_float(((const u16*)s.scale)[row]);
      if (p.m.bias) y += ((const float*)p.m.bias)[row];
      put_output(p.out, v.rings[b], row, b, y);
    }
    if (!LOOP) break;
  }
}
