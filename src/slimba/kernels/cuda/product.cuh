// y = W x: the items of a matrix (tiles of 16 rows on the tensor cores, or single rows) over blocks and warps, what is
// added to them, and where the results go. What the numbers mean is in matrix.cuh; tiles are in tiles.cuh.
//
// Everything that a product can be asked for before its input is there (weights of the first round, factors of the low
// rank, scales) is loaded into registers before `ready`, which waits for the kernel before.

// acc[s NB + b] += codes times slices; `raw` holds the chunks first, first + step, ... of the row, RAW at a time.
template <int NB>
DEV void dot_chunk(const uint4& w, int chunk, const View<NB>& v, int (&acc)[3 * NB]) {
  const u8* x = v.q + chunk * 16 + (chunk >> 3) * 16;
#pragma unroll
  for (int n = 0; n < 3 * NB; ++n) {
    const uint4 d = *(const uint4*)(x + n * v.stride);
    acc[n] = dot4(w.x, d.x, dot4(w.y, d.y, dot4(w.z, d.z, dot4(w.w, d.w, acc[n]))));
  }
}

template <int NB>
DEV void dot_float(const Segment& s, int row, const Matrix& m, int first, int step, const View<NB>& v, float (&sum)[NB]) {
  const u8* at = (const u8*)s.data + row * s.stride;
  const int each = s.format == F32 ? 4 : 8;  // numbers in 16 bytes
#pragma unroll 1
  for (int c = first; c < (int)m.kpad / each; c += step) {
    const uint4 w = load_weights(at + c * 16);
    for (int k = 0; k < each; ++k) {
      const u32 two = word(w, s.format == F32 ? k : k / 2);
      const u16 one = (u16)(k & 1 ? two >> 16 : two);
      const float f = s.format == F32 ? bits_to_float(two) : s.format == F16 ? half_bits_to_float(one) : bfloat_to_float(one);
      for (int b = 0; b < NB; ++b) sum[b] = fmaf(f, v.plain[b * (int)m.kpad + c * each + k], sum[b]);
    }
  }
}

// The segment of an item. Written as choices, so that nothing is indexed at run time when a matrix is known at compile time.
DEV Segment segment_of(const Matrix& m, int item) {
  Segment s = m.segment[0];
#pragma unroll
  for (int k = 1; k < MAX_SEGMENTS; ++k)
    if (k < (int)m.segments && item >= (int)m.segment[k].item0) s = m.segment[k];
  return s;
}
DEV bool is(const Matrix& m, const Segment& s, int format) { return (m.formats >> format & 1) && s.format == format; }
DEV bool is_tile(const Segment& s) { return s.each == TILE; }

// What an item's lanes hold before the input is known.
struct Asked {
  uint4 raw[RAW], plane[RAW];
  uint4 a;  // low-rank codes of the row that this lane finishes
  float scale, a_scale, bias;
};

DEV TileRows tile_rows(const Segment& s, int local) {
  return {(const u8*)s.data, (int)s.stride, local * TILE, (int)s.rows, (int)s.stride / 64};
}

// The rows of the second plane under item `local` of s.
DEV TileRows plane_rows(const Matrix& m, const Segment& s, int local) {
  const int rows = (int)(m.plane_stop - m.plane_start), from = (int)(s.first - m.plane_start) + local * TILE;
  return {(const u8*)m.plane_data, (int)m.plane_stride, from, rows, (int)m.plane_stride / 64};
}
DEV bool any_of(const TileRows& r) { return r.row0 + TILE > 0 && r.row0 < r.rows; }

DEV float row_scale(const Matrix& m, const Segment& s, int local) {
  return is(m, s, SIGN) || is(m, s, INT8) ? half_bits_to_float(((const u16*)s.scale)[local]) : 1.0f;
}

// Loads of item `local` of s: this warp's first weights, and what lane l needs to finish row l (NB = 1).
template <int NB>
DEV void ask(const Matrix& m, const Segment& s, int local, int kw, Asked& out) {
  const int lane = threadIdx.x % WARP, split = (int)m.split;
  if (is_tile(s)) {
    load_tile(tile_rows(s, local), kw, split, 0, out.raw);
    if (NB == 1 && m.plane_cols && is(m, s, SIGN)) load_tile(plane_rows(m, s, local), kw, split, 0, out.plane);
  } else if (is(m, s, INT8)) {
    const u8* row = (const u8*)s.data + (i64)local * s.stride;
#pragma unroll
    for (int i = 0; i < RAW; ++i) {
      const int chunk = (kw + split * i) * WARP + lane;
      out.raw[i] = chunk < (int)m.kpad / 16 ? load_weights(row + chunk * 16) : uint4{0, 0, 0, 0};
    }
  }
  const int own = local * (int)s.each + lane, row = (int)s.first + own;
  out.scale = 1, out.a_scale = 0, out.bias = 0;
  out.a = uint4{0, 0, 0, 0};
  if (kw || lane >= (int)s.each || own >= (int)s.rows) return;
  out.scale = row_scale(m, s, own);
  if (m.bias) out.bias = ((const float*)m.bias)[row];
  if (m.rank && row >= (int)m.lr_start && row < (int)m.lr_stop) {
    out.a = load_weights((const u8*)m.lr_a + (row - (int)m.lr_start) * (int)m.rank);
    out.a_scale = half_bits_to_float(((const u16*)m.lr_a_scale)[row - (int)m.lr_start]);
  }
}

