// Portable twin of the float32, float16 and bfloat16 kernels.
#include "../numeric.h"

namespace slimba {

void naive_dequant_float32(const std::uint8_t* data, const std::uint8_t*, std::int64_t cols, std::int64_t r,
                           float* out) {
  std::memcpy(out, data + 4 * r * cols, std::size_t(cols) * 4);
}

void naive_dequant_float16(const std::uint8_t* data, const std::uint8_t*, std::int64_t cols, std::int64_t r,
                           float* out) {
  for (std::int64_t c = 0; c < cols; ++c) out[c] = load_half(data + 2 * (r * cols + c));
}

void naive_dequant_bfloat16(const std::uint8_t* data, const std::uint8_t*, std::int64_t cols, std::int64_t r,
                            float* out) {
  for (std::int64_t c = 0; c < cols; ++c) out[c] = load_bfloat(data + 2 * (r * cols + c));
}

namespace {
void matmul32(const MatmulArgs& a) { naive_matmul(a, naive_dequant_float32); }
void matmul16(const MatmulArgs& a) { naive_matmul(a, naive_dequant_float16); }
void matmulbf(const MatmulArgs& a) { naive_matmul(a, naive_dequant_bfloat16); }
}  // namespace

const FormatKernels kNaiveFloat32 = {naive_prepared_floats, naive_prepare, naive_scratch_floats, matmul32};
const FormatKernels kNaiveFloat16 = {naive_prepared_floats, naive_prepare, naive_scratch_floats, matmul16};
const FormatKernels kNaiveBfloat16 = {naive_prepared_floats, naive_prepare, naive_scratch_floats, matmulbf};

}  // namespace slimba
