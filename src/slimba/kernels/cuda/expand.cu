// Rows of a packed matrix as float16 (or float32, for checks), in a scratch from which cuBLAS multiplies.
//
// Naive twin: `Matrix.dequantize` of formats/matrix.py. Tests: tests/kernels/test_cuda_kernels.py.
struct Expand {
  Matrix m;
  i64 row0, rows, out, out_stride, plane_inverse;  // plane_inverse int32 [cols]: place of a column in the plane or -1
};

// Eight consecutive columns of a row, starting at 8 * octet, without corrections.
DEV void unpack_octet(const Segment& s, i64 row, int octet, i64 cols, float (&w)[8]) {
  const u8* at = (const u8*)s.data + row * s.stride;
  const i64 c = octet * 8;
  const u16* scales = (const u16*)s.scale;
  if (s.format == SIGN) {
    const float scale = half_bits_to_float(scales[row]);
    const u32 bits = at[octet];
    for (int k = 0; k < 8; ++k) w[k] = bits >> k & 1 ? scale : -scale;
  } else if (s.format == INT8) {
    const float scale = half_bits_to_float(scales[row]);
    const u8* p = at + (c >> 5) * 32 + (octet & 3);
    for (int k = 0; k < 8; ++k) w[k] = scale * (float)(i8)p[k * 4];
  } else if (s.format == INT4) {
    const float scale = half_bits_to_float(scales[row * s.groups + c / 128]);
    const u8* p = at + (c >> 5) * 16 + (octet & 3);
    for (int k = 0; k < 8; ++k) w[k] = scale * (float)((int)((p[k / 2 * 4] >> (k & 1) * 4 & 15) ^ 8) - 8);
  } else {
    for (int k = 0; k < 8; ++k) {
      const i64 i = c + k;
      if (i >= cols) w[k] = 0;
      else if (s.format == F32) w[k] = ((const float*)at)[i];
      else if (s.format == F16) w[k] = half_bits_to_float(((const u16*)at)[i]);
      else w[k] = bfloat_to_float(((const u16*)at)[i]);
    }
  }
}

// What is added to the eight columns w of a row after its format and low rank.
DEV void correct_octet(const Expand& p, i64 row, int c, int count, float (&w)[8]) {
  const Matrix& m = p.m;
  if (m.plane_cols && row >= m.plane_start && row < m.plane_stop) {
    const u8* bits = (const u8*)m.plane_data + (row - m.plane_start) * m.plane_stride;
    const float scale = half_bits_to_float(((const u16*)m.plane_scale)[row - m.plane_start]);
    for (int i = 0; i < count; ++i) {
      const i32 at = ((const i32*)p.plane_inverse)[c + i];
      if (at >= 0) w[i] += bits[at >> 3] >> (at & 7) & 1 ? scale : -scale;
    }
  }
  if (m.col_scale)
    for (int i = 0; i < count; ++i) w[i] *= ((const float*)m.col_scale)[c + i];
}
DEV int segment_at(const Matrix& m, i64 row) {
  int k = 0;
  while (k + 1 < (int)m.segments && row >= m.segment[k + 1].first) ++k;
  return k;
}
DEV float factor_code(const Matrix& m, int r, int col) {  // B dequantised
  const u8* b = (const u8*)m.lr_b + (i64)r * m.kpad;
  const float scale = half_bits_to_float(((const u16*)m.lr_b_scale)[r]);
  return col < (int)m.cols ? scale * (float)(i8)b[slice_at(col) - (col >> 7) * 16] : 0.0f;
}

