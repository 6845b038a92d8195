// What a step of many sequences stores once in KEPT tokens: S <- decay S + u b^T for the 256 rows of a block, in bfloat16 or int8, on the
// tensor cores. Float32 states are stored by store_exact in steps.cu.
//
// KEPT tokens are the columns of the left operand, u in two bfloat16 numbers, and the rows of the right one, whose columns are permuted so
// that a lane's sums are of the entries that it loads. int8: sums are in units of a row's step times its decay, so that codes are added as
// they are; they become floats on the tensor cores too, as float16 numbers of 1024 and more times a matrix of ones on the diagonal.
//
// Naive twin: tests/runtime/numpy_reference.py (mixer2). Tests: tests/runtime/test_cuda_broad_step.py.

// The kept u of a block's channels, a row a token: float32, or bfloat16 with a piece of padding for load_transposed.
template <int TYPE>
struct KeptRows {
  static constexpr int SIZE = TYPE == STATE_F32 ? 4 : 2, PIECES = THREADS * SIZE / 16, STRIDE = THREADS * SIZE + (TYPE == STATE_F32 ? 0 : 16);
};
#define LEAST_UNIT 1e-25f  // of a row: what is left of an older state is lost in less, and its inverse must be a number

// Pairs of kept rows of b as the right operands of store_state, each lane's in fours of words; the j-th row is `now`.
template <int TYPE, int N>
DEV void put_pairs(float* to, const u16* rows, int stride, const float* now, int j) {
  constexpr int E = Stored<TYPE>::E;
  for (int i = threadIdx.x; i < KEPT / 2 * N; i += THREADS) {
    const int pair = i / N, at = i % N, piece = at / E, lane = (piece % 4 * 2 + at % 2) * 4 + pair % 4, eight = piece / 4 * (E / 2) + at % E / 2;
    const u16* b0 = rows + 2 * pair * stride + at;
    const u32 low = b0[0], high = 2 * pair + 1 == j ? float_to_bfloat(now[at]) : b0[stride];
    ((u32*)to)[(eight / 2 * WARP + lane) * 4 + eight % 2 * 2 + pair / 4] = low | high << 16;
  }
}

// The left operand of 16 rows: their u times `since` and `by`, in two numbers each.
DEV void kept_operand(const u8* u, int row0, float2 early, float2 late, const float (&by)[2], u32 (&high)[4], u32 (&low)[4]) {
  const int lane = threadIdx.x % WARP;
  u32 two[4];
  load_transposed(two, (const u16*)(u + (lane / 16 * 8 + lane % 8) * KeptRows<STATE_BF16>::STRIDE) + row0 + lane / 8 % 2 * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 since = i < 2 ? early : late;
    const float v0 = bits_to_float(two[i] << 16) * (since.x * by[i % 2]), v1 = bits_to_float(two[i] & 0xffff0000u) * (since.y * by[i % 2]);
    high[i] = two_bfloats(v0, v1);
    low[i] = two_bfloats(v0 - bits_to_float(high[i] << 16), v1 - bits_to_float(high[i] & 0xffff0000u));
  }
}

// Codes of two rows as floats, by `same`: a lane's part of the ones on the diagonal.
template <int Q, int E>
DEV void code_values(const uint4& above, const uint4& below, u32 same, int q, float (&v)[2][Q][E]) {
#pragma unroll
  for (int i = 0; i < E / 2; ++i) {
    const u32 pick = i % 2 ? 0x4342u : 0x4140u, w0 = word(above, i / 2) ^ 0x80808080u, w1 = word(below, i / 2) ^ 0x80808080u;
    float sum[4];
    mma_f16_8(sum, byte_perm(w0, 0x64646464u, pick), byte_perm(w1, 0x64646464u, pick), same, -(1024.0f + 128.0f));
    v[0][q][2 * i] = sum[0], v[0][q][2 * i + 1] = sum[1], v[1][q][2 * i] = sum[2], v[1][q][2 * i + 1] = sum[3];
  }
}

// The largest magnitude of a row that four lanes share, or NaN.
template <int Q, int E>
DEV float row_most(const float (&v)[Q][E]) {
  float most = v[0][0];
#pragma unroll
  for (int i = 1; i < Q * E; ++i) most = larger_magnitude(most, v[i / E][i % E]);
  most = larger_magnitude(most, shuffle_xor(most, 1));
  return fabsf(larger_magnitude(most, shuffle_xor(most, 2)));
}

// u, since and decay: in shared memory, of the block's rows; decay: with an int8 row's step. open(row, q): its 16 bytes q of lane t.
template <int TYPE, int N, typename Open>
DEV void store_state(const u8* u, const float (&since)[STATE_HEADS][KEPT], const float* decay, const float* b_pairs, Open open, u8* rows, float* scales) {
  constexpr int SIZE = Stored<TYPE>::SIZE, E = Stored<TYPE>::E, Q = N * SIZE / 64;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const float2 early = *(const float2*)&since[warp / 2][2 * t], late = *(const float2*)&since[warp / 2][2 * t + 8];
  const u32 same = g / 2 != t ? 0 : g % 2 ? 0x3c000000u : 0x3c00u;
#pragma unroll 1
  for (int tile = 0; tile < 2; ++tile) {
    const int row = warp * 32 + tile * TILE + g;  // and 8 below
    float unit[2], by[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      unit[h] = decay[row + 8 * h];
      if (TYPE == STATE_INT8 && unit[h] < LEAST_UNIT) unit[h] = LEAST_UNIT;
      by[h] = TYPE == STATE_INT8 ? fast_reciprocal(unit[h]) : 1.0f;
    }
    u32 high[4], low[4];
    kept_operand(u, warp * 32 + tile * TILE, early, late, by, high, low);
    float v[2][Q][E];
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const uint4 above = open(row, q), below = open(row + 8, q);
      if constexpr (TYPE == STATE_INT8) {
        code_values(above, below, same, q, v);
      } else {
        stored_values<TYPE>(above, unit[0], v[0][q]);
        stored_values<TYPE>(below, unit[1], v[1][q]);
      }
    }
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {  // eight columns: those of lane t are its entries e and e + 1
      const int q = i / (E / 2), e = i % (E / 2) * 2;
      const uint4 b = ((const uint4*)b_pairs)[i / 2 * WARP + lane];
      float sum[4] = {v[0][q][e], v[0][q][e + 1], v[1][q][e], v[1][q][e + 1]};
      mma_bf16(sum, low[0], low[1], low[2], low[3], i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
      mma_bf16(sum, high[0], high[1], high[2], high[3], i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
      v[0][q][e] = sum[0], v[0][q][e + 1] = sum[1], v[1][q][e] = sum[2], v[1][q][e + 1] = sum[3];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float to_code = 0;
      if (TYPE == STATE_INT8) {
        const float most = row_most(v[h]);
        const Int8Scale code = int8_scale(float_to_bits(most * unit[h]));
        to_code = code.to_code * unit[h];
        if (t == 0) scales[row + 8 * h] = code.step;
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) ((uint4*)(rows + (row + 8 * h) * N * SIZE))[q * 4 + t] = stored_bits<TYPE>(v[h][q], to_code);
    }
  }
}
