// y = W x, second half: the items of a matrix (tiles of sign rows, single rows of other formats) over blocks and warps,
// what is added to them, and where the results go. The first half, and what the numbers mean, is in matrix.cuh.

// Row of int4 codes: float partial sums, one a token. A group of 128 columns has a scale; codes are stored plus 8.
template <int NB>
DEV void dot_int4(const u8* row, const u16* scales, const Matrix& m, i64 first, i64 step, const View<NB>& v,
                  float (&sum)[NB]) {
  const int chunks = (int)(m.kpad / 32), last = (int)((m.cols - 1) / 128);
#pragma unroll NB == 1 ? 2 : 1
  for (int c = (int)first; c < chunks; c += (int)step) {
    const uint4 w = load_weights(row + c * 16);
    const float scale = half_bits_to_float(scales[c / 4 < last ? c / 4 : last]);
    const u8* x = v.q + slice_at(c * 32);
#pragma unroll
    for (int b = 0; b < NB; ++b) {
      int d[3];
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const uint4 lo = *(const uint4*)(x + (s * NB + b) * v.stride), hi = *(const uint4*)(x + (s * NB + b) * v.stride + 16);
        int a = -8 * v.chunk[(s * NB + b) * chunks + c];
        a = dot4(w.x & 0x0f0f0f0fu, lo.x, dot4(w.x >> 4 & 0x0f0f0f0fu, lo.y, a));
        a = dot4(w.y & 0x0f0f0f0fu, lo.z, dot4(w.y >> 4 & 0x0f0f0f0fu, lo.w, a));
        a = dot4(w.z & 0x0f0f0f0fu, hi.x, dot4(w.z >> 4 & 0x0f0f0f0fu, hi.y, a));
        d[s] = dot4(w.w & 0x0f0f0f0fu, hi.z, dot4(w.w >> 4 & 0x0f0f0f0fu, hi.w, a));
      }
      sum[b] = fmaf(scale, combine(d[0], d[1], d[2]), sum[b]);
    }
  }
}

template <int NB>
DEV void dot_float(const Segment& s, i64 row, const Matrix& m, i64 first, i64 step, const View<NB>& v, float (&sum)[NB]) {
  const u8* at = (const u8*)s.data + row * s.stride;
  const int each = s.format == F32 ? 4 : 8;  // numbers in 16 bytes
  for (i64 c = first; c < m.kpad / each; c += step) {
    const uint4 w = load_weights(at + c * 16);
    for (int k = 0; k < each; ++k) {
      const u32 two = word(w, s.format == F32 ? k : k / 2);
      const u16 one = (u16)(k & 1 ? two >> 16 : two);
      const float f = s.format == F32 ? bits_to_float(two) : s.format == F16 ? half_bits_to_float(one) : bfloat_to_float(one);
      for (int b = 0; b < NB; ++b) sum[b] = fmaf(f, v.plain[b * m.kpad + c * each + k], sum[b]);
    }
  }
}

// An item's share of warp kw of `split`, to this warp's part of v.red (and v.red2).
template <int NB>
DEV void item_partial(const Matrix& m, const Segment& s, i64 item, int kw, View<NB>& v) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, split = (int)m.split;
  int* red = v.red + warp * TILE * 3 * NB;
  const i64 first = kw * WARP + lane, step = split * WARP;
  if (s.format == SIGN) {
    const i64 row = item * TILE;
    sign_tile<NB>((const u8*)s.data, s.stride, row, row + 8, s.rows, m.kpad, kw, split, v.q, v.stride, red);
    if (m.plane_cols) {  // rows of the plane count from plane_start
      const i64 from = s.first + row - m.plane_start;
      if (from + TILE > 0 && from < m.plane_stop - m.plane_start)
        sign_tile<NB>((const u8*)m.plane_data, m.plane_stride, from, from + 8, m.plane_stop - m.plane_start, m.plane_kpad, kw,
                      split, v.q2, v.stride2, v.red2 + warp * TILE * 3 * NB);
    }
  } else if (s.format == INT8) {
    int acc[3 * NB] = {};
    dot_int8<NB>((const u8*)s.data + item * s.stride, m.kpad, first, step, v, acc);
    for (int n = 0; n < 3 * NB; ++n) {
      acc[n] = warp_sum(acc[n]);
      if (lane == 0) red[n] = acc[n];
    }
  } else {
    float sum[NB] = {};
    if (s.format == INT4)
      dot_int4<NB>((const u8*)s.data + item * s.stride, (const u16*)s.scale + item * s.groups, m, first, step, v, sum);
    else
      dot_float<NB>(s, item, m, first, step, v, sum);
    for (int b = 0; b < NB; ++b) {
      sum[b] = warp_sum(sum[b]);
      if (lane == 0) red[b] = (int)float_to_bits(sum[b]);
    }
  }
}

