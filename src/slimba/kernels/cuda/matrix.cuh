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
#define TILE 16          // rows of a tile: the rows of a tensor-core product
#define MAX_SEGMENTS 6
#define LIMIT 8355000.0f  // largest fixed-point number, a little below 127 * 65536 + 127 * 256 + 127
#define RAW 8             // 16-byte loads that a lane has in flight

// In float16, the left operand of one tensor-core product: rows g and g + 8, columns c and c + 16, c + 1 and c + 17, c = 2 jj.
DEV u32 sign_pair(u32 w, int up) { return (w << up & 0x80008000u) ^ 0xbc00bc00u; }
DEV u32 int8_pair(u32 w, int jj) {  // w: columns j + 8 b of a word of codes; bytes 0 and 2, or 1 and 3
  return add_halves(byte_perm(w ^ 0x80808080u, 0x64646464u, jj < 4 ? 0x4240u : 0x4341u), 0xe480e480u);  // - 1152
}

struct Segment {  // all fields of all structs are 64 bits wide: Python fills them as one array of int64
  i64 format, first, rows, item0, each, scale, stride, groups, data;  // each: rows of an item, TILE or 1
};
struct Matrix {
  i64 rows, cols, kpad, segments, items, split;  // kpad: columns in whole 512s; split: warps that share an item
  i64 rank, lr_start, lr_stop;  // rank in whole 16s
  i64 plane_cols, plane_kpad, plane_start, plane_stop, plane_stride;
  i64 has_float, formats;  // formats: bit f is set where a segment has format f
  i64 hadamard, rounding;  // of the input (turn.cuh): columns of a block of the transform, 0 or 1 for none; enum Rounding
  Segment segment[MAX_SEGMENTS];
  i64 lr_a, lr_a_scale, lr_b, lr_b_scale;  // int8, float16
  i64 plane_data, plane_scale, plane_index;
  i64 col_scale, bias;  // float32 or 0
  i64 input_step;       // float32, of ROUND_FIXED
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
struct StateRef {  // of one layer: `arrays` -> {ssm, scale, conv, pos, slots in all, kept u, b, L}; slot[b]: place of sequence b
  i64 arrays, slot, layer, taps, channels;
};
struct Product {
  Matrix m;
  Input in;
  Output out;
  StateRef state;
  i64 batch, plane_inverse;  // plane_inverse: i32 [cols], the place of a column in the second plane or -1
};

DEV i64 state_array(const StateRef& s, int i) { return ((const i64*)s.arrays)[i]; }
DEV i64 slot_of(const StateRef& s, int b) { return ((const i32*)s.slot)[b]; }
// Row of the convolution's ring that holds the input of token `time` of the sequence in `slot`.
DEV float* ring_row(const StateRef& s, i64 slot, i64 time) {
  const i64 at = (s.layer * state_array(s, 4) + slot) * s.taps + time % s.taps;
  return (float*)state_array(s, 2) + at * s.channels;
}
DEV i64 position(const StateRef& s, i64 slot) { return ((const i32*)state_array(s, 3))[slot]; }
// Where the ring takes the next input of sequence b.
DEV float* next_ring_row(const StateRef& s, int b) {
  const i64 slot = slot_of(s, b);
  return ring_row(s, slot, position(s, slot));
}

DEV int slice_stride(int kpad) {  // bytes of one slice; 64 mod 128, so that two slices side by side use other banks
  const int bytes = kpad + kpad / 8;
  return bytes % 128 ? bytes : bytes + 64;
}
DEV int slice_at(int c) { return (c >> 5) * 32 + (c & 7) * 4 + ((c >> 3) & 3) + (c >> 7) * 16; }

template <int NB>
struct View {  // the block's shared memory; row s * NB + b of q is slice s of token b
  u8 *q, *q2;
  int stride, stride2;
  int *red, *red2;      // [WARPS][TILE][3 NB] partial sums
  int *part, *part2;    // [3][WARPS] sums of the slices, see total()
  float *scale;         // [NB]
  float *factor;        // [NB][rank], B x
  float *plain;         // [NB][kpad] natural order, for float rows
  float *group_inverse; // [NB][groups]
  float *scratch;       // [4][WARPS]
  i64 *ring;            // [NB] where the convolution's new inputs go
  float *turned;        // [NB][kpad] natural order, the transformed input
};

template <int NB>
DEV View<NB> carve(const Matrix& m, const Input& in, u8* at) {
  View<NB> v;
  auto take = [&](int bytes) {
    u8* p = at;
    at += (bytes + 15) / 16 * 16;
    return p;
  };
  v.stride = slice_stride((int)m.kpad);
  v.stride2 = slice_stride((int)m.plane_kpad);
  v.q = take(3 * NB * v.stride);
  v.q2 = take(m.plane_cols ? 3 * NB * v.stride2 : 0);
  v.red = (int*)take(WARPS * TILE * 3 * NB * 4);
  v.red2 = (int*)take(m.plane_cols ? WARPS * TILE * 3 * NB * 4 : 0);
  v.part = (int*)take(WARPS * 3 * 4);
  v.part2 = (int*)take(WARPS * 3 * 4);
  v.scale = (float*)take(NB * 4);
  v.factor = (float*)take(NB * (int)m.rank * 4);
  v.plain = (float*)take(m.has_float ? NB * (int)m.kpad * 4 : 0);
  v.group_inverse = (float*)take(in.groups > 1 ? NB * (int)in.groups * 4 : 0);
  v.scratch = (float*)take(4 * WARPS * 4);
  v.ring = (i64*)take(NB * 8);
  v.turned = (float*)take(m.hadamard > 1 ? NB * (int)m.kpad * 4 : 0);
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

// Sum of slice s over the columns of token b.
template <int NB>
DEV int total(const int* part, int s, int b) {
  if (NB > 1) return part[s * WARPS + b];
  int sum = 0;
  for (int w = 0; w < WARPS; ++w) sum += part[s * WARPS + w];
  return sum;
}
template <int NB>
DEV void put_totals(int* part, int (&sum)[3]) {
  for (int s = 0; s < 3; ++s) {
    sum[s] = warp_sum(sum[s]);
    if (threadIdx.x % WARP == 0) part[s * WARPS + threadIdx.x / WARP] = sum[s];
  }
}

// The columns of word w of a slice are column_of(w) + 8 b, b = 0..3; it lies at word_at(w).
DEV int column_of(int w) { return (w >> 3) * 32 + (w & 7); }
DEV int word_at(int w) { return w * 4 + (w >> 5) * 16; }

// Four fixed-point numbers as a word of each slice. Adding and flipping 0x8080 turns the low bytes into signed digits.
DEV void slice_words(const int (&v)[4], u32 (&d)[3]) {
  u32 u[4];
  for (int b = 0; b < 4; ++b) u[b] = ((u32)v[b] + 0x8080u) ^ 0x8080u;
  for (int s = 0; s < 3; ++s) {  // slice 0 holds the highest digits
    const u32 pick = (u32)(2 - s) | (u32)(6 - s) << 4;
    d[s] = byte_perm(byte_perm(u[0], u[1], pick), byte_perm(u[2], u[3], pick), 0x5410u);
  }
}

#define KEEP_WORDS 4  // words of a slice that a thread keeps in registers when NB is 1 (up to 4096 columns); else 8
// What multiplies the input, asked for before the input is there.
template <int NB>
struct Weights {
  float w[KEEP_WORDS][4];
};
template <int NB>
DEV Weights<NB> load_norm(const Matrix& m, const Input& in) {
  Weights<NB> out;
#pragma unroll
  for (int k = 0; k < KEEP_WORDS; ++k)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int w = (int)threadIdx.x + k * THREADS, c = column_of(w) + 8 * b;
      const bool there = NB == 1 && w < (int)m.kpad / 4 && (m.cols == m.kpad || c < (int)m.cols);
      out.w[k][b] = there && in.weight ? ((const float*)in.weight)[c] : 1.0f;
    }
  return out;
}

#define PLANE_WORDS 2  // words of a slice of the second plane whose columns a thread knows when NB is 1
template <int NB>
struct PlaneColumns {
  i32 at[PLANE_WORDS][4];
};
template <int NB>
DEV PlaneColumns<NB> load_plane(const Matrix& m) {
  PlaneColumns<NB> out;
#pragma unroll
  for (int k = 0; k < PLANE_WORDS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int w = (int)threadIdx.x + k * THREADS, c = column_of(w) + 8 * i;
      out.at[k][i] = NB == 1 && c < (int)m.plane_cols ? ((const i32*)m.plane_index)[c] : -1;
    }
  return out;
}

// Reads the input, norms it, and leaves the slices of all tokens in shared memory. Ends with a barrier.
template <int NB>
DEV void stage(const Matrix& m, const Input& in, int batch, const Weights<NB>& norm_weight, const PlaneColumns<NB>& plane, View<NB>& v) {
  constexpr int LANES = THREADS / NB, KEEP = NB == 1 ? KEEP_WORDS : 8;
  const int b = threadIdx.x / LANES, lane = threadIdx.x % LANES, cols = (int)m.cols, words = (int)m.kpad / 4;
  const bool on = b < batch, whole = m.cols == m.kpad, turns = m.hadamard > 1;
  const float* x = (const float*)in.x + (on ? b : 0) * in.x_stride;
  const float* gate = in.gate ? (const float*)in.gate + (on ? b : 0) * in.gate_stride : nullptr;
  const float *weight = (const float*)in.weight, *col_scale = (const float*)m.col_scale;
  const int groups = (int)in.groups, size = groups > 1 ? cols / groups : cols;
  const float eps = param_float(in.eps);
  float* inverse = v.group_inverse + b * groups;
  int turn = 0;
  for (int g = 0; groups > 1 && g < groups; ++g) {  // rare: several groups, each with its own RMS
    float squares = 0;
    u32 unused = 0;
    for (int i = g * size + lane; i < (g + 1) * size; i += LANES) {
      const float e = load_fresh(x + i);
      squares += e * e;
    }
    reduce_token(v, squares, unused, turn++);
    if (lane == 0) inverse[g] = fast_rsqrt(squares / (float)size + eps);
  }
  if (groups > 1) __syncthreads();
  float keep[KEEP][4], squares = 0;
  u32 top = 0;
  auto finish = [&](float e, int c, float w) {
    squares += e * e;
    e *= w;
    if (col_scale && !turns) e *= col_scale[c];
    if (gate) e *= silu(load_fresh(gate + c));
    if (groups > 1) e *= inverse[c / size];
    const u32 bits = float_to_bits(e) & 0x7fffffffu;
    top = bits > top ? bits : top;
    return e;
  };
  auto word = [&](int w, float (&e)[4]) {  // the elements of a word
    for (int i = 0; i < 4; ++i) {
      const int c = column_of(w) + 8 * i;
      e[i] = whole || c < cols ? finish(load_fresh(x + c), c, weight ? weight[c] : 1.0f) : 0.0f;
    }
  };
#pragma unroll
  for (int k = 0; k < KEEP; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int w = lane + k * LANES, c = column_of(w) + 8 * i;
      keep[k][i] = w < words && (whole || c < cols) ? load_fresh(x + c) : 0.0f;
    }
#pragma unroll
  for (int k = 0; k < KEEP; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int w = lane + k * LANES, c = column_of(w) + 8 * i;
      const float wanted = NB == 1 ? norm_weight.w[k % KEEP_WORDS][i] : weight && w < words && c < cols ? weight[c] : 1.0f;
      if (w < words && (whole || c < cols)) keep[k][i] = finish(keep[k][i], c, wanted);
    }
  float* turned = v.turned + b * (int)m.kpad;
#pragma unroll NB == 1 ? 1 : 4
  for (int w = lane + KEEP * LANES; w < words; w += LANES) {
    float e[4];
    word(w, e);
    for (int i = 0; turns && i < 4; ++i) turned[column_of(w) + 8 * i] = e[i];
  }
  auto again = [&](int w, float (&e)[4]) {  // the elements of a word once more
    if (!turns) return word(w, e);
    for (int i = 0; i < 4; ++i) {
      const int c = column_of(w) + 8 * i;
      e[i] = whole || c < cols ? turned[c] * (col_scale ? col_scale[c] : 1.0f) : 0.0f;
    }
  };
  if (turns) {
    top = 0;
#pragma unroll
    for (int k = 0; k < KEEP; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (lane + k * LANES < words) turned[column_of(lane + k * LANES) + 8 * i] = keep[k][i];
    __syncthreads();
    transform(turned, cols, (int)m.hadamard, lane, LANES);
    auto measure = [&](const float (&e)[4]) {
      for (int i = 0; i < 4; ++i) {
        const u32 bits = float_to_bits(e[i]) & 0x7fffffffu;
        top = bits > top ? bits : top;
      }
    };
#pragma unroll
    for (int k = 0; k < KEEP; ++k)
      if (lane + k * LANES < words) {
        again(lane + k * LANES, keep[k]);
        measure(keep[k]);
      }
    for (int w = lane + KEEP * LANES; w < words; w += LANES) {
      float e[4];
      again(w, e);
      measure(e);
    }
  }
  reduce_token(v, squares, top, turn++);

  const float most = bits_to_float(top);
  const bool damaged = top >= INF_BITS, zero = most < 1e-30f;
  const float norm = groups == 1 ? fast_rsqrt(squares / (float)cols + eps) : 1.0f;
  const CodeScale code = m.rounding ? code_scale(m.rounding, top, m.input_step) : CodeScale{0.0f, 0.0f};
  float to_fixed = damaged || zero ? 0.0f : LIMIT * fast_reciprocal(most), back = zero ? 0.0f : norm * fast_reciprocal(to_fixed);
  if (m.rounding) {  // codes are the lowest slice, the others are 0; a token's own scale does not change with its norm
    to_fixed = m.rounding == ROUND_FIXED ? code.to_code * norm : code.to_code;
    back = m.rounding == ROUND_FIXED ? code.step : code.step * norm;
  }
  if (lane == 0) v.scale[b] = damaged ? bits_to_float(0x7fc00000u) : back;
  int sum[3] = {0, 0, 0};
  u8* q = v.q + b * v.stride;
  auto put = [&](int w, const float (&e)[4]) {
    int fixed[4];
    u32 d[3];
    for (int i = 0; i < 4; ++i)
      fixed[i] = damaged ? 0 : m.rounding ? (int)code_of(e[i], to_fixed) : __float2int_rn(e[i] * to_fixed);
    slice_words(fixed, d);
    for (int s = 0; s < 3; ++s) {
      *(u32*)(q + s * NB * v.stride + word_at(w)) = d[s];
      sum[s] = dot4(d[s], 0x01010101u, sum[s]);
    }
    if (m.has_float)
      for (int i = 0; i < 4; ++i)
        v.plain[b * (int)m.kpad + column_of(w) + 8 * i] = m.rounding ? (float)fixed[i] * back : e[i] * norm;
  };
#pragma unroll
  for (int k = 0; k < KEEP; ++k)
    if (lane + k * LANES < words) put(lane + k * LANES, keep[k]);
#pragma unroll NB == 1 ? 1 : 4
  for (int w = lane + KEEP * LANES; w < words; w += LANES) {
    float e[4];
    again(w, e);
    put(w, e);
  }
  put_totals<NB>(v.part, sum);
  __syncthreads();
  if (!m.plane_cols) return;
  const i32* index = (const i32*)m.plane_index;  // the chosen columns once more, side by side
  int sum2[3] = {0, 0, 0};
  auto put_chosen = [&](int w, const i32 (&columns)[4]) {
    u32 d[3] = {0, 0, 0};
    for (int i = 0; i < 4; ++i) {
      if (columns[i] < 0) continue;
      const int from = slice_at(columns[i]);
      for (int s = 0; s < 3; ++s) d[s] |= (u32)q[s * NB * v.stride + from] << 8 * i;
    }
    for (int s = 0; s < 3; ++s) {
      *(u32*)(v.q2 + (s * NB + b) * v.stride2 + word_at(w)) = d[s];
      sum2[s] = dot4(d[s], 0x01010101u, sum2[s]);
    }
  };
  constexpr int KNOWN = NB == 1 ? PLANE_WORDS : 0;
#pragma unroll
  for (int k = 0; k < KNOWN; ++k)
    if (lane + k * LANES < (int)m.plane_kpad / 4) put_chosen(lane + k * LANES, plane.at[k]);
#pragma unroll 1
  for (int w = lane + KNOWN * LANES; w < (int)m.plane_kpad / 4; w += LANES) {
    i32 columns[4];
    for (int i = 0; i < 4; ++i) columns[i] = column_of(w) + 8 * i < (int)m.plane_cols ? index[column_of(w) + 8 * i] : -1;
    put_chosen(w, columns);
  }
  put_totals<NB>(v.part2, sum2);
  __syncthreads();
}

DEV float combine(float d0, float d1, float d2) { return fmaf(d0, 65536.0f, fmaf(d1, 256.0f, d2)); }
DEV u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

DEV void put_output(const Output& o, i64 ring, int row, int b, float y) {
  if (o.mode == STORE) {
    ((float*)o.y)[b * o.stride + row] = y;
  } else if (o.mode == ADD) {
    float* u = (float*)o.y + b * o.stride + row;
    *u = load_fresh(u) + y;
  } else if (row >= (int)o.z0 && row < (int)o.z1) {
    ((float*)o.z)[b * o.z_stride + row - (int)o.z0] = y;
  } else if (row >= (int)o.ring0 && row < (int)o.ring1) {
    ((float*)ring)[row - (int)o.ring0] = y;
  } else {
    ((float*)o.y)[b * o.stride + row - (int)o.rest0] = y;
  }
}
