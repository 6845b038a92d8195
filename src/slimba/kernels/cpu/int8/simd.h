// int8 rows for AVX2 and AVX-512: codes become floats, the row scale is applied to the finished sum.
#include "../dots.h"

namespace slimba {
namespace {

struct Int8Loader {
  static constexpr int kVectorsPerLine = 64 / W;
  const uint8_t *data, *scales;
  int64_t cols;
  int64_t vectors() const { return cols / W; }
  int64_t tail() const { return cols % W != 0; }
  const uint8_t* at(int64_t row, int64_t k) const { return data + row * cols + k * W; }
  vf load(int64_t row, int64_t k) const { return load_int8(at(row, k)); }
  vf load_n(int64_t row, int64_t k) const { return load_int8_n(at(row, k), cols - k * W); }
  vf scale(int64_t row, int64_t n) const { return load_half_n(scales + 2 * row, n); }
};

void matmul(const MatmulArgs& a) { dot_matmul(Int8Loader{a.data, a.scale, a.cols}, a); }

}  // namespace
}  // namespace slimba
