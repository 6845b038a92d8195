// float32, float16 and bfloat16 rows for AVX2 and AVX-512; included by avx2.cpp and avx512.cpp.
#include "../dots.h"

namespace slimba {
namespace {

struct FloatLoader {  // what the three have in common
  const uint8_t* data;
  int64_t cols;
  int64_t vectors() const { return cols / W; }
  int64_t tail() const { return cols % W != 0; }
  vf scale(int64_t, int64_t) const { return vset(1.0f); }
};

struct Float32Loader : FloatLoader {
  static constexpr int kVectorsPerLine = 16 / W;
  const float* at(int64_t row, int64_t k) const { return (const float*)(data + 4 * (row * cols + k * W)); }
  vf load(int64_t row, int64_t k) const { return vload(at(row, k)); }
  vf load_n(int64_t row, int64_t k) const { return vload_n(at(row, k), cols - k * W); }
};

struct Float16Loader : FloatLoader {
  static constexpr int kVectorsPerLine = 32 / W;
  const uint8_t* at(int64_t row, int64_t k) const { return data + 2 * (row * cols + k * W); }
  vf load(int64_t row, int64_t k) const { return load_half(at(row, k)); }
  vf load_n(int64_t row, int64_t k) const { return load_half_n(at(row, k), cols - k * W); }
};

struct Bfloat16Loader : FloatLoader {
  static constexpr int kVectorsPerLine = 32 / W;
  const uint8_t* at(int64_t row, int64_t k) const { return data + 2 * (row * cols + k * W); }
  vf load(int64_t row, int64_t k) const { return load_bfloat(at(row, k)); }
  vf load_n(int64_t row, int64_t k) const { return load_bfloat_n(at(row, k), cols - k * W); }
};

void matmul32(const MatmulArgs& a) { dot_matmul(Float32Loader{{a.data, a.cols}}, a); }
void matmul16(const MatmulArgs& a) { dot_matmul(Float16Loader{{a.data, a.cols}}, a); }
void matmulbf(const MatmulArgs& a) { dot_matmul(Bfloat16Loader{{a.data, a.cols}}, a); }

}  // namespace
}  // namespace slimba
