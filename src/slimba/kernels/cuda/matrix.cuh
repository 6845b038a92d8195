// A packed matrix times the vectors of a small batch: y = W x for W in signs, int8, int4 and floats with its corrections.
//
// Naive twin: `Matrix.matmul` of formats/matrix.py. Tests: tests/kernels/test_cuda_kernels.py.
//
// Every block holds the whole input in shared memory as fixed point, x = scale * (d0 * 65536 + d1 * 256 + d2) with
// signed bytes d0, d1, d2 ("slices") and one scale a token: 23 bits below the largest entry, as good as float32. Products with bits
// and int8 codes are then exact integer sums, by tensor cores and by dp4a alike, and do not depend on how the work is split.
//
// Column order. A 32-bit word of signs holds the columns 32 W .. 32 W + 31, column 32 W + i at bit i. Masking it with
// 0x01010101 << j leaves the columns 32 W + 8 b + j, b = 0..3, as four bytes of value 2^j or 0: an operand of the tensor
// core without any shift. So the slices lie in that order: byte b of word (W, j) is column 32 W + 8 b + j, and int8 and int4 codes
// are stored in the same order when a model is loaded (runtime/backends/cuda_weights.py). Every 128 columns are
// followed by 16 bytes of padding, which keeps the reads below free of bank conflicts.
#define THREADS 256
#define WARPS 8
#define TILE 16          // sign rows of one item: the rows of a tensor-core product
#define MAX_SEGMENTS 6
#define LIMIT 8355000.0f  // largest fixed-point number, a little below 127 * 65536 + 127 * 256 + 127

struct Segment {  // all fields of all structs are 64 bits wide: Python fills them as one array of int64
  i64 format, first, rows, item0, data, scale, stride, groups;
};
struct Matrix {
  i64 rows, cols, kpad, segments, items, split;  // kpad: columns in whole 512s; split: warps that share an item
  i64 rank, lr_start, lr_stop, lr_a, lr_a_scale, lr_b, lr_b_scale;  // rank in whole 16s; int8, float16
  i64 plane_cols, plane_kpad, plane_start, plane_stop, plane_stride, plane_data, plane_scale, plane_index;
  i64 col_scale, bias;  // float32 or 0
  i64 has_int4, has_float;
  Segment segment[MAX_SEGMENTS];
};
struct Input {  // e = x * silu(gate) * weight; then divided by the RMS of x over each of `groups` parts (0: not)
  i64 x, x_stride, gate, gate_stride, weight, groups, eps;
};
// Where a row of the result goes.
enum OutputMode { STORE, ADD, IN_PROJ };
struct Output {
  i64 mode, y, stride;
  // IN_PROJ: rows z0..z1 to z, rows ring0..ring1 to the convolution's ring, the others (dt) to y
  i64 z0, z1, z, z_stride, ring0, ring1, rest0;
};
struct StateRef {  // of one layer: `arrays` -> {ssm, scale, conv, pos, slots in all}; slot[b] is the place of sequence b
  i64 arrays, slot, layer, taps, channels;
};
struct Product {
  Matrix m;
  Input in;
  Output out;
  StateRef state;
  i64 batch;
};

DEV i64 state_array(const StateRef& s, int i) { return ((const i64*)s.arrays)[i]; }
DEV i64 slot_of(const StateRef& s, int b) { return ((const i32*)s.slot)[b]; }
// Row of the convolution's ring that holds the input of token `time` of the sequence in `slot`.
DEV float* ring_row(const StateRef& s, i64 slot, i64 time) {
  const i64 at = (s.layer * state_array(s, 4) + slot) * s.taps + time % s.taps;
  return (float*)state_array(s, 2) + at * s.channels;
}
DEV i64 position(const StateRef& s, i64 slot) { return ((const i32*)state_array(s, 3))[slot]; }

DEV int slice_stride(i64 kpad) {  // bytes of one slice; 64 mod 128, so that two slices side by side use other banks
  const int bytes = (int)(kpad + kpad / 8);
  return bytes % 128 ? bytes : bytes + 64;
}
DEV int slice_at(i64 c) { return (int)((c >> 5) * 32 + (c & 7) * 4 + ((c >> 3) & 3) + (c >> 7) * 16); }