// Grid: columns in 256s, rows in 64s; lane l of a warp has the columns 8 l .. of eight rows, 8 apart.
// Shared memory: rank * 256 floats.
DEV void expand_float(const Expand& p, float* factors) {
  const Matrix& m = p.m;
  const int octet = blockIdx.x * 32 + threadIdx.x % 32, c = octet * 8;
  for (int i = threadIdx.x; i < (int)m.rank * 256; i += THREADS) factors[i] = factor_code(m, i / 256, blockIdx.x * 256 + i % 256);
  __syncthreads();
  if (c >= (int)m.cols) return;
  const int count = (int)least(8, m.cols - c);
  for (int k = 0; k < 8; ++k) {
    const i64 local = (i64)blockIdx.y * 64 + k * 8 + threadIdx.x / 32, row = p.row0 + local;
    if (local >= p.rows) break;
    const Segment& s = m.segment[segment_at(m, row)];
    float w[8];
    unpack_octet(s, row - s.first, octet, m.cols, w);
    if (m.rank && row >= m.lr_start && row < m.lr_stop) {
      const i8* a = (const i8*)m.lr_a + (row - m.lr_start) * m.rank;
      const float scale = half_bits_to_float(((const u16*)m.lr_a_scale)[row - m.lr_start]);
      for (int i = 0; i < 8; ++i) {
        float sum = 0;
        for (int r = 0; r < (int)m.rank; ++r) sum = fmaf((float)a[r], factors[r * 256 + threadIdx.x % 32 * 8 + i], sum);
        w[i] = fmaf(scale, sum, w[i]);
      }
    }
    correct_octet(p, row, c, count, w);
    for (int i = 0; i < count; ++i) ((float*)p.out)[local * p.out_stride + c + i] = w[i];
  }
}

// Which of eight columns are in the second plane, and the place of the first: those of ascending columns follow each other.
struct ChosenOctet {
  u32 mask;
  int place;
  DEV_MEMBER int rank(int i) const { return count_bits(mask & ((1u << i) - 1)); }
};
DEV ChosenOctet chosen_octet(const Expand& p, int c, int count) {
  ChosenOctet out = {0, 0};
  for (int i = 0; i < count && p.m.plane_cols; ++i) {
    const i32 at = ((const i32*)p.plane_inverse)[c + i];
    if (at >= 0 && !out.mask) out.place = at;
    out.mask |= (at >= 0 ? 1u : 0u) << i;
  }
  return out;
}
// What a sign row is made of at an octet, without its low rank. sign: whether that is all. Only loads: nothing waits yet.
struct OctetBits {
  u32 bits, scale, plane, more, scale2;  // plane: the byte that holds the first chosen column, and the next if needed
  bool sign;
};
DEV OctetBits octet_bits(const Expand& p, int local, int octet, const ChosenOctet& chosen) {
  const Matrix& m = p.m;
  OctetBits out = {0, 0, 0, 0, 0, false};
  if (local >= (int)p.rows || m.col_scale) return out;
  const int row = (int)p.row0 + local;
  const Segment& s = m.segment[segment_at(m, row)];
  if (s.format != SIGN) return out;
  out.sign = true;
  out.bits = ((const u8*)s.data)[(i64)(row - (int)s.first) * s.stride + octet];
  out.scale = ((const u16*)s.scale)[row - (int)s.first];
  const int in_plane = row - (int)m.plane_start;
  if (!chosen.mask || in_plane < 0 || row >= (int)m.plane_stop) return out;
  const u8* from = (const u8*)m.plane_data + (i64)in_plane * m.plane_stride + (chosen.place >> 3);
  out.plane = from[0];
  if ((chosen.place & 7) + count_bits(chosen.mask) > 8) out.more = from[1];
  out.scale2 = ((const u16*)m.plane_scale)[in_plane];
  return out;
}

// Whether the block's 64 rows from `local0` on are signs of one segment without corrections but, for all or none, the second plane.
DEV bool plain_signs(const Expand& p, int local0, int rows) {
  const Matrix& m = p.m;
  if (m.col_scale || (m.cols | p.out_stride) % 8) return false;
  const int row = (int)p.row0 + local0, k = segment_at(m, row);
  if (m.segment[k].format != SIGN || segment_at(m, row + rows - 1) != k) return false;
  const int start = (int)m.plane_start, stop = (int)m.plane_stop;
  return !m.plane_cols || (row >= start && row + rows <= stop) || row + rows <= start || row >= stop;
}