// The product of one row and token from the partial sums of `split` warps, `local` being the row within its item.
template <int NB>
DEV float item_value(const Matrix& m, const Segment& s, i64 row, int local, int b, const View<NB>& v) {
  const int split = (int)m.split, warp = threadIdx.x / WARP;
  const int* red = v.red + warp * TILE * 3 * NB + local * 3 * NB;
  float y = 0;
  if (s.format == SIGN || s.format == INT8) {
    int d[3] = {0, 0, 0};
    for (int w = 0; w < split; ++w)
      for (int i = 0; i < 3; ++i) d[i] += red[w * TILE * 3 * NB + i * NB + b];
    if (s.format == SIGN)
      for (int i = 0; i < 3; ++i) d[i] = 2 * d[i] - total<NB>(v.part, i, b);
    y = half_bits_to_float(((const u16*)s.scale)[row - s.first]) * combine(d[0], d[1], d[2]) * v.scale[b];
  } else {
    for (int w = 0; w < split; ++w) y += bits_to_float((u32)red[w * TILE * 3 * NB + b]);
    if (s.format == INT4) y *= v.scale[b];
  }
  if (m.plane_cols && s.format == SIGN && row >= m.plane_start && row < m.plane_stop) {
    const int* red2 = v.red2 + warp * TILE * 3 * NB + local * 3 * NB;
    int d[3] = {0, 0, 0};
    for (int w = 0; w < split; ++w)
      for (int i = 0; i < 3; ++i) d[i] += red2[w * TILE * 3 * NB + i * NB + b];
    for (int i = 0; i < 3; ++i) d[i] = 2 * d[i] - total<NB>(v.part2, i, b);
    y += half_bits_to_float(((const u16*)m.plane_scale)[row - m.plane_start]) * combine(d[0], d[1], d[2]) * v.scale[b];
  }
  if (m.rank && row >= m.lr_start && row < m.lr_stop) {
    const uint4* a = (const uint4*)(m.lr_a + (row - m.lr_start) * m.rank);
    float sum = 0;
    for (int r = 0; r < (int)m.rank; r += 16) {
      const uint4 codes = a[r / 16];
      const float* t = v.factor + b * m.rank + r;
#pragma unroll
      for (int k = 0; k < 16; ++k) sum = fmaf((float)(i8)(word(codes, k / 4) >> (k % 4 * 8)), t[k], sum);
    }
    y = fmaf(half_bits_to_float(((const u16*)m.lr_a_scale)[row - m.lr_start]), sum, y);
  }
  return m.bias ? y + ((const float*)m.bias)[row] : y;
}

DEV void put_output(const Product& p, i64 ring, i64 row, int b, float y) {
  const Output& o = p.out;
  if (o.mode == STORE) {
    ((float*)o.y)[b * o.stride + row] = y;
  } else if (o.mode == ADD) {
    float* u = (float*)o.y + b * o.stride + row;
    *u = load_fresh(u) + y;
  } else if (row >= o.z0 && row < o.z1) {
    ((float*)o.z)[b * o.z_stride + row - o.z0] = y;
  } else if (row >= o.ring0 && row < o.ring1) {
    ((float*)ring)[row - o.ring0] = y;
  } else {
    ((float*)o.y)[b * o.stride + row - o.rest0] = y;
  }
}

DEV int segment_of(const Matrix& m, i64 item) {
  int k = 0;
  while (k + 1 < (int)m.segments && item >= m.segment[k + 1].item0) ++k;
  return k;
}

