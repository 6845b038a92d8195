// Many tokens at once (prefill, large batches): what surrounds the matrix products, which cuBLAS does in float16 over a
// scratch of one matrix that slimba_expand fills.
//
// slimba_add_norm -> slimba_expand, product -> slimba_conv, slimba_push -> slimba_scan or slimba_ssd -> slimba_gate_norm -> slimba_expand, product
// Every kernel exists for float16 activations (_half) and, for checks, for float32 (_float). Token t of sequence b is
// row b * L + t. Naive twin of all of them together: tests/runtime/numpy_reference.py.
struct Half {
  u16 bits;
};
DEV float load(const float* p, i64 i) { return p[i]; }
DEV float load(const Half* p, i64 i) { return half_bits_to_float(p[i].bits); }
DEV void store(float* p, i64 i, float v) { p[i] = v; }
DEV void store(Half* p, i64 i, float v) { p[i].bits = float_to_half_bits(v); }

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
    for (int k = 0; k < 8; ++k) w[k] = scale * (float)((int)(p[k / 2 * 4] >> (k & 1) * 4 & 15) - 8);
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

// Grid: columns in 256s, rows in 64s. Shared memory: rank * 256 floats.
template <typename T>
DEV void expand(const Expand& p, float* factors) {
  const Matrix& m = p.m;
  const int octet = blockIdx.x * 32 + threadIdx.x % 32;
  const i64 c0 = (i64)blockIdx.x * 256, c = (i64)octet * 8;
  for (int i = threadIdx.x; i < m.rank * 256; i += THREADS) {
    const i64 r = i / 256, col = c0 + i % 256;
    const u8* b = (const u8*)m.lr_b + r * m.kpad;
    factors[i] = col < m.cols ? half_bits_to_float(((const u16*)m.lr_b_scale)[r]) *
                                    (float)(i8)b[(col >> 5) * 32 + (col & 7) * 4 + (col >> 3 & 3)]
                              : 0.0f;
  }
  __syncthreads();
  if (c >= m.cols) return;
  const int count = (int)least(8, m.cols - c);
  for (int k = 0; k < 8; ++k) {
    const i64 local = (i64)blockIdx.y * 64 + k * 8 + threadIdx.x / 32, row = p.row0 + local;
    if (local >= p.rows) break;
    int seg = 0;
    while (seg + 1 < (int)m.segments && row >= m.segment[seg + 1].first) ++seg;
    float w[8];
    unpack_octet(m.segment[seg], row - m.segment[seg].first, octet, m.cols, w);
    if (m.rank && row >= m.lr_start && row < m.lr_stop) {
      const i8* a = (const i8*)m.lr_a + (row - m.lr_start) * m.rank;
      const float scale = half_bits_to_float(((const u16*)m.lr_a_scale)[row - m.lr_start]);
      float sum[8] = {};
      for (int r = 0; r < (int)m.rank; ++r) {
        const float ar = (float)a[r];
        const float* f = factors + r * 256 + threadIdx.x % 32 * 8;
        for (int i = 0; i < 8; ++i) sum[i] = fmaf(ar, f[i], sum[i]);
      }
      for (int i = 0; i < 8; ++i) w[i] = fmaf(scale, sum[i], w[i]);
    }
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
    T* out = (T*)p.out + local * p.out_stride + c;
    if (sizeof(T) == 2 && count == 8 && p.out_stride % 8 == 0) {
      u32 packed[4];
      for (int i = 0; i < 4; ++i)
        packed[i] = (u32)float_to_half_bits(w[2 * i]) | (u32)float_to_half_bits(w[2 * i + 1]) << 16;
      *(uint4*)out = uint4{packed[0], packed[1], packed[2], packed[3]};
    } else {
      for (int i = 0; i < count; ++i) store(out, i, w[i]);
    }
  }
}

// u += delta (where there is one); x = norm(u) weight. One block a token.
struct AddNorm {
  i64 u, delta, x, weight, width, eps;  // u float32; delta and x as the kernel's type; weight float32
};
DEV float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < WARPS; ++w) v += scratch[w];
  return v;
}
template <typename T>
DEV void add_norm(const AddNorm& p, float* scratch) {
  const i64 at = (i64)blockIdx.x * p.width;
  float* u = (float*)p.u + at;
  float squares = 0;
  for (i64 i = threadIdx.x; i < p.width; i += THREADS) {
    float e = u[i];
    if (p.delta) u[i] = e += load((const T*)p.delta, at + i);
    squares += e * e;
  }
  if (!p.x) return;
  const float inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)p.width + param_float(p.eps));
  for (i64 i = threadIdx.x; i < p.width; i += THREADS)
    store((T*)p.x, at + i, u[i] * inverse * ((const float*)p.weight)[i]);
}

