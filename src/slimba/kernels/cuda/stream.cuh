// A product of float16, bfloat16 or int8 rows with one vector, for the shapes that models have (runtime/backends/
// cuda_stream.py says which): y = W f(norm(x)), weights as in ring.cuh.
//
// What a warp multiplies are its own 256 columns of x, which it normalises and splits by itself: float32 into two halves (times a
// power of two of the warp) or three bfloat16, so that products are as exact as float32; or into slices as in codes.cuh, which
// also transforms and rounds. With floats the norm's sum of squares is added up beside the results, and the only barrier
// of the block is the one before these are added.
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_stream.py.
template <int FORMAT, int CG, int TILES, int ROUND>
struct StreamShared {
  static constexpr bool CODES = FORMAT == INT8;
  static constexpr int SLICES = ROUND ? 1 : 3, STRIDE = 320;  // of codes; free of bank conflicts as they are read
  float turned[CODES ? CG : 1][PIECE_ROOM];
  u8 q[CODES ? CG : 1][SLICES][STRIDE];
  u16 x[CODES ? 1 : CG][3][256];
  float part[2][CG][TILES * SLIM], squares[CG], weighted[CG], top[CG];
};

// A warp's x as halves or bfloat16; what a product of them is to be multiplied by, before the norm. w: the norm's weights.
template <int FORMAT>
DEV float float_input(const float* x, const float4 (&w)[2], u16 (&to)[3][256], float& squares) {
  const int lane = threadIdx.x % WARP;
  float e[8], back = 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 v = load_fresh_quad(x + 128 * h);
    e[4 * h] = v.x, e[4 * h + 1] = v.y, e[4 * h + 2] = v.z, e[4 * h + 3] = v.w;
  }
  float mine = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    mine = fmaf(e[i], e[i], mine);
    const float4& by = w[i / 4];
    e[i] *= i % 4 == 0 ? by.x : i % 4 == 1 ? by.y : i % 4 == 2 ? by.z : by.w;
  }
  squares = warp_sum(mine);
  if (FORMAT == F16) {  // the largest entry to 2^13 .. 2^14
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 bits = float_to_bits(e[i]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    const u32 exponent = warp_max_bits(top) >> 23, up = exponent < 14 ? 253 : 267 - exponent;
    const float by = bits_to_float(up << 23);
    back = bits_to_float((254 - up) << 23);
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] *= by;
  }
#pragma unroll
  for (int part = 0; part < (FORMAT == F16 ? 2 : 3); ++part) {
    u32 two[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      two[i] = FORMAT == F16 ? pack_halves(e[2 * i], e[2 * i + 1]) : pack_bfloats(e[2 * i], e[2 * i + 1]);
      e[2 * i] -= FORMAT == F16 ? low_half(two[i]) : bits_to_float(two[i] << 16);
      e[2 * i + 1] -= FORMAT == F16 ? high_half(two[i]) : bits_to_float(two[i] & 0xffff0000u);
    }
    *(uint2*)(to[part] + lane * 4) = uint2{two[0], two[1]};
    *(uint2*)(to[part] + 128 + lane * 4) = uint2{two[2], two[3]};
  }
  sync_warp();
  return back;
}

