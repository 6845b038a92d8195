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
