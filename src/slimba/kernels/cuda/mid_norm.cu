// Vectors for the products of mid.cu: normed, in float16, in the order of their operands.
//
// Naive twin: the norms of tests/runtime/numpy_reference.py. Tests: tests/kernels/test_cuda_kernels.py.
#define MOST_PARTS 4              // results of a product that was divided by columns
#define NORM_AHEAD 8              // numbers of a vector that a thread loads together

// Where column c lies, within its 32.
DEV int place_of(int c) { return (c & ~31) | (c & 15) >> 1 << 2 | (c & 1) << 1 | (c >> 4 & 1); }

// u += the parts; e = u (or x) * silu(gate) * weight, divided by the RMS; float16 to out, chosen columns to out2, and
// the product with the right low-rank factor to factors. One block a vector.
struct MidNorm {
  Matrix m;  // that will multiply the vectors
  Input in;
  i64 residual, parts, part_stride, n_parts;  // n_parts: 0 to 4; residual: 1 where in.x is added to and written
  i64 out, out2, factors, plane_inverse;      // float16 [B][kpad], [B][plane_kpad], [B][rank]
  i64 natural;                                // 1: out in the order of the columns
};

DEV void mid_norm(const MidNorm& p, u8* smem) {
  const Matrix& m = p.m;
  const int b = blockIdx.x, cols = (int)m.cols, kpad = (int)m.kpad, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int groups = (int)p.in.groups, size = groups > 1 ? cols / groups : cols;
  float *e = (float*)smem, *scratch = e + kpad, *inverse = scratch + WARPS;  // e in the order of codes
  u16* chosen = (u16*)(inverse + (groups > 1 ? groups : 1));
  float* turned = (float*)(chosen + m.plane_kpad);  // natural order, where the vector is transformed or rounded
  const bool turns = m.hadamard > 1, keeps = turns || m.rounding;
  const float *gate = p.in.gate ? (const float*)p.in.gate + b * p.in.gate_stride : nullptr, eps = param_float(p.in.eps);
  const float *weight = (const float*)p.in.weight, *col_scale = (const float*)m.col_scale;
  float* x = (float*)p.in.x + b * p.in.x_stride;
  auto sum_of = [&](float v) {
    v = warp_sum(v);
    __syncthreads();
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < WARPS; ++w) v += scratch[w];
    return v;
  };
  const i32* place = (const i32*)p.plane_inverse;
  for (int i = threadIdx.x; i < (int)m.plane_kpad; i += THREADS) chosen[i] = 0;
  for (int i = threadIdx.x * 32; i < cols; i += THREADS * 32) {  // comes into L1 while the kernel before runs
    if (weight) prefetch(weight + i);
    if (m.plane_cols) prefetch(place + i);
  }
  await_previous();
  release_next();
  const float* added = (const float*)p.parts + b * (i64)cols;  // the results of the product before
  float squares = 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < kpad; first += NORM_AHEAD * THREADS) {
    float v[NORM_AHEAD];  // all loads before any store, which might be to where they come from
#pragma unroll
    for (int k = 0; k < NORM_AHEAD; ++k) {
      const int i = first + k * THREADS;
      v[k] = i < cols ? load_fresh(x + i) : 0.0f;
#pragma unroll
      for (int part = 0; part < MOST_PARTS; ++part)
        if (i < cols && part < (int)p.n_parts) v[k] += load_fresh(added + part * p.part_stride + i);
    }
#pragma unroll
    for (int k = 0; k < NORM_AHEAD; ++k) {
      const int i = first + k * THREADS;
      if (i >= kpad) break;
      if (i < cols && p.residual) x[i] = v[k];
      squares += v[k] * v[k];
      e[(i >> 5) * 32 + (i & 7) * 4 + ((i >> 3) & 3)] = v[k];
    }
  }
  if (groups > 1) {
    __syncthreads();
    for (int g = 0; g < groups; ++g) {
      float part = 0;
      for (int i = g * size + threadIdx.x; i < (g + 1) * size; i += THREADS) {
        const float v = e[(i >> 5) * 32 + (i & 7) * 4 + ((i >> 3) & 3)];
        part += v * v;
      }
      part = sum_of(part);
      if (threadIdx.x == 0) inverse[g] = 1.0f / sqrtf(part / (float)size + eps);
    }
    __syncthreads();
  } else {
    squares = sum_of(squares);
    if (threadIdx.x == 0) inverse[0] = groups ? 1.0f / sqrtf(squares / (float)cols + eps) : 1.0f;
    __syncthreads();
  }
  u16* out = (u16*)p.out + b * (i64)kpad;
