// Whole-number vectors for the kernels with int8 activations: AVX2, AVX-VNNI (both 8 lanes) and AVX-512 VNNI (16 lanes).
//
// kVnni says whether four products of bytes are summed by one instruction; plain AVX2 sums pairs in 16 bits, which hold
// only as many of them as the callers allow for.
#pragma once

#include "../simd.h"

namespace slimba {
namespace {

using std::int32_t;
using std::int8_t;
using std::uint64_t;

constexpr int64_t kGroup = 128;   // columns that share an int4 scale, and a partial sum of x
constexpr int64_t kBlock = 16;    // rows side by side in a panel

inline int64_t groups_of(int64_t cols) { return (cols + kGroup - 1) / kGroup; }

#if defined(__AVX512F__)

constexpr bool kVnni = true;
inline vi izero() { return _mm512_setzero_si512(); }
inline vi iset(int x) { return _mm512_set1_epi32(x); }
inline vi ibytes(int x) { return _mm512_set1_epi8(char(x)); }
inline vi iload(const void* p) { return _mm512_loadu_si512(p); }
inline void istore(void* p, vi v) { _mm512_storeu_si512(p, v); }
inline vi iadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi isub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi iand(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi ior(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi ixor(vi a, vi b) { return _mm512_xor_si512(a, b); }
template <int kBits>
inline vi ishl(vi v) { return _mm512_slli_epi32(v, kBits); }
template <int kBits>
inline vi ishr16(vi v) { return _mm512_srli_epi16(v, kBits); }
inline vi imin_bytes(vi a, vi b) { return _mm512_min_epu8(a, b); }
inline vi ishuffle(vi v, vi index) { return _mm512_shuffle_epi8(v, index); }  // within 16 bytes
inline vi ifour(const int8_t* p) {  // the same four bytes in every lane
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline vi irepeat(__m128i v) { return _mm512_broadcast_i32x4(v); }
inline vf to_float(vi v) { return _mm512_cvtepi32_ps(v); }
inline vi dot4(vi sum, vi u, vi s) { return _mm512_dpbusd_epi32(sum, u, s); }
inline __m128i load16(const uint8_t* p, int64_t left) {
  return left >= 16 ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8(left > 0 ? lanes(left) : 0, p);
}
// The W numbers, whole and within -128 .. 127, as W bytes
inline void store_bytes(int8_t* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))); }

#else

#if defined(__AVXVNNI__)
constexpr bool kVnni = true;
inline vi dot4(vi sum, vi u, vi s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#else
constexpr bool kVnni = false;
// u below 128, or s small: a pair's sum must fit 16 bits
inline vi dot4(vi sum, vi u, vi s) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
#endif
inline vi izero() { return _mm256_setzero_si256(); }
inline vi iset(int x) { return _mm256_set1_epi32(x); }
inline vi ibytes(int x) { return _mm256_set1_epi8(char(x)); }
inline vi iload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void istore(void* p, vi v) { _mm256_storeu_si256((__m256i*)p, v); }
inline vi iadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi isub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi iand(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi ior(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi ixor(vi a, vi b) { return _mm256_xor_si256(a, b); }
template <int kBits>
inline vi ishl(vi v) { return _mm256_slli_epi32(v, kBits); }
template <int kBits>
inline vi ishr16(vi v) { return _mm256_srli_epi16(v, kBits); }
inline vi imin_bytes(vi a, vi b) { return _mm256_min_epu8(a, b); }
inline vi ishuffle(vi v, vi index) { return _mm256_shuffle_epi8(v, index); }
inline vi ifour(const int8_t* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
inline vi irepeat(__m128i v) { return _mm256_broadcastsi128_si256(v); }
inline vf to_float(vi v) { return _mm256_cvtepi32_ps(v); }
inline __m128i load16(const uint8_t* p, int64_t left) {
  if (left >= 16) return _mm_loadu_si128((const __m128i*)p);
  return left > 0 ? load_tail(p, left) : _mm_setzero_si128();
}
inline void store_bytes(int8_t* p, vf v) {
  const vi whole = _mm256_cvtps_epi32(v);
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(packed, packed));
}

#endif

// Lane i: the sum of v[i]
inline vi reduce_ints(const vi* v) {
  return as_ints(reduce_with((const vf*)v, [](vf a, vf b) { return as_floats(iadd(as_ints(a), as_ints(b))); }));
}

// What becomes of a whole-number sum: see QuantArgs.
struct Finish {
  const QuantArgs& a;

  int total(int64_t t) const {
    const int64_t groups = groups_of(a.cols);
    return a.x_sums[t * (groups + 1) + groups];
  }
  // y of the rows row .. row + n (n <= W) and token t
  void put(int64_t row, int64_t n, int64_t t, vf value) const {
    float* y = a.y + t * a.y_stride + row;
    if (n >= W) return vstore(y, a.add ? vadd(vload(y), value) : value);
    vstore_n(y, a.add ? vadd(vload_n(y, n), value) : value, n);
  }
  void scaled(int64_t row, int64_t n, int64_t t, vi sum, vf scale) const {
    put(row, n, t, vmul(to_float(sum), vmul(scale, vset(a.x_scale[t]))));
  }
  vf scales(int64_t row, int64_t n) const { return load_half_n(a.scale + 2 * row, n); }
};

// Scales of n (<= W) int4 rows in every group: out [groups, W] floats
inline void group_scales(const QuantArgs& a, int64_t row, int64_t n, float* out) {
  const int64_t groups = groups_of(a.cols);
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t halves[2 * W];
    for (int r = 0; r < W; ++r)
      __builtin_memcpy(halves + 2 * r, a.scale + 2 * ((row + min64(r, n - 1)) * groups + g), 2);
    vstore(out + g * W, load_half(halves));
  }
}

}  // namespace
}  // namespace slimba