template <int NB>
struct View {  // the block's shared memory; row s * NB + b of q is slice s of token b
  u8 *q, *q2;
  int stride, stride2;
  int *red, *red2;      // [WARPS][TILE][3 NB] partial sums
  int *part, *part2;    // [WARPS][3] sums of the slices, see total()
  float *scale;         // [NB]
  float *factor;        // [NB][rank], B x
  int *chunk;           // [3 NB][kpad / 32] sums of 32 columns, for int4
  float *plain;         // [NB][kpad] natural order, for float rows
  float *group_inverse; // [NB][groups]
  float *scratch;       // [4][WARPS]
  i64 *ring;            // [NB] where the convolution's new inputs go
};

template <int NB>
DEV View<NB> carve(const Matrix& m, const Input& in, u8* at) {
  View<NB> v;
  auto take = [&](i64 bytes) {
    u8* p = at;
    at += (bytes + 15) / 16 * 16;
    return p;
  };
  v.stride = slice_stride(m.kpad);
  v.stride2 = slice_stride(m.plane_kpad);
  v.q = take(3 * NB * v.stride);
  v.q2 = take(m.plane_cols ? 3 * NB * v.stride2 : 0);
  v.red = (int*)take(WARPS * TILE * 3 * NB * 4);
  v.red2 = (int*)take(m.plane_cols ? WARPS * TILE * 3 * NB * 4 : 0);
  v.part = (int*)take(WARPS * 3 * 4);
  v.part2 = (int*)take(WARPS * 3 * 4);
  v.scale = (float*)take(NB * 4);
  v.factor = (float*)take(NB * m.rank * 4);
  v.chunk = (int*)take(m.has_int4 ? 3 * NB * (m.kpad / 32) * 4 : 0);
  v.plain = (float*)take(m.has_float ? NB * m.kpad * 4 : 0);
  v.group_inverse = (float*)take(in.groups > 1 ? NB * in.groups * 4 : 0);
  v.scratch = (float*)take(4 * WARPS * 4);
  v.ring = (i64*)take(NB * 8);
  return v;
}

// Sum and largest bits over the threads of one token: the block when NB is 1, a warp when it is 8. `turn` alternates.
template <int NB>
DEV void reduce_token(View<NB>& v, float& sum, u32& top, int turn) {
  sum = warp_sum(sum);
  top = warp_max_bits(top);
  if (NB > 1) return;
  float* scratch = v.scratch + (turn & 1) * 2 * WARPS;
  const int warp = threadIdx.x / WARP;
  if (threadIdx.x % WARP == 0) {
    scratch[warp] = sum;
    scratch[WARPS + warp] = bits_to_float(top);
  }
  __syncthreads();
  sum = 0;
  top = 0;
  for (int w = 0; w < WARPS; ++w) {
    sum += scratch[w];
    const u32 bits = float_to_bits(scratch[WARPS + w]);
    top = bits > top ? bits : top;
  }
}

DEV void put_slices(u8* q, int stride, int rows_apart, int at, int v, int (&sum)[3]) {
  const int d2 = (i8)(v & 255), v1 = (v - d2) >> 8, d1 = (i8)(v1 & 255), d0 = (v1 - d1) >> 8;
  q[at] = (u8)d0;
  q[rows_apart * stride + at] = (u8)d1;
  q[2 * rows_apart * stride + at] = (u8)d2;
  sum[0] += d0;
  sum[1] += d1;
  sum[2] += d2;
}

// Sum of slice s over the columns of token b.
template <int NB>
DEV int total(const int* part, int s, int b) {
  if (NB > 1) return part[b * 3 + s];
  int sum = 0;
  for (int w = 0; w < WARPS; ++w) sum += part[w * 3 + s];
  return sum;
}

