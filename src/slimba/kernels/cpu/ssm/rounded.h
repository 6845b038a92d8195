// Rows of a state stored in bfloat16 or int8, for AVX2 and AVX-512: opened into float32, rounded and stored after every
// token. The rules are at StateType in kernels.h; the naive twins are open_row and round_row in naive.cpp.
#pragma once

#include "../simd.h"

namespace slimba {
namespace {

// The W numbers, whole and within -128 .. 127, as bytes
inline void store_int8_n(uint8_t* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  const __m128i packed = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v));
  if (n >= W) _mm_storeu_si128((__m128i*)p, packed);
  else _mm_mask_storeu_epi8(p, lanes(n), packed);  // slow on AMD
#else
  const vi whole = _mm256_cvtps_epi32(v);
  __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  packed = _mm_packs_epi16(packed, packed);
  if (n >= W) return _mm_storel_epi64((__m128i*)p, packed);
  alignas(16) uint8_t bytes[16];
  _mm_store_si128((__m128i*)bytes, packed);
  for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
#endif
}

// v rounded to the nearest bfloat16, ties to even; NaN may become anything
inline vf round_bfloat(vf v) {
#if defined(__AVX512F__)
  const vi bits = _mm512_castps_si512(v), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const vi rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000u))));
#else
  const vi bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const vi rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(int(0xffff0000u))));
#endif
}

// The same where there may be NaN, which stays NaN
inline vf round_bfloat_safely(vf v) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(round_bfloat(v), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), vset(__builtin_nanf("")));
#else
  return _mm256_blendv_ps(round_bfloat(v), vset(__builtin_nanf("")), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
#endif
}

// Stores the first n of W rounded numbers at p
inline void store_bfloat_n(uint8_t* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
  if (n >= W) _mm256_storeu_si256((__m256i*)p, packed);
  else _mm256_mask_storeu_epi16(p, lanes(n), packed);
#else
  const vi high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  if (n >= W) return _mm_storeu_si128((__m128i*)p, packed);
  alignas(16) uint8_t bytes[16];
  _mm_store_si128((__m128i*)bytes, packed);
  for (int64_t i = 0; i < 2 * n; ++i) p[i] = bytes[i];
#endif
}

// Magnitudes as whole numbers: they compare as the floats do, infinity and NaN above all
#if defined(__AVX512F__)
inline vi magnitude_bits(vf v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
inline vi max_bits(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline bool any_damaged(vi v) { return _mm512_cmpge_epi32_mask(v, _mm512_set1_epi32(0x7f800000)) != 0; }
#else
inline vi magnitude_bits(vf v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
inline vi max_bits(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline bool any_damaged(vi v) {
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32(v, _mm256_set1_epi32(0x7f7fffff))) != 0;
}
#endif

struct Int8Scale {
  float step, inverse;  // a code is round(s * inverse), its value code * step
};

inline Int8Scale int8_scale(vf top, bool damaged) {
  const float most = max_lane(top);
  if (damaged) return {__builtin_nanf(""), 0.0f};
  if (most < 1e-30f) return {0.0f, 0.0f};
  return {most / 127.0f, 127.0f / most};
}

struct StoredRow {
  StateType type;
  uint8_t* state;
  float* scale;
  int64_t row, n;

  // The row as floats; `out` has room for whole vectors, the last one is filled up with zeros.
  void open(float* out) const {
    if (type == kStateBfloat16) {
      for (int64_t i = 0; i < n; i += W) vstore(out + i, load_bfloat_n(state + 2 * (row * n + i), n - i));
      return;
    }
    const vf s = vset(scale[row]);
    for (int64_t i = 0; i < n; i += W) {
      const uint8_t* p = state + row * n + i;
      vstore(out + i, vmul(n - i >= W ? load_int8(p) : load_int8_n(p, n - i), s));
    }
  }

  // Stores the row s, whose largest magnitudes are in `top`, and rounds s itself when it goes on from here. `damaged`:
  // it holds NaN or infinity.
  void round(float* s, vf top, bool damaged, bool goes_on) const {
    if (type == kStateBfloat16) {
      for (int64_t i = 0; i < n; i += W) {
        const vf v = round_bfloat_safely(vload(s + i));
        vstore(s + i, v);
        if (!goes_on) store_bfloat_n(state + 2 * (row * n + i), v, n - i);
      }
      return;
    }
    const auto [step, inverse] = int8_scale(top, damaged);
    scale[row] = step;
    for (int64_t i = 0; i < n; i += W) {
      const vf code = vround(vmul(vload(s + i), vset(inverse)));
      store_int8_n(state + row * n + i, code, n - i);
      if (goes_on) vstore(s + i, vmul(code, vset(step)));
    }
  }
};

}  // namespace
}  // namespace slimba
