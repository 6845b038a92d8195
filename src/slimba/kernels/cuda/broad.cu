// Products of a packed matrix with eight to hundreds of vectors on the tensor cores of sm_90: a warpgroup expands 64 rows of signs (or int4)
// in its registers, the vectors come through shared memory, and nothing else is read or written of either.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_broad.py.
//
// Vectors lie in float16 as image.cuh says, so that a block's share of 64 is one copy.
#define UNIT 256  // columns of a stage
#define DEPTH 3   // stages
#define GROUP 128  // threads of a warpgroup
#define FOUR_AT_ONCE 32

struct Broad {
  Matrix m;
  Output out;
  StateRef state;
  i64 batch, x, x2, padded;  // images of `padded` vectors
  i64 parts, part_stride;    // the units are divided among so many blocks, each with its own result
  i64 squares, pieces, eps;  // squares: float32 [B][pieces], of vectors that steps.cu has not divided by their RMS; or 0
  i64 late;  // let the next kernel begin only when the one before has ended; of broad_codes: wait for the one before at the end
};

struct BroadTile {  // 64 rows of signs or int4 codes
  const u8 *data, *plane_data;
  const u16* scale;
  int stride, local, rows, first, in_plane, plane_rows, groups;
  bool there, plane;
};
template <int FORMAT>
DEV BroadTile broad_tile(const Matrix& m, int at) {
  BroadTile out = {nullptr, (const u8*)m.plane_data, nullptr, 0, 0, 0, 0, 0, 0, 0, false, false};
#pragma unroll
  for (int k = 0; k < MAX_SEGMENTS; ++k) {
    if (k >= (int)m.segments || m.segment[k].format != FORMAT) continue;
    const Segment& s = m.segment[k];
    const int count = ((int)s.rows + 63) / 64;
    if (at >= 0 && at < count) {
      out.data = (const u8*)s.data, out.scale = (const u16*)s.scale, out.stride = (int)s.stride;
      out.local = at * 64, out.rows = (int)s.rows, out.first = (int)s.first, out.groups = (int)s.groups, out.there = true;
    }
    at -= count;
  }
  out.in_plane = out.first + out.local - (int)m.plane_start, out.plane_rows = (int)(m.plane_stop - m.plane_start);
  out.plane = out.there && m.plane_kpad && out.in_plane + 64 > 0 && out.in_plane < out.plane_rows;
  return out;
}

// A lane's weights of a unit: rows lane / 4 and 8 below of its warp's sixteen.
template <int FORMAT>
struct BroadBits {
  uint2 row[2];
};
template <>
struct BroadBits<INT4> {
  uint4 row[2][2];
  u32 scale[2];
};
DEV void left_operand(const BroadBits<SIGN>& w, int step, u32 (&a)[4]) {
  sign_operand(step / 8 ? w.row[0].y : w.row[0].x, step / 8 ? w.row[1].y : w.row[1].x, step % 8, a);
}
DEV void left_operand(const BroadBits<INT4>& w, int step, u32 (&a)[4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 codes = word(w.row[h][step / 8], step % 4);
    a[h] = int4_pair(codes, step % 8 < 4 ? 0 : 8, w.scale[h]);
    a[2 + h] = int4_pair(codes, step % 8 < 4 ? 4 : 12, w.scale[h]);
  }
}
DEV void load_codes(const BroadTile& tile, int row, int unit, BroadBits<INT4>& to) {
  const int t = threadIdx.x % 4, group = unit * 2 + t / 2;  // of 128 columns
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = tile.local + row + 8 * h;
    const bool there = tile.there && local < tile.rows && group < tile.groups;
    const u8* at = tile.data + (i64)local * tile.stride + unit * 128 + t * 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) to.row[h][i] = there ? load_weights(at + 16 * i) : uint4{0, 0, 0, 0};
    to.scale[h] = there ? tile.scale[(i64)local * tile.groups + group] * 0x10001u : 0;
  }
}