// Item of this warp in a round: consecutive items go to different blocks, so that every block gets the same mix.
DEV i64 item_of(const Matrix& m, i64 round, int block, int blocks) {
  const i64 groups = WARPS / m.split, group = threadIdx.x / WARP / m.split;
  return (round * groups + group) * blocks + block;
}

// Asks for the weights of this block's first round, which do not depend on the kernel before.
DEV void prefetch_product(const Matrix& m, int block, int blocks) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, kw = warp % (int)m.split;
  const i64 item = item_of(m, 0, block, blocks);
  for (i64 r = warp; r < m.rank; r += WARPS)
    for (i64 at = lane * 128; at < m.kpad; at += WARP * 128) prefetch((const u8*)m.lr_b + r * m.kpad + at);
  if (item >= m.items) return;
  const Segment& s = m.segment[segment_of(m, item)];
  const i64 own = item - s.item0;
  if (s.format == SIGN) {
    for (i64 step = kw; step < m.kpad / 512; step += m.split)
      for (int half = 0; half < 2; ++half) {
        const i64 row = own * TILE + lane / 4 + half * 8;
        if (row < s.rows && lane % 2 == 0) prefetch((const u8*)s.data + row * s.stride + step * 64 + lane % 4 * 16);
      }
    if (m.rank && lane < TILE) prefetch((const u8*)m.lr_a + least(own * TILE + lane, m.lr_stop - m.lr_start - 1) * m.rank);
  } else {
    for (i64 at = (kw * WARP + lane) * 128; at < s.stride; at += m.split * WARP * 128)
      prefetch((const u8*)s.data + own * s.stride + at);
  }
}

// All of this block's share of the product for the sequences first .. first + NB. `ready` waits for the kernel before; it
// is called once, after the weights have been asked for.
template <int NB, typename Ready>
DEV void product(const Product& p, u8* smem, int first, int block, int blocks, Ready ready) {
  const Matrix& m = p.m;
  prefetch_product(m, block, blocks);
  if (block >= m.items) return ready();
  View<NB> v = carve<NB>(m, p.in, smem);
  const int batch = (int)least(NB, p.batch - first);
  if (p.out.mode == IN_PROJ && threadIdx.x < batch) {
    const i64 slot = slot_of(p.state, first + threadIdx.x);
    v.ring[threadIdx.x] = (i64)ring_row(p.state, slot, position(p.state, slot));
  }
  ready();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, split = (int)m.split;
  Input in = p.in;
  in.x += first * in.x_stride * 4;
  in.gate += in.gate ? first * in.gate_stride * 4 : 0;
  stage<NB>(m, in, batch, v);
  for (int r = warp; r < (int)m.rank; r += WARPS) {
    int acc[3 * NB] = {};
    dot_int8<NB>((const u8*)m.lr_b + r * m.kpad, m.kpad, lane, WARP, v, acc);
    const float scale = half_bits_to_float(((const u16*)m.lr_b_scale)[r]);
    for (int b = 0; b < NB; ++b) {
      const int d0 = warp_sum(acc[b]), d1 = warp_sum(acc[NB + b]), d2 = warp_sum(acc[2 * NB + b]);
      if (lane == 0) v.factor[b * m.rank + r] = scale * combine(d0, d1, d2) * v.scale[b];
    }
  }
  for (i64 round = 0; round * (WARPS / split) * blocks + block < m.items; ++round) {
    const i64 item = item_of(m, round, block, blocks);
    const bool some = item < m.items;
    const Segment& s = m.segment[some ? segment_of(m, item) : 0];
    if (some) item_partial<NB>(m, s, item - s.item0, warp % split, v);
    __syncthreads();  // partial sums, and in the first round the factors
    if (some && warp % split == 0) {
      const int rows = s.format == SIGN ? (int)least(TILE, s.rows - (item - s.item0) * TILE) : 1;
      const i64 row0 = s.first + (item - s.item0) * (s.format == SIGN ? TILE : 1);
      for (int o = lane; o < rows * NB; o += WARP) {
        const int local = o / NB, b = o % NB;
        if (b < batch) put_output(p, v.ring[b], row0 + local, first + b, item_value<NB>(m, s, row0 + local, local, b, v));
      }
    }
    __syncthreads();
  }
}