// These rows, the usual ones: addresses are made once, and what becomes of a plane's bits is known for all rows.
DEV void expand_signs(const Expand& p, int local0, int rows) {
  const Matrix& m = p.m;
  const int octet = blockIdx.x * 32 + threadIdx.x % 32, c = octet * 8, warp = threadIdx.x / 32;
  if (c >= (int)m.cols) return;
  const int row = (int)p.row0 + local0 + warp;
  const Segment& s = m.segment[segment_at(m, (int)p.row0 + local0)];
  const int stride = 8 * (int)s.stride, in_plane = row - (int)m.plane_start;
  const u8* bits = (const u8*)s.data + (i64)(row - (int)s.first) * s.stride + octet;
  const u16* scales = (const u16*)s.scale + (row - (int)s.first);
  const bool planes = m.plane_cols && in_plane >= 0 && (int)p.row0 + local0 < (int)m.plane_stop;  // warps agree: plain_signs
  const ChosenOctet chosen = planes ? chosen_octet(p, c, 8) : ChosenOctet{0, 0};
  const int plane_stride = 8 * (int)m.plane_stride;
  const u8* plane = planes ? (const u8*)m.plane_data + (i64)in_plane * m.plane_stride + (chosen.place >> 3) : nullptr;
  const int more = (chosen.place & 7) + count_bits(chosen.mask) > 8 ? 1 : 0;
  u32 own[8], scale[8], two[8], scale2[8];  // all loads before any store
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const bool there = warp + 8 * k < rows;
    own[k] = there ? bits[k * stride] : 0;
    scale[k] = there ? scales[8 * k] * 0x10001u : 0;
    two[k] = scale2[k] = 0;
    if (!planes || !there) continue;
    two[k] = plane[k * plane_stride] | (u32)plane[k * plane_stride + more] << 8;
    scale2[k] = ((const u16*)m.plane_scale)[in_plane + 8 * k] * 0x10001u;
  }
  u32 keep[4];
  int up[8];  // by which a chosen column's bit of the plane comes to the sign of its half
#pragma unroll
  for (int i = 0; i < 8; ++i) up[i] = (i % 2 ? 31 : 15) - ((chosen.place & 7) + chosen.rank(i));
#pragma unroll
  for (int i = 0; i < 4; ++i)
    keep[i] = (chosen.mask >> 2 * i & 1 ? 0xffffu : 0) | (chosen.mask >> (2 * i + 1) & 1 ? 0xffff0000u : 0);
  u16* to = (u16*)p.out + (i64)(local0 + warp) * p.out_stride + c;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (warp + 8 * k >= rows) break;
    const u32 minus = ~own[k], minus2 = ~two[k];
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = scale[k] ^ ((minus << (15 - 2 * i) & 0x8000u) | (minus << (30 - 2 * i) & 0x80000000u));
      if (planes) {
        const u32 low = up[2 * i] < 0 ? minus2 >> -up[2 * i] : minus2 << up[2 * i];
        out[i] = add_halves(out[i], (scale2[k] ^ ((low & 0x8000u) | (minus2 << up[2 * i + 1] & 0x80000000u))) & keep[i]);
      }
    }
    *(uint4*)(to + (i64)(8 * k) * p.out_stride) = uint4{out[0], out[1], out[2], out[3]};
  }
}

// Matrices without a low-rank part: few registers, so that more blocks are under way.
DEV void expand_plain(const Expand& p) {
  const int local0 = (int)blockIdx.y * 64, rows = (int)least(64, p.rows - local0);
  if (plain_signs(p, local0, rows)) return expand_signs(p, local0, rows);
  const Matrix& m = p.m;
  const int octet = blockIdx.x * 32 + threadIdx.x % 32, c = octet * 8, count = (int)least(8, m.cols - c);
  if (c >= (int)m.cols) return;
#pragma unroll 2
  for (int at = threadIdx.x / 32; at < rows; at += THREADS / 32) {
    const i64 row = p.row0 + local0 + at;
    const Segment& s = m.segment[segment_at(m, row)];
    float w[8];
    unpack_octet(s, row - s.first, octet, m.cols, w);
    correct_octet(p, row, c, count, w);
    u16* to = (u16*)p.out + (i64)(local0 + at) * p.out_stride + c;
    if (count == 8 && p.out_stride % 8 == 0)
      *(uint4*)to = uint4{pack_halves(w[0], w[1]), pack_halves(w[2], w[3]), pack_halves(w[4], w[5]), pack_halves(w[6], w[7])};
    else
      for (int i = 0; i < count; ++i) to[i] = float_to_half_bits(w[i]);
  }
}