// Reads the input, norms it, and leaves the slices of all tokens in shared memory. Ends with a barrier.
template <int NB>
DEV void stage(const Matrix& m, const Input& in, i64 batch, View<NB>& v) {
  constexpr int LANES = THREADS / NB, KEEP = NB == 1 ? 16 : 1;
  const int b = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const bool on = b < batch;
  const float* x = (const float*)in.x + (on ? b : 0) * in.x_stride;
  const float* gate = in.gate ? (const float*)in.gate + (on ? b : 0) * in.gate_stride : nullptr;
  const float *weight = (const float*)in.weight, *col_scale = (const float*)m.col_scale;
  const i64 size = in.groups > 1 ? m.cols / in.groups : m.cols;
  const float eps = param_float(in.eps);
  float* inverse = v.group_inverse + b * in.groups;
  int turn = 0;
  for (i64 g = 0; in.groups > 1 && g < in.groups; ++g) {  // rare: several groups, each with its own RMS
    float squares = 0;
    u32 unused = 0;
    for (i64 i = g * size + lane; i < (g + 1) * size; i += LANES) {
      const float e = load_fresh(x + i);
      squares += e * e;
    }
    reduce_token(v, squares, unused, turn++);
    if (lane == 0) inverse[g] = 1.0f / sqrtf(squares / (float)size + eps);
  }
  if (in.groups > 1) __syncthreads();
  float keep[KEEP], squares = 0;
  u32 top = 0;
  auto element = [&](i64 i) {
    float e = load_fresh(x + i);
    squares += e * e;
    if (weight) e *= weight[i];
    if (col_scale) e *= col_scale[i];
    if (gate) e *= silu(load_fresh(gate + i));
    if (in.groups > 1) e *= inverse[i / size];
    const u32 bits = float_to_bits(e) & 0x7fffffffu;
    top = bits > top ? bits : top;
    return e;
  };
#pragma unroll
  for (int k = 0; k < KEEP; ++k) keep[k] = lane + k * LANES < m.cols ? element(lane + k * LANES) : 0.0f;
#pragma unroll NB == 1 ? 1 : 4
  for (i64 i = lane + KEEP * LANES; i < m.cols; i += LANES) element(i);
  reduce_token(v, squares, top, turn++);

  const float most = bits_to_float(top);
  const bool damaged = top >= INF_BITS, zero = most < 1e-30f;
  const float norm = in.groups == 1 ? 1.0f / sqrtf(squares / (float)m.cols + eps) : 1.0f;
  const float to_fixed = damaged || zero ? 0.0f : LIMIT / most;
  if (lane == 0) v.scale[b] = damaged ? bits_to_float(0x7fc00000u) : zero ? 0.0f : most * norm / LIMIT;
  int sum[3] = {0, 0, 0};
  u8* q = v.q + b * v.stride;
  auto put = [&](i64 i, float e) {
    put_slices(q, v.stride, NB, slice_at(i), damaged ? 0 : __float2int_rn(e * to_fixed), sum);
    if (m.has_float) v.plain[b * m.kpad + i] = e * norm;
  };
#pragma unroll
  for (int k = 0; k < KEEP; ++k)
    if (lane + k * LANES < m.kpad) put(lane + k * LANES, keep[k]);
#pragma unroll NB == 1 ? 1 : 4
  for (i64 i = lane + KEEP * LANES; i < m.kpad; i += LANES) put(i, i < m.cols ? element(i) : 0.0f);
  for (int s = 0; s < 3; ++s) {
    sum[s] = warp_sum(sum[s]);
    if (threadIdx.x % WARP == 0) v.part[threadIdx.x / WARP * 3 + s] = sum[s];
  }
  __syncthreads();
  if (m.plane_cols) {  // the chosen columns once more, side by side
    const i32* index = (const i32*)m.plane_index;
    int sum2[3] = {0, 0, 0};
    for (i64 i = lane; i < m.plane_kpad; i += LANES) {
      const int from = i < m.plane_cols ? slice_at(index[i]) : 0, to = slice_at(i);
      for (int s = 0; s < 3; ++s) {
        const u8 d = i < m.plane_cols ? q[s * NB * v.stride + from] : (u8)0;
        v.q2[(s * NB + b) * v.stride2 + to] = d;
        sum2[s] += (i8)d;
      }
    }
    for (int s = 0; s < 3; ++s) {
      sum2[s] = warp_sum(sum2[s]);
      if (threadIdx.x % WARP == 0) v.part2[threadIdx.x / WARP * 3 + s] = sum2[s];
    }
  }
  if (m.has_int4) {
    const int chunks = (int)(m.kpad / 32);
    for (int i = threadIdx.x; i < 3 * NB * chunks; i += THREADS) {
      const u32* words = (const u32*)(v.q + i / chunks * v.stride + slice_at(i % chunks * 32));
      int s = 0;
      for (int k = 0; k < 8; ++k) s = dot4(words[k], 0x01010101u, s);
      v.chunk[i] = s;
    }
  }
  if (m.plane_cols || m.has_int4) __syncthreads();
}