// An item's share of warp kw, to this warp's part of v.red (and v.red2).
template <int NB>
DEV void item_partial(const Matrix& m, const Segment& s, int local, int kw, Asked& asked, View<NB>& v) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, split = (int)m.split;
  int* red = v.red + warp * TILE * 3 * NB;
  if (is(m, s, SIGN)) {
    sign_tile<NB>(tile_rows(s, local), kw, split, asked.raw, true, v.q, v.stride, red);
    if (!m.plane_cols) return;
    const TileRows plane = plane_rows(m, s, local);
    if (!any_of(plane)) return;
    sign_tile<NB>(plane, kw, split, NB == 1 ? asked.plane : asked.raw, NB == 1, v.q2, v.stride2, v.red2 + warp * TILE * 3 * NB);
  } else if (is(m, s, INT8) && is_tile(s)) {
    int8_tile<NB>(tile_rows(s, local), kw, split, asked.raw, true, v.q, v.stride, red);
  } else if (is(m, s, INT4)) {
    const u16* scales = (const u16*)s.scale + (i64)local * TILE * s.groups;
    int4_tile<NB>(tile_rows(s, local), kw, split, asked.raw, true, scales, (int)s.groups, v.q, v.stride, (float*)red);
  } else if (is(m, s, INT8)) {
    int acc[3 * NB] = {};
    const u8* row = (const u8*)s.data + (i64)local * s.stride;
#pragma unroll
    for (int i = 0; i < RAW; ++i) {
      const int chunk = (kw + split * i) * WARP + lane;
      if (chunk < (int)m.kpad / 16) dot_chunk<NB>(asked.raw[i], chunk, v, acc);
    }
#pragma unroll 1
    for (int chunk = (kw + split * RAW) * WARP + lane; chunk < (int)m.kpad / 16; chunk += split * WARP)
      dot_chunk<NB>(load_weights(row + chunk * 16), chunk, v, acc);
    for (int n = 0; n < 3 * NB; ++n) {
      acc[n] = warp_sum(acc[n]);
      if (lane == 0) red[n] = acc[n];
    }
  } else if (m.has_float) {
    float sum[NB] = {};
    dot_float<NB>(s, local, m, kw * WARP + lane, split * WARP, v, sum);
    for (int b = 0; b < NB; ++b) {
      sum[b] = warp_sum(sum[b]);
      if (lane == 0) ((float*)red)[b] = sum[b];
    }
  }
}

// Sums of a row's slices over the warps of an item: d[i] is what slice i contributes.
template <int NB>
DEV void gather(const int* red, int split, int row, int b, bool floats, float (&d)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    int whole = 0;
    float part = 0;
    for (int w = 0; w < split; ++w) {
      const int* at = red + (w * TILE + row) * 3 * NB + i * NB + b;
      if (floats) part += *(const float*)at;
      else whole += *at;
    }
    d[i] = floats ? part : (float)whole;
  }
}

// The product of row `own` of segment s and token b.
template <int NB>
DEV float item_value(const Matrix& m, const Segment& s, int own, int in_item, int b, const Asked& asked, const View<NB>& v) {
  const int split = (int)m.split, base = (int)threadIdx.x / WARP * TILE * 3 * NB, row = (int)s.first + own;
  float d[3], y = 0;
  if (is(m, s, SIGN) || is(m, s, INT8) || is(m, s, INT4)) {
    gather<NB>(v.red + base, split, in_item, b, is(m, s, INT4), d);
    if (is(m, s, SIGN))
      for (int i = 0; i < 3; ++i) d[i] = 2 * d[i] - (float)total<NB>(v.part, i, b);
    y = (NB == 1 ? asked.scale : row_scale(m, s, own)) * combine(d[0], d[1], d[2]) * v.scale[b];
  } else if (m.has_float) {
    for (int w = 0; w < split; ++w) y += ((const float*)v.red)[base + w * TILE * 3 * NB + b];
  }
  if (m.plane_cols && is(m, s, SIGN) && row >= (int)m.plane_start && row < (int)m.plane_stop) {
    gather<NB>(v.red2 + base, split, in_item, b, false, d);
    for (int i = 0; i < 3; ++i) d[i] = 2 * d[i] - (float)total<NB>(v.part2, i, b);
    y += half_bits_to_float(((const u16*)m.plane_scale)[row - (int)m.plane_start]) * combine(d[0], d[1], d[2]) * v.scale[b];
  }
  if (m.rank && row >= (int)m.lr_start && row < (int)m.lr_stop) {
    const int at = row - (int)m.lr_start;
    const uint4* a = (const uint4*)((const u8*)m.lr_a + (i64)at * m.rank);
    float sum = 0;
#pragma unroll 1
    for (int r = 0; r < (int)m.rank; r += 16) {
      const uint4 codes = NB == 1 && r == 0 ? asked.a : load_weights(a + r / 16);
      const float* t = v.factor + b * (int)m.rank + r;
#pragma unroll
      for (int k = 0; k < 16; ++k) sum = fmaf((float)(i8)(word(codes, k / 4) >> (k % 4 * 8)), t[k], sum);
    }
    y = fmaf(NB == 1 ? asked.a_scale : half_bits_to_float(((const u16*)m.lr_a_scale)[at]), sum, y);
  }
  return m.bias ? y + (NB == 1 ? asked.bias : ((const float*)m.bias)[row]) : y;
}

