// The input of a product as its file wants it: a block Hadamard transform, a column scale, rounding to int8.
//
// Naive twins: `hadamard` of formats/hadamard.py, whose order of float32 operations this keeps, and `round_int8` and
// `round_fixed` of runtime/backends/reference.py. Tests: tests/kernels/test_cuda_turn.py.
enum Rounding { KEEP_FLOAT, ROUND_TOKEN, ROUND_FIXED };  // of the struct Matrix: not, by the token's largest, by a stored step
#define MOST_CODE 127.0f

// The stage of a transform that joins numbers `step` apart, of N in registers.
template <int N>
DEV void butterfly(float (&v)[N], int step) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i & step) continue;
    const float a = v[i], b = v[i + step];
    v[i] = a + b;
    v[i + step] = a - b;
  }
}

// x[cols] in shared memory, each `block` (a power of two) of columns, is transformed; stages of distance 1, 2, 4, ..., three
// at a time. By `lanes` threads, of which this is `lane`; all threads of the block must come here. Ends with a barrier.
DEV void transform(float* x, int cols, int block, int lane, int lanes) {
  const float root = 1.0f / sqrtf((float)block);
#pragma unroll 1
  for (int d = 1; d < block; d *= 8) {
    const int fold = block / d < 8 ? block / d : 8;
    const bool last = d * fold == block;
#pragma unroll 1
    for (int unit = lane; unit < cols / fold; unit += lanes) {
      float* at = x + unit / d * (d * fold) + unit % d;
      float v[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = k < fold ? at[k * d] : 0.0f;
#pragma unroll
      for (int step = 1; step < 8; step *= 2) {
        if (step < fold) butterfly(v, step);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < fold) at[k * d] = last ? v[k] * root : v[k];
    }
    __syncthreads();
  }
}

// What a vector is multiplied by before it is rounded, and what a code is worth then; 0 for a vector of zeros, NaN for one that
// is damaged. top: bits of the largest |x|; step: float32, of ROUND_FIXED.
struct CodeScale {
  float to_code, step;
};
DEV CodeScale code_scale(i64 rounding, u32 top, i64 step) {
  const float most = bits_to_float(top);
  if (top >= INF_BITS) return {0.0f, bits_to_float(0x7fc00000u)};
  if (rounding == ROUND_FIXED) return {1.0f / *(const float*)step, *(const float*)step};
  return most < 1e-30f ? CodeScale{0.0f, 0.0f} : CodeScale{MOST_CODE / most, most / MOST_CODE};
}
DEV float code_of(float v, float to_code) { return rintf(fminf(fmaxf(v * to_code, -MOST_CODE), MOST_CODE)); }
