// Products of a packed matrix with some tens to hundreds of vectors: y = W x in float16 on the tensor cores, W expanded
// in registers from its bits or codes, which is all that is read of it.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_kernels.py.
//
// slimba_mid_norm puts the vectors in float16 into the order that the products want: column c of 32 lies at place_of(c), so that
// two bits 16 apart, or two bytes of a word of codes, are a pair of halves of the tensor core's left operand. A block of
// slimba_mid takes 8 NT vectors and strips of R tiles of 16 rows, one a warp; with S > 1, S warps share a strip and
// take different words of its columns. Vectors pass through shared memory in chunks of 512 columns, STAGES - 1 ahead.
#define CHUNK_COLS 512
#define STAGES 3
#define PIECE 272                 // bytes of 128 columns of a vector in shared memory, padding included
#define VECTOR_BYTES (4 * PIECE)  // of a chunk of a vector

struct Mid {
  Matrix m;
  Output out;
  StateRef state;
  i64 batch, x, x2, factors;
  i64 parts, part_stride;  // parts: the columns are divided among so many blocks, each with its own result
};

// Where a warp's strip of R tiles lies: rows row0 .. of segment s, those from `rows` on do not exist.
struct Strip {
  Segment s;
  int row0, rows;
  bool there;
};
template <int R>
DEV Strip strip_of(const Matrix& m, int at) {
  Strip out = {m.segment[0], 0, 0, false};
#pragma unroll
  for (int k = 0; k < MAX_SEGMENTS; ++k) {
    if (k >= (int)m.segments) continue;
    const int strips = ((int)m.segment[k].rows + TILE * R - 1) / (TILE * R);
    if (!out.there && at < strips) {
      out.s = m.segment[k];
      out.row0 = at * TILE * R;
      out.rows = (int)out.s.rows;
      out.there = true;
    }
    at -= strips;
  }
  return out;
}

DEV u32 int4_pair(u32 w, int down, u32 scale) {
  return mul_halves(add_halves((w >> down & 0x000f000fu) ^ 0x64086408u, 0xe408e408u), scale);  // - 1032
}

// Sign words of a chunk for the R tiles of a strip: `WORDS` consecutive words of rows g and g + 8 of each.
template <int R, int WORDS>
DEV void load_bits(const u8* data, i64 stride, int row0, int first, int stop, int at, u32 (&raw)[R][2][WORDS]) {
  const int g = threadIdx.x % WARP / 4;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + r * TILE + g + 8 * h;
      const u8* from = data + (i64)row * stride + at;
      const bool there = row >= first && row < stop;
      if constexpr (WORDS == 4) {
        const uint4 v = there ? load_weights(from) : uint4{0, 0, 0, 0};
        raw[r][h][0] = v.x, raw[r][h][1] = v.y, raw[r][h][2] = v.z, raw[r][h][3] = v.w;
      } else {
#pragma unroll
        for (int k = 0; k < WORDS; ++k) raw[r][h][k] = there ? ((const u32*)from)[k] : 0;
      }
    }
}

// acc += the word i of a chunk (32 columns a lane) times the vectors at x.
template <int NT, int R, typename Left>
DEV void mid_word(const u8* x, int i, float (&acc)[R][NT][4], Left left) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u8* from = x + g * VECTOR_BYTES + t * PIECE + i * 64;
#pragma unroll
  for (int two = 0; two < 4; ++two) {
    uint4 b[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = *(const uint4*)(from + n * 8 * VECTOR_BYTES + two * 16);
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        u32 a[4];
        left(r, 2 * two + k, a);
#pragma unroll
        for (int n = 0; n < NT; ++n)
          mma_f16(acc[r][n], a[0], a[1], a[2], a[3], k ? b[n].z : b[n].x, k ? b[n].w : b[n].y);
      }
  }
}

// Factor of the sums of a row; int4 rows have theirs in the products already. Never 0, because the plane's is divided by it.
DEV float mid_scale(const Segment& s, int row) {
  return s.format == INT4 ? 1.0f : fmaxf(half_bits_to_float(((const u16*)s.scale)[row]), 5.9e-8f);
}