// N vectors of a block; G tiles, a warpgroup each, whose units of columns are divided among KS warpgroups.
template <int N, int G, int KS, int FORMAT = SIGN>
DEV void broad(const Broad& p, u8* smem) {
  constexpr int WARPGROUPS = G * KS, SHARE = UNIT * 2 * N, STAGE = KS * SHARE, HALF = N / 2, EACH = HALF / KS;
  constexpr int AT_ONCE = N <= FOUR_AT_ONCE ? 4 : 2;  // steps whose products are begun together
  static_assert(HALF % KS == 0, "a warpgroup finishes its share of the sums");
  const Matrix& m = p.m;
  const int group = threadIdx.x / GROUP, own = group % G, ks = group / G, warp = threadIdx.x % GROUP / WARP;
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, first = blockIdx.y * N, part = blockIdx.z;
  u8* stages = align_shared(smem, 1024);
  u64 *full = (u64*)(stages + DEPTH * STAGE), *empty = full + DEPTH;
  i64* rings = (i64*)(empty + DEPTH);
  float* factor = (float*)(rings + N);  // of the sums of a vector
  bool any = false;
#pragma unroll
  for (int k = 0; k < G; ++k) any = any || broad_tile<FORMAT>(m, blockIdx.x + k * gridDim.x).plane;
  const BroadTile tile = broad_tile<FORMAT>(m, blockIdx.x + own * gridDim.x);
  const int planes = any ? (int)m.plane_kpad / UNIT : 0, all = planes + (int)m.kpad / UNIT;
  const int from = all * part / (int)p.parts, mine = all * (part + 1) / (int)p.parts - from;
  const int begin = from + mine * ks / KS, end = from + mine * (ks + 1) / KS, rounds = (mine + KS - 1) / KS;
  const int row = warp * 16 + g;  // and 8 below

  auto load = [&](int unit, uint2 (&to)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int local = tile.local + row + 8 * h, in_plane = tile.in_plane + row + 8 * h;
      const bool plane = unit < planes, there = tile.there && local < tile.rows && unit < end;
      const u8* at = plane ? tile.plane_data + (i64)in_plane * m.plane_stride + unit * 32 : tile.data + (i64)local * tile.stride + (unit - planes) * 32;
      to[h] = there && (!plane || (tile.plane && in_plane >= 0 && in_plane < tile.plane_rows)) ? load_pair(at + 8 * t) : uint2{0, 0};
    }
  };
  const bool all_here = (int)p.padded == N;  // then the quarters of a unit are side by side, and one copy does
  auto fetch = [&](int round) {  // by the first warp: a lane copies the 64 places of one quarter of a unit
    if (round >= rounds) return;
    u64* bar = &full[round % DEPTH];
    int bytes = 0;
#pragma unroll
    for (int k = 0; k < KS; ++k) bytes += from + mine * k / KS + round < from + mine * (k + 1) / KS ? SHARE : 0;
    if (lane == 0) barrier_expect(bar, bytes);
    sync_warp();
    const int k = lane / 4, quarter = lane % 4, unit = from + mine * k / KS + round;
    if (k >= KS || unit >= from + mine * (k + 1) / KS || (all_here && quarter)) return;
    const i64 image = unit < planes ? p.x2 : p.x;
    const int at = (unit < planes ? unit : unit - planes) * 4 + quarter;
    copy_block(stages + round % DEPTH * STAGE + k * SHARE + quarter * (SHARE / 4),
               (const u8*)image + ((i64)at * p.padded + first) * 128, all_here ? SHARE : SHARE / 4, bar);
  };

  BroadBits<SIGN> bits, next;  // of signs two units are in registers, of codes only the one that is multiplied
  if constexpr (FORMAT == SIGN) {
    load(begin, bits.row);
    load(begin + 1, next.row);
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      barrier_start(&full[i], 1);
      barrier_start(&empty[i], 4 * WARPGROUPS);
    }
    barriers_started();
  }
  float scale[2], scale2[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = tile.local + row + 8 * h, in_plane = tile.in_plane + row + 8 * h;
    const bool there = tile.there && local < tile.rows, in = there && tile.plane && in_plane >= 0 && in_plane < tile.plane_rows;
    scale[h] = there && FORMAT == SIGN ? fmaxf(half_bits_to_float(tile.scale[local]), 5.9e-8f) : 1.0f;  // never 0, the plane's is divided by it
    scale2[h] = in ? half_bits_to_float(((const u16*)m.plane_scale)[in_plane]) : 0.0f;
  }
  if (p.out.mode == IN_PROJ && (int)threadIdx.x < N && first + (int)threadIdx.x < (int)p.batch)
    rings[threadIdx.x] = (i64)next_ring_row(p.state, first + threadIdx.x);
  if (!p.late) release_next();
  __syncthreads();
  await_previous();
  if (p.late) release_next();
  if (threadIdx.x < WARP) {
    see_stores();
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) fetch(i);
  }
  if (p.squares && (int)threadIdx.x < N) {
    float sum = 0;
    const i64 v = least(first + threadIdx.x, p.batch - 1);
    for (int k = 0; k < (int)p.pieces; ++k) sum += load_fresh((const float*)p.squares + v * p.pieces + k);
    factor[threadIdx.x] = fast_rsqrt(sum / (float)m.cols + param_float(p.eps)) / IMAGE_SCALE;
  }

  float acc[HALF] = {};
  auto skip = [&](int round, int at) {
    barrier_wait(&full[round % DEPTH], round / DEPTH & 1);
    if constexpr (FORMAT == SIGN) {
      bits = next;
      load(at + 2, next.row);
    }
  };
  auto unit = [&](int round, int at) {
    BroadBits<FORMAT> w;
    if constexpr (FORMAT == SIGN) w = bits;
    else load_codes(tile, row, at - planes, w);
    skip(round, at);
    const u8* x = stages + round % DEPTH * STAGE + ks * SHARE;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const u64 right = operand_at(x + quarter * (SHARE / 4));
#pragma unroll
      for (int from_step = 0; from_step < 4; from_step += AT_ONCE) {
        u32 a[AT_ONCE][4];
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) left_operand(w, quarter * 4 + from_step + s, a[s]);
#pragma unroll
        for (int i = 0; i < 4 * AT_ONCE; ++i) refresh(a[i / 4][i % 4]);
        products_wait<1>();  // here and not before they are made, or the assembler runs one product after another
        products_begin();
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) product_at(acc, a[s], right, from_step + s);
        products_commit();
      }
    }
    products_wait<0>();
  };
  auto leave = [&](int round) {  // the stage may be filled again
    if (lane == 0) barrier_arrive(&empty[round % DEPTH]);
    if (threadIdx.x >= WARP || round + DEPTH >= rounds) return;
    barrier_wait(&empty[round % DEPTH], round / DEPTH & 1);
    fetch(round + DEPTH);
  };
  int round = 0;
  const int plane_end = planes < end ? planes : end;
