// int4 rows (groups of 128 columns) for AVX2 and AVX-512.
//
// A vector of W bytes holds 2 W columns: its low nibbles are the even ones, its high nibbles the odd ones. So
// activations are stored with the even and odd columns of every 2 W apart, and weight vector 2 j (2 j + 1) holds the
// even (odd) columns 2 W j ... A weight, (nibble - 8) * group scale, is exact in float32; the scale cannot wait for the
// end of the row.
#include "../dots.h"

namespace slimba {
namespace {

constexpr int64_t kGroup = 128;

struct Int4Loader {
  static constexpr int64_t kExpandFrom = 16;
  static constexpr int kVectorsPerLine = 128 / W;
  const uint8_t *data, *scales;
  int64_t cols, row_bytes, groups;
  // Vectors come in pairs; the last pair may hang over the end of the row.
  int64_t vectors() const { return cols / (2 * W) * 2; }
  int64_t tail() const { return cols % (2 * W) ? 2 : 0; }

  // The four-bit codes of vector k
  vi codes(vi bytes, int64_t k) const {
#if defined(__AVX512F__)
    return k & 1 ? _mm512_srli_epi32(bytes, 4) : bytes;  // the permutation below looks at four bits only
#else
    return k & 1 ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
#endif
  }
  vf weights(int64_t row, int64_t k, vi bytes) const {
    const float s = group_scale(row, k * W / kGroup);
#if defined(__AVX512F__)
    const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return vmul(_mm512_permutexvar_ps(codes(bytes, k), table), vset(s));
#else
    return vmul(vsub(_mm256_cvtepi32_ps(codes(bytes, k)), vset(8.0f)), vset(s));
#endif
  }
  float group_scale(int64_t row, int64_t group) const {
    const uint8_t* p = scales + 2 * (row * groups + group);
    return _cvtsh_ss((unsigned short)(p[0] | p[1] << 8));
  }
  const uint8_t* at(int64_t row, int64_t k) const { return data + row * row_bytes + (k >> 1) * W; }
  vf load(int64_t row, int64_t k) const { return weights(row, k, load_bytes(at(row, k))); }
  vf load_n(int64_t row, int64_t k) const {
    return weights(row, k, load_bytes_n(at(row, k), row_bytes - (k >> 1) * W));
  }
  vf scale(int64_t, int64_t) const { return vset(1.0f); }
};

void prepare(const float* x, int64_t cols, float* out) {
  for (int64_t c = 0; c < padded(cols); c += 2 * W) {
    for (int64_t i = 0; i < W; ++i) {
      const int64_t even = c + 2 * i;
      out[c + i] = even < cols ? x[even] : 0.0f;
      out[c + W + i] = even + 1 < cols ? x[even + 1] : 0.0f;
    }
  }
}

void matmul(const MatmulArgs& a) {
  dot_matmul(Int4Loader{a.data, a.scale, a.cols, (a.cols + 1) / 2, (a.cols + kGroup - 1) / kGroup}, a);
}

}  // namespace
}  // namespace slimba