// Scale, low rank and bias of 16 rows, then to where they go. `rings` as in View.
template <int NT>
DEV void mid_finish(const Mid& p, const Output& out, const Segment& s, int row0, int first, bool whole, const i64* rings,
                    float (&acc)[NT][4]) {
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, rank = (int)m.rank;
  const bool corrected = rank && whole && (int)s.first + row0 + TILE > (int)m.lr_start && (int)s.first + row0 < (int)m.lr_stop;
  float lr_scale[2] = {0, 0}, lr[NT][4] = {};
  int lr_row[2];
  for (int h = 0; h < 2; ++h) {
    const int at = (int)s.first + row0 + g + 8 * h - (int)m.lr_start;
    const bool there = corrected && at >= 0 && at < (int)(m.lr_stop - m.lr_start);
    lr_row[h] = there ? at : 0;
    if (there) lr_scale[h] = half_bits_to_float(((const u16*)m.lr_a_scale)[at]);
  }
#pragma unroll 1
  for (int k0 = 0; corrected && k0 < rank; k0 += 16) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const i8* code = (const i8*)m.lr_a + (i64)lr_row[i & 1] * rank + k0 + i / 2 * 8 + 2 * t;
      a[i] = pack_halves((float)code[0], (float)code[1]);
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int b = (int)least(first + n * 8 + g, p.batch - 1);
      const u32* factor = (const u32*)((const u16*)p.factors + b * rank + k0 + 2 * t);
      mma_f16(lr[n], a[0], a[1], a[2], a[3], factor[0], factor[4]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = row0 + g + 8 * h, row = (int)s.first + local;
    if (local >= (int)s.rows) break;
    const float scale = mid_scale(s, local), bias = m.bias && whole ? ((const float*)m.bias)[row] : 0.0f;
    // where the row goes: base + v * stride for vector v, or a row of its ring
    const bool in_proj = out.mode == IN_PROJ, z = in_proj && row >= (int)out.z0 && row < (int)out.z1;
    const bool ring = in_proj && !z && row >= (int)out.ring0 && row < (int)out.ring1;
    const i64 stride = z ? out.z_stride : out.stride;
    float* base = z ? (float*)out.z + row - out.z0 : (float*)out.y + row - (in_proj ? out.rest0 : 0);
    base += first * stride;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int v = n * 8 + 2 * t + c;
        if (first + v >= (int)p.batch) continue;
        float* at = ring ? (float*)rings[v] + (row - (int)out.ring0) : base + v * (int)stride;
        *at = fmaf(acc[n][2 * h + c], scale, fmaf(lr_scale[h], lr[n][2 * h + c], bias));
      }
  }
}

// acc += words first .. of chunk `at`, COUNT of them, of a strip of codes.
template <int NT, int R, int COUNT>
DEV void mid_int8(const Segment& s, int row0, int rows, int at, const u8* x, int first, float (&acc)[R][NT][4]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  uint4 q[COUNT][R][2][2];
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int row = row0 + r * TILE + g + h / 2 * 8;
        const u8* from = (const u8*)s.data + row * s.stride + at * 512 + t * 128 + (first + k) * 32 + h % 2 * 16;
        q[k][r][h / 2][h % 2] = row < rows ? load_weights(from) : uint4{0, 0, 0, 0};
      }
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
    mid_word<NT, R>(x, first + k, acc, [&](int r, int jj, u32 (&a)[4]) {
      const int j = 2 * jj % 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        a[h] = int8_pair(word(q[k][r][h][j / 4], j % 4), jj);
        a[2 + h] = int8_pair(word(q[k][r][h][j / 4], j % 4 + 1), jj);
      }
    });
}
template <int NT, int R, int COUNT>
DEV void mid_int4(const Segment& s, int row0, int rows, int at, const u8* x, int first, float (&acc)[R][NT][4]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, group = at * 4 + t;
  uint4 q[COUNT][R][2];
  u32 scale[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + r * TILE + g + h * 8;
      const bool there = row < rows && group < (int)s.groups;
#pragma unroll
      for (int k = 0; k < COUNT; ++k)
        q[k][r][h] = there ? load_weights((const u8*)s.data + row * s.stride + at * 256 + t * 64 + (first + k) * 16) : uint4{0, 0, 0, 0};
      scale[r][h] = there ? ((const u16*)s.scale)[row * s.groups + group] * 0x10001u : 0;
    }
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
    mid_word<NT, R>(x, first + k, acc, [&](int r, int jj, u32 (&a)[4]) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        a[h] = int4_pair(word(q[k][r][h], jj % 4), jj < 4 ? 0 : 8, scale[r][h]);
        a[2 + h] = int4_pair(word(q[k][r][h], jj % 4), jj < 4 ? 4 : 12, scale[r][h]);
      }
    });
}