// out = silu(conv(in)) for the tokens of this call. Grid: channels in 256s, tokens in 16s, sequences.
struct Conv {
  StateRef state;
  i64 batch, length, in, in_stride, out, out_stride, weight, bias;
};
#define CONV_TOKENS 16
template <typename T>
DEV void conv(const Conv& p) {
  const i64 channel = (i64)blockIdx.x * THREADS + threadIdx.x, first = (i64)blockIdx.y * CONV_TOKENS;
  const int b = blockIdx.z, taps = (int)p.state.taps;
  if (channel >= p.state.channels) return;
  const i64 slot = slot_of(p.state, b), pos = position(p.state, slot);
  auto input = [&](i64 t) {  // of token t of this call
    return t < 0 ? ring_row(p.state, slot, pos + t + p.state.taps)[channel]
                 : load((const T*)p.in, ((i64)b * p.length + t) * p.in_stride + channel);
  };
  float window[MAX_TAPS], weight[MAX_TAPS];
#pragma unroll
  for (int k = 0; k < MAX_TAPS; ++k) {
    weight[k] = k < taps ? ((const float*)p.weight)[k * p.state.channels + channel] : 0.0f;
    window[k] = k > 0 && k < taps ? input(first - taps + k) : 0.0f;
  }
  const float bias = p.bias ? ((const float*)p.bias)[channel] : 0.0f;
  for (i64 t = first; t < least(first + CONV_TOKENS, p.length); ++t) {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < MAX_TAPS; ++k) {
      if (k >= taps) break;
      window[k] = k + 1 < taps ? window[k + 1 < MAX_TAPS ? k + 1 : k] : input(t);
      sum = fmaf(weight[k], window[k], sum);
    }
    store((T*)p.out, ((i64)b * p.length + t) * p.out_stride + channel, silu(sum));
  }
}

// The last inputs of the convolution into the ring. Grid: channels in 256s, sequences.
template <typename T>
DEV void push(const Conv& p) {
  const i64 channel = (i64)blockIdx.x * THREADS + threadIdx.x;
  const int b = blockIdx.y;
  if (channel >= p.state.channels) return;
  const i64 slot = slot_of(p.state, b), pos = position(p.state, slot);
  for (i64 t = p.length > p.state.taps ? p.length - p.state.taps : 0; t < p.length; ++t)
    ring_row(p.state, slot, pos + t)[channel] = load((const T*)p.in, ((i64)b * p.length + t) * p.in_stride + channel);
}

// g = norm(y silu(z)) weight, norm(y) weight silu(z), or y silu(z). One block a token.
struct GateNorm {
  i64 y, y_stride, z, z_stride, out, out_stride, weight, width, groups, eps, norm_first;
};
template <typename T>
DEV void gate_norm(const GateNorm& p, float* scratch) {
  const i64 token = blockIdx.x, groups = p.groups ? p.groups : 1, size = p.width / groups;
  const T *y = (const T*)p.y + token * p.y_stride, *z = (const T*)p.z + token * p.z_stride;
  auto gate = [&](i64 i) { return silu(load(z, i)); };
  for (i64 g = 0; g < groups; ++g) {
    float squares = 0, inverse = 1;
    for (i64 i = g * size + threadIdx.x; i < (g + 1) * size && p.groups; i += THREADS) {
      const float e = load(y, i) * (p.norm_first ? 1.0f : gate(i));
      squares += e * e;
    }
    if (p.groups) inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)size + param_float(p.eps));
    for (i64 i = g * size + threadIdx.x; i < (g + 1) * size; i += THREADS)
      store((T*)p.out + token * p.out_stride, i,
            load(y, i) * gate(i) * inverse * (p.weight ? ((const float*)p.weight)[i] : 1.0f));
  }
}

#define INSTANCES(name, Params, body_half, body_float) \
  KERNEL(name##_half, Params, THREADS) { body_half; } \
  KERNEL(name##_float, Params, THREADS) { body_float; }

KERNEL(slimba_expand_half, Expand, THREADS) {
  SHARED(smem);
  expand<Half>(p, (float*)smem);
}
KERNEL(slimba_expand_float, Expand, THREADS) {
  SHARED(smem);
  expand<float>(p, (float*)smem);
}
KERNEL(slimba_add_norm_half, AddNorm, THREADS) {
  SHARED(smem);
  add_norm<Half>(p, (float*)smem);
}
KERNEL(slimba_add_norm_float, AddNorm, THREADS) {
  SHARED(smem);
  add_norm<float>(p, (float*)smem);
}
KERNEL(slimba_gate_norm_half, GateNorm, THREADS) {
  SHARED(smem);
  gate_norm<Half>(p, (float*)smem);
}
KERNEL(slimba_gate_norm_float, GateNorm, THREADS) {
  SHARED(smem);
  gate_norm<float>(p, (float*)smem);
}
INSTANCES(slimba_conv, Conv, conv<Half>(p), conv<float>(p))
INSTANCES(slimba_push, Conv, push<Half>(p), push<float>(p))