// The same in float16: the low-rank product is summed in float16, which is what it is rounded to. Shared memory:
// rank * (128 + 64) pairs of halves, B and then A, each of whose entries fills a pair.
DEV void expand_half(const Expand& p, u32* right) {
  const Matrix& m = p.m;
  const int octet = blockIdx.x * 32 + threadIdx.x % 32, c = octet * 8, rank = (int)m.rank;
  u32* left = right + rank * 128;
  for (int i = threadIdx.x; i < rank * 128; i += THREADS) {
    const int col = blockIdx.x * 256 + i % 128 * 2;
    right[i] = pack_halves(factor_code(m, i / 128, col), factor_code(m, i / 128, col + 1));
  }
  for (int i = threadIdx.x; i < rank * 64; i += THREADS) {
    const i64 local = (i64)blockIdx.y * 64 + i / rank, row = p.row0 + local - m.lr_start;
    const bool there = local < p.rows && row >= 0 && row < m.lr_stop - m.lr_start;
    const float a = there ? half_bits_to_float(((const u16*)m.lr_a_scale)[row]) *
                                (float)((const i8*)m.lr_a)[row * rank + i % rank]
                          : 0.0f;
    left[i] = pack_halves(a, a);
  }
  __syncthreads();
  if (c >= (int)m.cols) return;
  const int count = (int)least(8, m.cols - c), warp = threadIdx.x / 32;
  u32 sum[8][4] = {};
#pragma unroll 1
  for (int r0 = 0; r0 < rank; r0 += 8) {
    uint4 b[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) b[r] = *(const uint4*)(right + (r0 + r) * 128 + threadIdx.x % 32 * 4);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const u32* a = left + (k * 8 + warp) * rank + r0;
      const uint4 a0 = *(const uint4*)a, a1 = *(const uint4*)(a + 4);
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[k][i] = fma_halves(word(r < 4 ? a0 : a1, r % 4), word(b[r], i), sum[k][i]);
    }
  }
  const ChosenOctet chosen = chosen_octet(p, c, count);
  OctetBits own[8];  // all loads before any store
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int local = (int)blockIdx.y * 64 + k * 8 + warp;
    own[k] = octet_bits(p, local, octet, chosen);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const i64 local = (i64)blockIdx.y * 64 + k * 8 + warp, row = p.row0 + local;
    if (local >= p.rows) break;
    u32 out[4];
    if (own[k].sign) {
      const u32 scale = own[k].scale * 0x10001u, minus = ~own[k].bits, scale2 = own[k].scale2;
      const u32 plane = (own[k].plane | own[k].more << 8) >> (chosen.place & 7);
      for (int i = 0; i < 4; ++i) {
        out[i] = add_halves(scale ^ ((minus >> 2 * i & 1) << 15 | (minus >> (2 * i + 1) & 1) << 31), sum[k][i]);
        u32 two = 0;  // of the second plane
        for (int h = 0; h < 2; ++h)
          if (chosen.mask >> (2 * i + h) & 1) two |= (scale2 ^ (~plane >> chosen.rank(2 * i + h) & 1) << 15) << 16 * h;
        if (scale2) out[i] = add_halves(out[i], two);
      }
    } else {
      const Segment& s = m.segment[segment_at(m, row)];
      float w[8];
      unpack_octet(s, row - s.first, octet, m.cols, w);
      for (int i = 0; i < 4; ++i) {
        w[2 * i] += low_half(sum[k][i]);
        w[2 * i + 1] += high_half(sum[k][i]);
      }
      correct_octet(p, row, c, count, w);
      for (int i = 0; i < 4; ++i) out[i] = pack_halves(w[2 * i], w[2 * i + 1]);
    }
    u16* to = (u16*)p.out + local * p.out_stride + c;
    if (count == 8 && p.out_stride % 8 == 0) {
      *(uint4*)to = uint4{out[0], out[1], out[2], out[3]};
    } else {
      for (int i = 0; i < count; ++i) to[i] = (u16)(out[i / 2] >> i % 2 * 16);
    }
  }
}

KERNEL(slimba_expand_half, Expand, THREADS) {
  SHARED(smem);
  expand_half(p, (u32*)smem);
}
KERNEL(slimba_expand_plain, Expand, THREADS, 4) { expand_plain(p); }
KERNEL(slimba_expand_float, Expand, THREADS) {
  SHARED(smem);
  expand_float(p, (float*)smem);
}