#pragma unroll 1
  for (int first = threadIdx.x; first < kpad; first += NORM_AHEAD * THREADS) {
    float v[NORM_AHEAD];
    i32 where[NORM_AHEAD];
#pragma unroll
    for (int k = 0; k < NORM_AHEAD; ++k) {
      const int i = first + k * THREADS;
      v[k] = 0;
      where[k] = m.plane_cols && i < cols ? place[i] : -1;
      if (i >= cols) continue;
      v[k] = e[(i >> 5) * 32 + (i & 7) * 4 + ((i >> 3) & 3)] * inverse[groups > 1 ? i / size : 0];
      if (weight) v[k] *= weight[i];
      if (col_scale && !turns) v[k] *= col_scale[i];
      if (gate) v[k] *= silu(load_fresh(gate + i));
    }
#pragma unroll
    for (int k = 0; k < NORM_AHEAD; ++k) {
      const int i = first + k * THREADS;
      if (i >= kpad) break;
      if (keeps) turned[i] = v[k];
      e[(i >> 5) * 32 + (i & 7) * 4 + ((i >> 3) & 3)] = v[k];
      out[p.natural ? i : place_of(i)] = float_to_half_bits(v[k]);
      if (where[k] >= 0) chosen[place_of(where[k])] = float_to_half_bits(v[k]);
    }
  }
  __syncthreads();
  if (keeps) {
    if (turns) transform(turned, cols, (int)m.hadamard, threadIdx.x, THREADS);
    u32 top = 0;
    for (int i = threadIdx.x; i < cols; i += THREADS) {
      if (turns && col_scale) turned[i] *= col_scale[i];
      const u32 bits = float_to_bits(turned[i]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    top = warp_max_bits(top);
    if (lane == 0) scratch[warp] = bits_to_float(top);
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) top = float_to_bits(scratch[w]) > top ? float_to_bits(scratch[w]) : top;
    const CodeScale code = m.rounding ? code_scale(m.rounding, top, m.input_step) : CodeScale{1.0f, 1.0f};
    for (int i = threadIdx.x; i < cols; i += THREADS) {
      const float v = m.rounding ? code_of(turned[i], code.to_code) * code.step : turned[i];
      e[(i >> 5) * 32 + (i & 7) * 4 + ((i >> 3) & 3)] = v;
      out[p.natural ? i : place_of(i)] = float_to_half_bits(v);
      if (m.plane_cols && place[i] >= 0) chosen[place_of(place[i])] = float_to_half_bits(v);
    }
    __syncthreads();
  }
  u16* out2 = (u16*)p.out2 + b * m.plane_kpad;
  for (int i = threadIdx.x; i < (int)m.plane_kpad; i += THREADS) out2[i] = chosen[i];
#pragma unroll 1
  for (int r = warp; r < (int)m.rank; r += WARPS) {
    const u8* codes = (const u8*)m.lr_b + (i64)r * kpad;
    float sum = 0;
#pragma unroll 4
    for (int c = lane * 16; c < kpad; c += WARP * 16) {
      const uint4 q = load_weights(codes + c);
#pragma unroll
      for (int k = 0; k < 16; ++k) sum = fmaf((float)(i8)(word(q, k / 4) >> (k % 4 * 8)), e[c + k], sum);
    }
    sum = warp_sum(sum) * half_bits_to_float(((const u16*)m.lr_b_scale)[r]);
    if (lane == 0) ((u16*)p.factors)[b * m.rank + r] = float_to_half_bits(sum);
  }
}

// What a product of cuBLAS made of in_proj, float16 [B][stride], to where the step's other kernels look: the gate's input z and
// the ring of the convolution. Grid: 256s of rows, sequences.
struct Scatter {
  StateRef state;
  i64 batch, p, stride, inner, z;  // rows 0 .. inner - 1 to float32 z [B][inner], the rest to the ring
};
DEV void scatter(const Scatter& s) {
  const int row = (int)blockIdx.x * THREADS + threadIdx.x, b = blockIdx.y;
  float* ring = next_ring_row(s.state, b);
  await_previous();
  release_next();
  if (row >= (int)(s.inner + s.state.channels)) return;
  const float v = half_bits_to_float(((const u16*)s.p)[b * s.stride + row]);
  if (row < (int)s.inner) ((float*)s.z)[b * s.inner + row] = v;
  else ring[row - s.inner] = v;
}