template <int NT, int R, int S>
DEV void mid(const Mid& p, u8* smem) {
  constexpr int WORDS = 4 / S, STAGE = 8 * NT * VECTOR_BYTES;
  constexpr int AT_ONCE = R == 1 ? WORDS : 1;  // words of codes whose loads are in flight together
  const Matrix& m = p.m;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, ks = warp % S;
  const int first = blockIdx.y * 8 * NT, part = blockIdx.z;
  const Strip strip = strip_of<R>(m, blockIdx.x * (WARPS / S) + warp / S);
  const Segment& s = strip.s;
  const int all = (int)m.kpad / CHUNK_COLS, parts = (int)p.parts;
  const int from = all * part / parts, until = all * (part + 1) / parts;  // main chunks of this block
  const int planes = part == 0 ? (int)m.plane_kpad / CHUNK_COLS : 0, chunks = planes + until - from;
  const int in_plane = (int)s.first - (int)m.plane_start + strip.row0;  // the strip's first row in the plane
  const bool sign = strip.there && s.format == SIGN;
  float acc[R][NT][4] = {};
  u32 raw[R][2][WORDS], next[R][2][WORDS];

  auto bits = [&](int c, u32 (&to)[R][2][WORDS]) {
    const int at = 16 * t + ks * WORDS * 4;
    if (c < planes)
      load_bits<R, WORDS>((const u8*)m.plane_data, m.plane_stride, in_plane, 0, (int)(m.plane_stop - m.plane_start), c * 64 + at, to);
    else
      load_bits<R, WORDS>((const u8*)s.data, s.stride, strip.row0, 0, strip.rows, (from + c - planes) * 64 + at, to);
  };
  auto fetch_chunk = [&](int c) {  // 16-byte pieces of all vectors; those beyond the batch repeat the last
    const bool plane = c < planes;
    const u8* x = (const u8*)(plane ? p.x2 : p.x) + (plane ? c : from + c - planes) * (CHUNK_COLS * 2);
    const int stride = 2 * (int)(plane ? m.plane_kpad : m.kpad), piece = threadIdx.x % 64, last = (int)p.batch - 1;
    u8* to = smem + c % STAGES * STAGE + piece / 16 * PIECE + piece % 16 * 16;
#pragma unroll
    for (int v = threadIdx.x / 64; v < 8 * NT; v += THREADS / 64) {
      const int b = first + v < last ? first + v : last;
      copy_async(to + v * VECTOR_BYTES, x + (i64)(b * stride) + piece * 16);
    }
  };

  if (sign && chunks) bits(0, next);
  i64* rings = (i64*)(smem + STAGES * STAGE);
  await_previous();
  release_next();
  if (p.out.mode == IN_PROJ && (int)threadIdx.x < 8 * NT && first + (int)threadIdx.x < (int)p.batch)
    rings[threadIdx.x] = (i64)next_ring_row(p.state, first + threadIdx.x);
#pragma unroll
  for (int c = 0; c < STAGES - 1; ++c) {
    if (c < chunks) fetch_chunk(c);
    commit_copies();
  }
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    if (c + STAGES - 1 < chunks) fetch_chunk(c + STAGES - 1);
    commit_copies();
    const u8* x = smem + c % STAGES * STAGE;
    if (sign) {
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int k = 0; k < WORDS; ++k) raw[r][h][k] = next[r][h][k];
      if (c + 1 < chunks) bits(c + 1, next);
#pragma unroll 1
      for (int k = 0; k < WORDS; ++k) {  // a loop, because all words unrolled are more instructions than the caches hold
        mid_word<NT, R>(x, ks * WORDS + k, acc, [&](int r, int jj, u32 (&a)[4]) {
          a[0] = sign_pair(raw[r][0][0], 15 - 2 * jj), a[1] = sign_pair(raw[r][1][0], 15 - 2 * jj);
          a[2] = sign_pair(raw[r][0][0], 14 - 2 * jj), a[3] = sign_pair(raw[r][1][0], 14 - 2 * jj);
        });
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i + 1 < WORDS; ++i) raw[r][h][i] = raw[r][h][i + 1];
      }
      if (c + 1 == planes) {  // what follows is multiplied by the rows' scales, this by those of the plane
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = strip.row0 + r * TILE + g + 8 * h, at = in_plane + r * TILE + g + 8 * h;
            const bool there = row < strip.rows && at >= 0 && at < (int)(m.plane_stop - m.plane_start);
            const float by = there ? half_bits_to_float(((const u16*)m.plane_scale)[at]) / mid_scale(s, row) : 0.0f;
#pragma unroll
            for (int n = 0; n < NT; ++n) acc[r][n][2 * h] *= by, acc[r][n][2 * h + 1] *= by;
          }
      }
    } else if (strip.there && c >= planes) {
      const int at = from + c - planes;
#pragma unroll 1
      for (int k0 = 0; k0 < WORDS; k0 += AT_ONCE) {
        if (s.format == INT8) mid_int8<NT, R, AT_ONCE>(s, strip.row0, strip.rows, at, x, ks * WORDS + k0, acc);
        else mid_int4<NT, R, AT_ONCE>(s, strip.row0, strip.rows, at, x, ks * WORDS + k0, acc);
      }
    }
  }

  if (S > 1) {  // sums of the warps of a strip
    __syncthreads();
    float* sums = (float*)smem + warp / S * (S - 1) * R * NT * 4 * WARP + lane;
#pragma unroll
    for (int i = 0; i < R * NT * 4; ++i)
      if (ks) sums[((ks - 1) * R * NT * 4 + i) * WARP] = acc[i / (NT * 4)][i / 4 % NT][i % 4];
    __syncthreads();
#pragma unroll
    for (int k = 1; k < S; ++k)
#pragma unroll
      for (int i = 0; i < R * NT * 4; ++i)
        if (ks == 0) acc[i / (NT * 4)][i / 4 % NT][i % 4] += sums[((k - 1) * R * NT * 4 + i) * WARP];
  }
  if (ks || !strip.there) return;
  Output out = p.out;
  out.y += part * p.part_stride * 4;
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (strip.row0 + r * TILE < strip.rows) mid_finish<NT>(p, out, s, strip.row0 + r * TILE, first, part == 0, rings, acc[r]);
}