// CG warps; TILES of a round in groups, all there are of the block unless LOOP; HW and ROUND as in codes.cuh, for int8 rows.
// done: as in codes.cuh.
template <int FORMAT, int CG, int TILES, int GROUP, int DEPTH, int HW, int ROUND, int LOOP, typename Ready, typename Done = Unchosen>
DEV void stream(const Product& p, u8* smem, Ready ready, Done&& done = {}) {
  typedef StreamShared<FORMAT, CG, TILES, ROUND> Shared;
  constexpr bool CODES = Shared::CODES;
  Shared& v = *(Shared*)smem;
  const Segment& s = p.m.segment[0];
  const int lane = threadIdx.x % WARP, cg = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int blocks = gridDim.x, rows = (int)s.rows, tiles = (rows + SLIM - 1) / SLIM;
  typedef Ring<FORMAT, GROUP, DEPTH> Weights;
  Weights ring;
  ring.start(s, cg);
  const float* norm_weight = (const float*)p.in.weight;
  const int column = cg * 256 + lane * 4;
  float4 quads[1][2];
#pragma unroll
  for (int b = 0; b < 2; ++b) quads[0][b] = norm_weight ? *(const float4*)(norm_weight + column + 128 * b) : float4{1, 1, 1, 1};
  int row = ((int)blockIdx.x + (int)threadIdx.x / SLIM * blocks) * SLIM + (int)threadIdx.x % SLIM;  // that this thread finishes
  bool finishes = (int)threadIdx.x < TILES * SLIM && row < rows;
  float scale = CODES && finishes ? half_bits_to_float(((const u16*)s.scale)[row]) : 1.0f;
  float bias = finishes && p.m.bias ? ((const float*)p.m.bias)[row] : 0.0f;
  const i64 kept = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, 0) : 0;
  ready();
  const float residual = !LOOP && finishes && p.out.mode == ADD ? load_fresh((const float*)p.out.y + row) : 0.0f;
  float by = 1;
  if constexpr (CODES) {
    by = codes_input<FORMAT, CG, 1, HW, ROUND>(p, quads, v);
  } else {
    float squares;
    by = float_input<FORMAT>((const float*)p.in.x + column, quads[0], v.x[cg], squares);
    if (lane == 0) v.squares[cg] = squares;
  }
  const u8* slice = v.q[CODES ? cg : 0][g < v.SLICES ? g : v.SLICES - 1] + t * 16;
  const float of_slice = ROUND ? 1.0f : g == 0 ? 65536.0f : g == 1 ? 256.0f : g == 2 ? 1.0f : 0.0f;
  // the parts of x are rows 0, 8 and 4 of the left operand; the others repeat them and are not looked at
  const u16 *hi = v.x[CODES ? 0 : cg][FORMAT == BF16 && g >= 4 ? 2 : 0] + t * 8, *lo = v.x[CODES ? 0 : cg][1] + t * 8;
#pragma unroll 1
  for (int round = 0; (int)blockIdx.x + round * TILES * blocks < tiles; ++round) {
#pragma unroll 1
    for (int first = 0; first < TILES; first += GROUP) {
      float* part = v.part[round & 1][cg] + first * SLIM + 2 * t;
      if constexpr (CODES) {
        ring.template group<int>(
            [&](int step, const auto& w, auto& acc) {
              const uint4 x = *(const uint4*)(slice + step * 64);
#pragma unroll
              for (int q = 0; q < GROUP; ++q) {
                mma_s8s8(acc[q], x.x, 0, x.y, 0, w[q].x, w[q].y);
                mma_s8s8(acc[q], x.z, 0, x.w, 0, w[q].z, w[q].w);
              }
            },
            [&](int tile, const int (&acc)[4]) {
              float sum[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                sum[i] = (float)acc[i] * of_slice;
                if (!ROUND) sum[i] += shuffle_xor(sum[i], 4), sum[i] += shuffle_xor(sum[i], 8);
              }
              if (g == 0) *(float2*)(part + tile * SLIM) = float2{sum[0], sum[1]};
            });
      } else {
        ring.template group<float>(
            [&](int step, const auto& w, auto& acc) {
              const uint4 x0 = *(const uint4*)(hi + step * 32), x1 = *(const uint4*)(lo + step * 32);
#pragma unroll
              for (int q = 0; q < GROUP; ++q) multiply_floats<FORMAT>(acc[q], x0, x1, w[q]);
            },
            [&](int tile, const float (&acc)[4]) {
              float sum[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) sum[i] = acc[i] + acc[2 + i] + (FORMAT == BF16 ? shuffle_xor(acc[i], 16) : 0.0f);
              if (g == 0) *(float2*)(part + tile * SLIM) = float2{sum[0] * by, sum[1] * by};
            });
      }
    }
    __syncthreads();
    if (finishes) {
      float y = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < CG; ++i) y += v.part[round & 1][i][threadIdx.x];
      if (CODES) {
        y *= by * scale;
      } else if (p.in.groups) {
#pragma unroll
        for (int i = 0; i < CG; ++i) squares += v.squares[i];
        y *= fast_rsqrt(squares / (float)p.m.cols + param_float(p.in.eps));
      }
      y += bias;
      if (!LOOP && p.out.mode == ADD) ((float*)p.out.y)[row] = residual + y;
      else put_output(p.out, kept, row, 0, y);
      done(row, y);
    }
    if (!LOOP) break;
    row += TILES * blocks * SLIM;
    finishes = (int)threadIdx.x < TILES * SLIM && row < rows;
    scale = CODES && finishes ? half_bits_to_float(((const u16*)s.scale)[row]) : 1.0f;
    bias = finishes && p.m.bias ? ((const float*)p.m.bias)[row] : 0.0f;
  }
}
