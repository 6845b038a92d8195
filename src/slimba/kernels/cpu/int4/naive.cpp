// Portable twin of the int4 kernels: w[r, c] = scale[r, c / 128] * (nibble - 8), the low nibble of a byte being the
// even column.
#include "../numeric.h"

namespace slimba {

void naive_dequant_int4(const std::uint8_t* data, const std::uint8_t* scale, std::int64_t cols, std::int64_t r,
                        float* out) {
  const std::uint8_t* row = data + r * ((cols + 1) / 2);
  const std::uint8_t* scales = scale + 2 * r * ((cols + 127) / 128);
  for (std::int64_t c = 0; c < cols; ++c) {
    const int nibble = row[c >> 1] >> (c & 1 ? 4 : 0) & 15;
    out[c] = load_half(scales + 2 * (c >> 7)) * float(nibble - 8);
  }
}

namespace {
void matmul(const MatmulArgs& a) { naive_matmul(a, naive_dequant_int4); }
}  // namespace

const FormatKernels kNaiveInt4 = {naive_prepared_floats, naive_prepare, naive_scratch_floats, matmul};

}  // namespace slimba