#pragma unroll 1
  for (int at = begin; at < plane_end; ++at, ++round) {
    if (tile.plane) unit(round, at);
    else skip(round, at);
    leave(round);
  }
#pragma unroll
  for (int i = 0; i < HALF; ++i)
    if (begin < planes) acc[i] *= scale2[i / 2 % 2] / scale[i / 2 % 2];
#pragma unroll 1
  for (int at = begin > planes ? begin : planes; at < end; ++at, ++round) {
    unit(round, at);
    leave(round);
  }

  __syncthreads();
  float sum[EACH];
  if constexpr (KS > 1) {
    float* all_sums = (float*)stages + (group * HALF) * GROUP + threadIdx.x % GROUP;
#pragma unroll
    for (int i = 0; i < HALF; ++i) all_sums[i * GROUP] = acc[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      sum[i] = 0;
#pragma unroll
      for (int k = 0; k < KS; ++k)
        sum[i] += ((const float*)stages)[((k * G + own) * HALF + ks * EACH + i) * GROUP + threadIdx.x % GROUP];
    }
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum[i] = acc[i];
  }
  if (!tile.there) return;
  const Output& out = p.out;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = tile.local + row + 8 * h, r = tile.first + local;
    if (local >= tile.rows) continue;
    const float bias = m.bias && part == 0 ? ((const float*)m.bias)[r] : 0.0f;
    const bool in_proj = out.mode == IN_PROJ, z = in_proj && r >= (int)out.z0 && r < (int)out.z1;
    const bool ring = in_proj && !z && r >= (int)out.ring0 && r < (int)out.ring1;
    const i64 stride = z ? out.z_stride : out.stride;
    float* base = z ? (float*)out.z + r - out.z0 : (float*)out.y + part * p.part_stride + r - (in_proj ? out.rest0 : 0);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int e = ks * EACH + i, v = e / 4 * 8 + 2 * t + e % 2;
      const float y = fmaf(p.squares ? sum[i] * factor[v] : sum[i], scale[h], bias);
      if (e / 2 % 2 != h || first + v >= (int)p.batch) continue;
      *(ring ? (float*)rings[v] + (r - (int)out.ring0) : base + (first + v) * stride) = y;
    }
  }
}
