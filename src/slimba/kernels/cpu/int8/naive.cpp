// Portable twin of the int8 kernels: w[r, c] = scale[r] * code[r, c]. The products are exact in float32.
#include "../numeric.h"

namespace slimba {

void naive_dequant_int8(const std::uint8_t* data, const std::uint8_t* scale, std::int64_t cols, std::int64_t r,
                        float* out) {
  const std::uint8_t* row = data + r * cols;
  const float s = load_half(scale + 2 * r);
  for (std::int64_t c = 0; c < cols; ++c) out[c] = s * float(std::int8_t(row[c]));
}

namespace {
void matmul(const MatmulArgs& a) { naive_matmul(a, naive_dequant_int8); }
}  // namespace

const FormatKernels kNaiveInt8 = {naive_prepared_floats, naive_prepare, naive_scratch_floats, matmul};

}  // namespace slimba