DEV float combine(int d0, int d1, int d2) {
  return fmaf((float)d0, 65536.0f, fmaf((float)d1, 256.0f, (float)d2));
}
DEV u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// acc[s NB + b] += codes (16 bytes each chunk, chunks first, first + step, ...) times the slices.
template <int NB>
DEV void dot_int8(const u8* row, i64 kpad, i64 first, i64 step, const View<NB>& v, int (&acc)[3 * NB]) {
#pragma unroll NB == 1 ? 4 : 1
  for (i64 c = first; c < kpad / 16; c += step) {
    const uint4 w = load_weights(row + c * 16);
    const u8* x = v.q + c * 16 + (c >> 3) * 16;
#pragma unroll
    for (int n = 0; n < 3 * NB; ++n) {
      const uint4 d = *(const uint4*)(x + n * v.stride);
      acc[n] = dot4(w.x, d.x, dot4(w.y, d.y, dot4(w.z, d.z, dot4(w.w, d.w, acc[n]))));
    }
  }
}

// Partial sums of TILE sign rows over the 512-column steps kw, kw + split, ... to red[TILE][3 NB]: the sum of the slices
// where a bit is set.
template <int NB>
DEV void sign_tile(const u8* data, i64 stride, i64 row0, i64 row1, i64 rows, i64 kpad, int kw, int split, const u8* q,
                   int q_stride, int* red) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  constexpr int ACC = NB == 1 ? 8 : 3;  // NB 1: one sum a bit position, slices in the columns; else one a slice
  int acc[ACC][4] = {};
  const bool has0 = row0 + g >= 0 && row0 + g < rows, has1 = row1 + g >= 0 && row1 + g < rows;
  const u8 *p0 = data + (has0 ? row0 + g : 0) * stride + t * 16, *p1 = data + (has1 ? row1 + g : 0) * stride + t * 16;
  const uint4 none = {0, 0, 0, 0};
#pragma unroll 2
  for (i64 s = kw; s < kpad / 512; s += split) {
    const uint4 wa = has0 ? load_weights(p0 + s * 64) : none, wb = has1 ? load_weights(p1 + s * 64) : none;
    const u8* x = q + (s * 4 + t) * 144;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const u32 w0 = word(wa, 2 * pair), w1 = word(wa, 2 * pair + 1), u0 = word(wb, 2 * pair), u1 = word(wb, 2 * pair + 1);
#pragma unroll
      for (int n = 0; n < (NB == 1 ? 1 : 3); ++n) {
        uint4 lo[2] = {none, none}, hi[2] = {none, none};
        if (NB > 1 || g < 3) {
          const u8* row = x + (NB == 1 ? g : n * NB + g) * q_stride + pair * 64;
          lo[0] = *(const uint4*)row;
          lo[1] = *(const uint4*)(row + 16);
          hi[0] = *(const uint4*)(row + 32);
          hi[1] = *(const uint4*)(row + 48);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const u32 b0 = word(lo[j / 4], j % 4), b1 = word(hi[j / 4], j % 4);
          if (NB == 1) {
            const u32 mask = 0x01010101u << j;
            mma_u8s8(acc[j % ACC], w0 & mask, u0 & mask, w1 & mask, u1 & mask, b0, b1);
          } else {
            const u32 mask = 0x01010101u;
            mma_u8s8(acc[n % ACC], (w0 >> j) & mask, (u0 >> j) & mask, (w1 >> j) & mask, (u1 >> j) & mask, b0, b1);
          }
        }
      }
    }
  }
  if (NB == 1) {
    int sum[4] = {0, 0, 0, 0};
    for (int j = 0; j < ACC; ++j)
      for (int k = 0; k < 4; ++k) sum[k] += acc[j][k] >> j;
    for (int k = 0; k < 4; ++k) {
      const int n = 2 * t + (k & 1);
      if (n < 3) red[(g + (k >> 1) * 8) * 3 + n] = sum[k];
    }
  } else {
    for (int n = 0; n < 3; ++n)
      for (int k = 0; k < 4; ++k)
        red[(g + (k >> 1) * 8) * 3 * NB + n * NB + 2 * t + (k & 1)] = acc[n % ACC][k];
  }
}
