// Rows of a matrix as the kernels for usual shapes want them: where a tile lies, its words of signs, and signs and codes as the
// left operands of float16 products.
// Sign tile `at` of a matrix, or int8 row `at`: where its first row lies.
struct LeanRows {
  const u8* data;
  const u16* scale;
  int stride, local, rows, first;  // local: in the segment
  bool there;
};
template <int FORMAT>
DEV LeanRows lean_rows(const Matrix& m, int at) {
  LeanRows out = {nullptr, nullptr, 0, 0, 0, 0, false};
#pragma unroll
  for (int k = 0; k < MAX_SEGMENTS; ++k) {
    if (k >= (int)m.segments || m.segment[k].format != FORMAT) continue;
    const Segment& s = m.segment[k];
    const int each = FORMAT == SIGN ? TILE : 1, count = ((int)s.rows + each - 1) / each;
    if (at >= 0 && at < count) out = {(const u8*)s.data, (const u16*)s.scale, (int)s.stride, at * each, (int)s.rows, (int)s.first, true};
    at -= count;
  }
  return out;
}

DEV float power_of_two(float v) { return bits_to_float(float_to_bits(v) & 0x7f800000u); }  // not above v

template <int N>
DEV void load_words(bool there, const u32* from, u32 (&to)[N]) {
  if constexpr (N == 4) {
    const uint4 four = there ? *(const uint4*)from : uint4{0, 0, 0, 0};
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else if constexpr (N == 2) {
    const uint2 two = there ? *(const uint2*)from : uint2{0, 0};
    to[0] = two.x, to[1] = two.y;
  } else {
    to[0] = there ? *from : 0;
  }
}

DEV void sign_operand(u32 w0, u32 w1, int jj, u32 (&a)[4]) {
  a[0] = sign_pair(w0, 15 - 2 * jj), a[1] = sign_pair(w1, 15 - 2 * jj);
  a[2] = sign_pair(w0, 14 - 2 * jj), a[3] = sign_pair(w1, 14 - 2 * jj);
}
DEV void code_operand(const uint4 (&q)[2], int jj, u32& first, u32& second) {
  const int j = 2 * jj % 8;
  first = int8_pair(word(q[j / 4], j % 4), jj), second = int8_pair(word(q[j / 4], j % 4 + 1), jj);
}

// What still.cu and eight.cuh have of a block's tiles of signs before there is anything to multiply: tile i is number blockIdx.x +
// i gridDim.x of the matrix; a warp's 128 X columns, lane t of four X words of them; P words of a second plane a warp, PM: which of the
// tiles may have it.
template <int X, int TW, int P, int PM>
struct SignTiles {
  static constexpr int XP = P > 4 ? P / 4 : 1, SPAN = P > 4 ? 4 : P ? P : 1, PAIRS = 4 * SPAN;  // of a lane's word of the plane
  u32 bits[TW][2][X], bits2[TW][2][XP];  // rows g and g + 8
  float scale[TW][2], scale2[TW][2];
  bool there[TW], planes[TW];

  DEV_MEMBER void refresh_bits() {  // for another product, or the operands made of them would be kept
#pragma unroll
    for (int i = 0; i < 2 * TW; ++i) {
#pragma unroll
      for (int x = 0; x < X; ++x) refresh(bits[i / 2][i % 2][x]);
#pragma unroll
      for (int x = 0; x < (PM >> i / 2 & 1 ? XP : 0); ++x) refresh(bits2[i / 2][i % 2][x]);
    }
  }
  DEV_MEMBER void load(const Matrix& m) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int plane_rows = (int)(m.plane_stop - m.plane_start);
#pragma unroll
    for (int i = 0; i < TW; ++i) {
      const LeanRows r = lean_rows<SIGN>(m, (int)blockIdx.x + i * (int)gridDim.x);
      there[i] = r.there;
      const int in_plane = r.first + r.local - (int)m.plane_start;
      planes[i] = (PM >> i & 1) && r.there && in_plane + TILE > 0 && in_plane < plane_rows;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = r.local + g + 8 * h, at = in_plane + g + 8 * h;
        const bool is_row = r.there && row < r.rows, in = planes[i] && is_row && at >= 0 && at < plane_rows;
        load_words<X>(is_row, (const u32*)(r.data + (i64)row * r.stride + warp * (16 * X)) + t * X, bits[i][h]);
        scale[i][h] = is_row ? half_bits_to_float(r.scale[row]) : 0.0f;
        if (!(PM >> i & 1)) continue;
        const u32* plane = (const u32*)((const u8*)m.plane_data + (i64)at * m.plane_stride) + warp * P + t % SPAN * XP;
        load_words<XP>(in, plane, bits2[i][h]);
        if (SPAN < 4) bits2[i][h][0] >>= t / SPAN * PAIRS;
        scale2[i][h] = in ? half_bits_to_float(((const u16*)m.plane_scale)[at]) : 0.0f;
      }
    }
  }
};
