// Portable twin of the sign kernels: one bit a weight, w[r, c] = scale[r] * (bit ? +1 : -1).
//
// Bit i of byte j of a row is column 8j + i; a row takes 8 bytes for every 64 columns begun.
#include "../numeric.h"

namespace slimba {

void naive_dequant_sign(const std::uint8_t* data, const std::uint8_t* scale, std::int64_t cols, std::int64_t r,
                        float* out) {
  const std::uint8_t* row = data + r * ((cols + 63) / 64 * 8);
  const float s = load_half(scale + 2 * r);
  for (std::int64_t c = 0; c < cols; ++c) out[c] = (row[c >> 3] >> (c & 7) & 1) ? s : -s;
}

namespace {
void matmul(const MatmulArgs& a) { naive_matmul(a, naive_dequant_sign); }
}  // namespace

const FormatKernels kNaiveSign = {naive_prepared_floats, naive_prepare, naive_scratch_floats, matmul};

}  // namespace slimba
