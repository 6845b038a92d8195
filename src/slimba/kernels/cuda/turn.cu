// Many tokens at once: inputs of a product transformed and rounded where they lie (turn.cuh), in the kernel's own type.
//
// One block a token. Where there is a column scale c, (H x) c is what is rounded, and x becomes it over c again, because the
// expanded matrix holds c. Tests: tests/kernels/test_cuda_turn.py.
struct Turn {
  i64 x, stride, cols, hadamard, rounding, step, col_scale;
};
template <typename T>
DEV void turn(const Turn& p, float* e) {
  T* x = (T*)p.x + (i64)blockIdx.x * p.stride;
  const int cols = (int)p.cols;
  const float* col_scale = p.rounding ? (const float*)p.col_scale : nullptr;
  float* scratch = e + cols;
  for (int i = threadIdx.x; i < cols; i += THREADS) e[i] = load(x, i);
  __syncthreads();
  if (p.hadamard > 1) transform(e, cols, (int)p.hadamard, threadIdx.x, THREADS);
  u32 top = 0;
  for (int i = threadIdx.x; p.rounding && i < cols; i += THREADS) {
    if (col_scale) e[i] *= col_scale[i];
    const u32 bits = float_to_bits(e[i]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  top = warp_max_bits(top);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = bits_to_float(top);
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) top = float_to_bits(scratch[w]) > top ? float_to_bits(scratch[w]) : top;
  const CodeScale code = p.rounding ? code_scale(p.rounding, top, p.step) : CodeScale{1.0f, 1.0f};
  for (int i = threadIdx.x; i < cols; i += THREADS) {
    float v = p.rounding ? code_of(e[i], code.to_code) * code.step : e[i];
    if (col_scale) v = col_scale[i] != 0.0f ? v / col_scale[i] : 0.0f;
    store(x, i, v);
  }
}
KERNEL(slimba_turn_half, Turn, THREADS) {
  SHARED(smem);
  turn<Half>(p, (float*)smem);
}
KERNEL(slimba_turn_float, Turn, THREADS) {
  SHARED(smem);
  turn<float>(p, (float*)smem);
}
