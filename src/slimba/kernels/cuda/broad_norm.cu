// What the products of broad.cu want and leave: images of normed vectors, and the rows of int8 codes.
//
// Naive twins: the norms of tests/runtime/numpy_reference.py, `Matrix.matmul` of formats/matrix.py. Tests:
// tests/kernels/test_cuda_broad.py.

// u plus the parts goes to `residual`; e = that (or x) * silu(gate) * weight, divided by the RMS; float16 into the image, chosen
// columns into that of the second plane. One block a vector; further blocks of a vector, if there are, multiply it by 16 rows of
// int8 codes each, which saves few vectors a kernel.
struct BroadNorm {
  Matrix m;  // that will multiply the vectors
  Input in;
  i64 residual, parts, part_stride, n_parts;  // n_parts: 0 to 4; residual: where the sum goes, or 0
  i64 x, x2, padded;
  Output out;  // of the rows of codes
  StateRef state;
};

struct CodeRows {  // 16 of them
  const u8* data;
  const u16* scales;
  int stride, row0, rows, first_row;
};
DEV CodeRows code_rows(const Matrix& m, int at) {
  CodeRows out = {nullptr, nullptr, 0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < MAX_SEGMENTS; ++k) {
    if (k >= (int)m.segments || m.segment[k].format != INT8) continue;
    const Segment& s = m.segment[k];
    const int count = ((int)s.rows + TILE - 1) / TILE;
    if (at >= 0 && at < count) out = {(const u8*)s.data, (const u16*)s.scale, (int)s.stride, at * TILE, (int)s.rows, (int)s.first};
    at -= count;
  }
  return out;
}
// Columns in shared memory, eight floats of padding after 32, so that code_products meets all banks.
DEV int column_at(int c) { return c + (c >> 5) * 8; }

#define CODE_PIECES 4  // 16 bytes of a row in a lane: 2,048 columns
// A warp's two rows of codes.
struct CodePieces {
  uint4 row[2][CODE_PIECES];
};
DEV CodePieces ask_codes(const Matrix& m, const CodeRows& from) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  CodePieces out;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < CODE_PIECES; ++i) {
      const int row = from.row0 + warp * 2 + r, piece = lane + i * WARP;
      out.row[r][i] = row < from.rows && piece < (int)m.kpad / 16 ? load_weights(from.data + (i64)row * from.stride + piece * 16) : uint4{0, 0, 0, 0};
    }
  return out;
}
DEV void code_products(const BroadNorm& p, const CodeRows& from, const CodePieces& codes, const float* e, float inverse, int b) {
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < CODE_PIECES; ++i) {
    const int piece = lane + i * WARP;
    if (piece >= (int)m.kpad / 16) break;
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // byte k of the four words
      const float4 x = *(const float4*)(e + column_at(piece / 2 * 32 + 8 * k + piece % 2 * 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& w = codes.row[r][i];
        sum[r] = fmaf((float)(i8)(w.x >> 8 * k), x.x, fmaf((float)(i8)(w.y >> 8 * k), x.y, sum[r]));
        sum[r] = fmaf((float)(i8)(w.z >> 8 * k), x.z, fmaf((float)(i8)(w.w >> 8 * k), x.w, sum[r]));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int local = from.row0 + warp * 2 + r, row = from.first_row + local;
    const float y = warp_sum(sum[r]) * inverse;
    if (lane || local >= from.rows) continue;
    const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, b) : 0;
    put_output(p.out, ring, row, b, fmaf(y, half_bits_to_float(from.scales[local]), m.bias ? ((const float*)m.bias)[row] : 0.0f));
  }
}

// Four columns side by side, from 0 beyond the last; `whole`: in one request.
DEV float4 load_columns(const float* from, int c, int cols, bool whole) {
  if (whole) return c < cols ? load_fresh_quad(from + c) : float4{0, 0, 0, 0};
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = c + i < cols ? load_fresh(from + c + i) : 0.0f;
  return float4{v[0], v[1], v[2], v[3]};
}
DEV void add_columns(float4& to, const float4& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }

#define NORM_QUADS 2  // fours of columns that a thread has on their way
DEV void broad_norm(const BroadNorm& p, u8* smem) {
  const Matrix& m = p.m;
  const int b = blockIdx.x, cols = (int)m.cols, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const bool whole = cols % 4 == 0 && p.in.x_stride % 4 == 0 && p.in.gate_stride % 4 == 0;
  const bool first_block = blockIdx.y == 0;
  float *e = (float*)smem, *scratch = e + column_at((int)m.kpad), *kept = first_block && p.residual ? (float*)p.residual + b * p.in.x_stride : nullptr;
  const float *weight = (const float*)p.in.weight, *col_scale = (const float*)m.col_scale;
  const float* gate = p.in.gate ? (const float*)p.in.gate + b * p.in.gate_stride : nullptr;
  const float* added = (const float*)p.parts + b * (i64)cols;
  const float* x = (const float*)p.in.x + b * p.in.x_stride;
  const int places = (int)m.plane_kpad / 8, known = (int)threadIdx.x < places;
  i32 chosen[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = known ? image_column(threadIdx.x, i) : 0;
    chosen[i] = known && place < (int)m.plane_cols ? ((const i32*)m.plane_index)[place] : -1;
  }
  float4 norm[NORM_QUADS];
#pragma unroll
  for (int k = 0; k < NORM_QUADS; ++k)
    norm[k] = weight ? load_columns(weight, 4 * (threadIdx.x + k * THREADS), cols, cols % 4 == 0) : float4{1, 1, 1, 1};
  CodeRows rows;
  CodePieces codes;
  if (!first_block) {
    rows = code_rows(m, (int)blockIdx.y - 1);
    codes = ask_codes(m, rows);
  }
  release_next();
  await_previous();
  float squares = 0;
#pragma unroll 1
  for (int at = 0; at < (int)m.kpad; at += 4 * THREADS * NORM_QUADS) {
    float4 v[NORM_QUADS];
#pragma unroll
    for (int k = 0; k < NORM_QUADS; ++k) {
      const int c = at + 4 * (threadIdx.x + k * THREADS);
      v[k] = load_columns(x, c, cols, whole);
#pragma unroll
      for (int part = 0; part < MOST_PARTS; ++part)
        if (part < (int)p.n_parts) add_columns(v[k], load_columns(added + part * p.part_stride, c, cols, whole && p.part_stride % 4 == 0));
    }
#pragma unroll
    for (int k = 0; k < NORM_QUADS; ++k) {
      const int c = at + 4 * (threadIdx.x + k * THREADS);
      if (c >= (int)m.kpad) continue;
      float y[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
      if (kept && whole && c < cols) *(float4*)(kept + c) = v[k];
      const float4 w = at == 0 ? norm[k] : weight ? load_columns(weight, c, cols, cols % 4 == 0) : float4{1, 1, 1, 1};
      const float by[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = c + i < cols;
        if (kept && !whole && there) kept[c + i] = y[i];
        squares += y[i] * y[i];
        y[i] *= by[i];
        if (there && col_scale) y[i] *= col_scale[c + i];
        if (there && gate) y[i] *= silu(load_fresh(gate + c + i));
      }
      *(float4*)(e + column_at(c)) = float4{y[0], y[1], y[2], y[3]};
    }
  }
  squares = warp_sum(squares);
  if (lane == 0) scratch[warp] = squares;
  __syncthreads();
  squares = 0;
  for (int w = 0; w < WARPS; ++w) squares += scratch[w];
  const float inverse = p.in.groups ? 1.0f / sqrtf(squares / (float)cols + param_float(p.in.eps)) : 1.0f;
  if (!first_block) return code_products(p, rows, codes, e, inverse, b);
#pragma unroll 1
  for (int eight = threadIdx.x; eight < (int)m.kpad / 8; eight += THREADS) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = pack_halves(e[column_at(image_column(eight, 2 * i))] * inverse, e[column_at(image_column(eight, 2 * i + 1))] * inverse);
    *(uint4*)image_at(p.x, (int)p.padded, b, eight) = uint4{w[0], w[1], w[2], w[3]};
  }
#pragma unroll 1
  for (int eight = threadIdx.x; eight < places; eight += THREADS) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      i32 c[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int place = image_column(eight, 2 * i + k);
        c[k] = eight < THREADS ? chosen[2 * i + k] : place < (int)m.plane_cols ? ((const i32*)m.plane_index)[place] : -1;
      }
      w[i] = pack_halves(c[0] < 0 ? 0.0f : e[column_at(c[0])] * inverse, c[1] < 0 ? 0.0f : e[column_at(c[1])] * inverse);
    }
    *(uint4*)image_at(p.x2, (int)p.padded, b, eight) = uint4{w[0], w[1], w[2], w[3]};
  }
}

