// Tiles of 16 rows on the tensor cores: signs, int8 and int4 codes against the slices of matrix.cuh.
//
// A step reads 64 bytes of each row, 16 a lane: 512 columns of signs, 128 of int4, 64 of int8. Lane 4 g + t holds bytes
// 16 t .. of rows g and g + 8. Steps kw, kw + split, ... are this warp's share. Sums go to red[TILE][3 NB]: integers, and
// for int4, whose groups of 128 columns have a scale each, floats.
// With NB = 1 the slices of the token are the columns of the product; else a product a slice, with tokens as columns.

struct TileRows {  // rows row0 .. row0 + 15 of a block of `rows`; those outside it count as zeros
  const u8* data;
  int stride, row0, rows, steps;
};

DEV void load_tile(const TileRows& r, int kw, int split, int block, uint4 (&raw)[RAW]) {
  const int lane = threadIdx.x % WARP, row = r.row0 + lane / 4;
  const u8* at = r.data + (i64)row * r.stride + lane % 4 * 16;
#pragma unroll
  for (int i = 0; i < RAW / 2; ++i) {
    const int step = kw + split * (block * (RAW / 2) + i);
    const bool there = step < r.steps;
    raw[2 * i] = there && row >= 0 && row < r.rows ? load_weights(at + step * 64) : uint4{0, 0, 0, 0};
    raw[2 * i + 1] =
        there && row + 8 >= 0 && row + 8 < r.rows ? load_weights(at + step * 64 + 8 * r.stride) : uint4{0, 0, 0, 0};
  }
}

// 16 bytes of slice n at byte `at`. NB 1: of slice g; lanes beyond take the last, their columns are never looked at.
template <int NB>
DEV uint4 slice_bytes(const u8* q, int stride, int n, int at) {
  const int g = threadIdx.x % WARP / 4;
  return *(const uint4*)(q + (NB == 1 ? (g < 3 ? g : 2) : n * NB + g) * stride + at);
}

template <int NB, typename T>
DEV void put_tile(const T (&sum)[4], int n, T* red) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int column = 2 * t + (k & 1);
    T* row = red + (g + (k >> 1) * 8) * 3 * NB;
    if (NB > 1) row[n * NB + column] = sum[k];
    else if (column < 3) row[column] = sum[k];
  }
}

// `loaded`: the first block of this share is in raw already.
template <int NB>
DEV void sign_tile(const TileRows& r, int kw, int split, uint4 (&raw)[RAW], bool loaded, const u8* q, int stride, int* red) {
  constexpr int SUMS = NB == 1 ? 8 : 3;  // NB 1: one a bit position, so that masked bits need no shift
  const int t = threadIdx.x % 4;
  int acc[SUMS][4] = {};
#pragma unroll 1
  for (int block = 0; kw + split * (RAW / 2) * block < r.steps; ++block) {
    if (block || !loaded) load_tile(r, kw, split, block, raw);
#pragma unroll
    for (int i = 0; i < RAW / 2; ++i) {
      const int step = kw + split * (block * (RAW / 2) + i);
      if (step >= r.steps) break;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const u32 w0 = word(raw[2 * i], 2 * pair), w1 = word(raw[2 * i], 2 * pair + 1);
        const u32 u0 = word(raw[2 * i + 1], 2 * pair), u1 = word(raw[2 * i + 1], 2 * pair + 1);
#pragma unroll
        for (int n = 0; n < (NB == 1 ? 1 : 3); ++n) {
          uint4 lo[2], hi[2];
          for (int k = 0; k < 2; ++k) {
            lo[k] = slice_bytes<NB>(q, stride, n, (step * 4 + t) * 144 + pair * 64 + k * 16);
            hi[k] = slice_bytes<NB>(q, stride, n, (step * 4 + t) * 144 + pair * 64 + 32 + k * 16);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const u32 b0 = word(lo[j / 4], j % 4), b1 = word(hi[j / 4], j % 4);
            const u32 mask = NB == 1 ? 0x01010101u << j : 0x01010101u;
            const int by = NB == 1 ? 0 : j;
            mma_u8s8(acc[NB == 1 ? j % SUMS : n], w0 >> by & mask, u0 >> by & mask, w1 >> by & mask, u1 >> by & mask, b0, b1);
          }
        }
      }
    }
  }
  if (NB == 1) {
    int sum[4] = {0, 0, 0, 0};
    for (int j = 0; j < SUMS; ++j)
      for (int k = 0; k < 4; ++k) sum[k] += acc[j][k] >> j;
    put_tile<NB>(sum, 0, red);
  } else {
    for (int n = 0; n < 3; ++n) put_tile<NB>(acc[n % SUMS], n, red);
  }
}