// The right low-rank factor B, in tiles of 16 ranks whose columns all warps of a block share.
struct AskedFactors {
  uint4 raw[RAW];
  float scale;  // of the rank that this thread finishes in the first tile
};
DEV TileRows factor_rows(const Matrix& m, int tile) {
  return {(const u8*)m.lr_b, (int)m.kpad, tile * TILE, (int)m.rank, (int)m.kpad / 64};
}
template <int NB>
DEV float factor_scale(const Matrix& m, int tile) {
  const int r = tile * TILE + (int)threadIdx.x / NB;
  return (int)threadIdx.x < TILE * NB ? half_bits_to_float(((const u16*)m.lr_b_scale)[r]) : 0.0f;
}
template <int NB>
DEV void ask_factors(const Matrix& m, AskedFactors& out) {
  load_tile(factor_rows(m, 0), threadIdx.x / WARP, WARPS, 0, out.raw);
  out.scale = factor_scale<NB>(m, 0);
}
// B x to v.factor. Ends with a barrier.
template <int NB>
DEV void factors(const Matrix& m, AskedFactors& asked, View<NB>& v) {
  const int warp = threadIdx.x / WARP, r = (int)threadIdx.x / NB, b = (int)threadIdx.x % NB;
#pragma unroll 1
  for (int tile = 0; tile * TILE < (int)m.rank; ++tile) {
    int8_tile<NB>(factor_rows(m, tile), warp, WARPS, asked.raw, tile == 0, v.q, v.stride, v.red + warp * TILE * 3 * NB);
    __syncthreads();
    if ((int)threadIdx.x < TILE * NB) {
      float d[3];
      gather<NB>(v.red, WARPS, r, b, false, d);
      const float scale = tile ? factor_scale<NB>(m, tile) : asked.scale;
      v.factor[b * (int)m.rank + tile * TILE + r] = scale * combine(d[0], d[1], d[2]) * v.scale[b];
    }
    __syncthreads();
  }
}

// All of this block's share of the product for the sequences first .. first + NB. Consecutive items go to different blocks,
// so that every block gets the same mix. `ready` is called exactly once.
template <int NB, typename Ready>
DEV void product(const Product& p, u8* smem, int first, int block, int blocks, Ready ready) {
  const Matrix& m = p.m;
  if (block >= (int)m.items) return ready();
  View<NB> v = carve<NB>(m, p.in, smem);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, split = (int)m.split, kw = warp % split;
  const int groups = WARPS / split, batch = (int)least(NB, p.batch - first);
  int item = warp / split * blocks + block;
  Segment s = segment_of(m, item);
  Asked asked;
  if (item < (int)m.items) ask<NB>(m, s, item - (int)s.item0, kw, asked);
  AskedFactors asked_factors;
  if (m.rank) ask_factors<NB>(m, asked_factors);
  const Weights<NB> norm_weight = load_norm<NB>(m, p.in);
  const PlaneColumns<NB> plane = load_plane<NB>(m);
  if (p.out.mode == IN_PROJ && (int)threadIdx.x < batch)
    v.ring[threadIdx.x] = (i64)next_ring_row(p.state, first + threadIdx.x);
  ready();
  Input in = p.in;
  in.x += first * in.x_stride * 4;
  in.gate += in.gate ? first * in.gate_stride * 4 : 0;
  stage<NB>(m, in, batch, norm_weight, plane, v);
  if (m.rank) factors<NB>(m, asked_factors, v);
#pragma unroll 1
  for (int round = 0; round * groups * blocks + block < (int)m.items; ++round) {
    const bool some = item < (int)m.items;
    const int local = item - (int)s.item0;
    if (some) item_partial<NB>(m, s, local, kw, asked, v);
    __syncthreads();
    if (some && kw == 0) {
      const int row0 = local * (int)s.each, rows = (int)least(s.each, s.rows - row0);
#pragma unroll 1
      for (int o = lane; o < rows * NB; o += WARP) {
        const int row = row0 + o / NB, b = o % NB;
        if (b < batch)
          put_output(p.out, v.ring[b], (int)s.first + row, first + b, item_value<NB>(m, s, row, o / NB, b, asked, v));
      }
    }
    item += groups * blocks;
    if (item < (int)m.items) {
      s = segment_of(m, item);
      ask<NB>(m, s, item - (int)s.item0, kw, asked);
    }
    __syncthreads();
  }
}