// The rows of int8 codes: tiles of 16 rows, 8 NT vectors; the warps divide the units of columns.
template <int NT>
struct BroadCodesShared {
  float part[WARPS][8 * NT][TILE + 1];
};
template <int NT>
DEV void broad_codes(const Broad& p, u8* smem) {
  BroadCodesShared<NT>& v = *(BroadCodesShared<NT>*)smem;
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, first = blockIdx.y * 8 * NT;
  const CodeRows of = code_rows(m, blockIdx.x);
  const u8* data = of.data;
  const u16* scales = of.scales;
  const int stride = of.stride, row0 = of.row0, rows = of.rows, first_row = of.first_row;
  uint4 codes[2][2][2];  // word of a lane, row, half of the word
  auto load = [&](int unit) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int row = row0 + g + k / 2 % 2 * 8;
      const u8* from = data + (i64)row * stride + unit * UNIT + 64 * t + k / 4 * 32 + k % 2 * 16;
      codes[k / 4][k / 2 % 2][k % 2] = row < rows && unit < (int)m.kpad / UNIT ? load_weights(from) : uint4{0, 0, 0, 0};
    }
  };
  load(warp);
  release_next();
  // A late one runs where blocks of the signs' product have ended. That product has waited for the norm before it let this begin,
  // and what comes after must find both products done.
  if (!p.late) await_previous();
  float acc[NT][4] = {};
#pragma unroll 1
  for (int unit = warp; unit < (int)m.kpad / UNIT; unit += WARPS) {
    if (unit >= WARPS) load(unit);
#pragma unroll
    for (int step = 0; step < 16; ++step) {
      const int quarter = unit * 4 + step / 4, piece = step % 4 * 2;
      u32 a[4], b[NT][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = 2 * step % 8;
        a[h] = int8_pair(word(codes[step / 8][h][j / 4], j % 4), step % 8);
        a[2 + h] = int8_pair(word(codes[step / 8][h][j / 4], j % 4 + 1), step % 8);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const u8* x = (const u8*)p.x + ((i64)quarter * p.padded + first + 8 * n + g) * 128 + 4 * t;
        b[n][0] = *(const u32*)(x + ((piece ^ g) << 4)), b[n][1] = *(const u32*)(x + ((piece + 1 ^ g) << 4));
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) mma_f16(acc[n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) v.part[warp][8 * n + 2 * t + k % 2][g + k / 2 * 8] = acc[n][k];
  __syncthreads();
  for (int i = threadIdx.x; i < TILE * 8 * NT; i += THREADS) {
    const int row = i % TILE, b = i / TILE;
    if (row0 + row >= rows || first + b >= (int)p.batch) continue;
    float y = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) y += v.part[w][b][row];
    y *= half_bits_to_float(scales[row0 + row]);
    if (m.bias) y += ((const float*)m.bias)[first_row + row0 + row];
    const i64 ring = p.out.mode == IN_PROJ ? (i64)next_ring_row(p.state, first + b) : 0;
    put_output(p.out, ring, first_row + row0 + row, first + b, y);
  }
  if (p.late) await_previous();
}