template <int NB>
DEV void int8_tile(const TileRows& r, int kw, int split, uint4 (&raw)[RAW], bool loaded, const u8* q, int stride, int* red) {
  constexpr int SUMS = NB == 1 ? 1 : 3;
  const int t = threadIdx.x % 4;
  int acc[SUMS][4] = {};
#pragma unroll 1
  for (int block = 0; kw + split * (RAW / 2) * block < r.steps; ++block) {
    if (block || !loaded) load_tile(r, kw, split, block, raw);
#pragma unroll
    for (int i = 0; i < RAW / 2; ++i) {
      const int step = kw + split * (block * (RAW / 2) + i), at = step * 64 + t * 16;
      if (step >= r.steps) break;
      const uint4 a = raw[2 * i], b = raw[2 * i + 1];
#pragma unroll
      for (int n = 0; n < SUMS; ++n) {
        const uint4 x = slice_bytes<NB>(q, stride, n, at + (at >> 7) * 16);
        mma_s8s8(acc[n], a.x, b.x, a.y, b.y, x.x, x.y);
        mma_s8s8(acc[n], a.z, b.z, a.w, b.w, x.z, x.w);
      }
    }
  }
  for (int n = 0; n < SUMS; ++n) put_tile<NB>(acc[n], n, red);
}

// Codes are nibbles in two's complement, low ones first, and multiplied as the high halves of bytes; `scales` are those of row0, `groups` a row.
template <int NB>
DEV void int4_tile(const TileRows& r, int kw, int split, uint4 (&raw)[RAW], bool loaded, const u16* scales, int groups,
                   const u8* q, int stride, float* red) {
  constexpr int SUMS = NB == 1 ? 1 : 3;
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u16* scale0 = scales + (r.row0 + g < r.rows ? g : 0) * groups;
  const u16* scale1 = scales + (r.row0 + g + 8 < r.rows ? g + 8 : 0) * groups;
  float sum[SUMS][4] = {};
#pragma unroll 1
  for (int block = 0; kw + split * (RAW / 2) * block < r.steps; ++block) {
    if (block || !loaded) load_tile(r, kw, split, block, raw);
#pragma unroll
    for (int i = 0; i < RAW / 2; ++i) {
      const int step = kw + split * (block * (RAW / 2) + i);
      if (step >= groups) break;  // beyond the last group there is only padding
      const float s0 = half_bits_to_float(scale0[step]) / 16, s1 = half_bits_to_float(scale1[step]) / 16;
#pragma unroll
      for (int n = 0; n < SUMS; ++n) {
        int acc[4] = {};  // 16 times the sums
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 x = slice_bytes<NB>(q, stride, n, step * 144 + t * 32 + half * 16);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const u32 a = word(raw[2 * i], 2 * half + k), b = word(raw[2 * i + 1], 2 * half + k), high = 0xf0f0f0f0u;
            mma_s8s8(acc, a << 4 & high, b << 4 & high, a & high, b & high, word(x, 2 * k), word(x, 2 * k + 1));
          }
        }
        for (int k = 0; k < 4; ++k) sum[n][k] = fmaf(k < 2 ? s0 : s1, (float)acc[k], sum[n][k]);
      }
    }
  }
  for (int n = 0; n < SUMS; ++n) put_tile<NB>(sum[n], n, red);
}
