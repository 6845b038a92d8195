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

// v rounded to the nearest bfloat16, ties to even; stores n of them at p
inline vf round_bfloat_n(uint8_t* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  const vi bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  vi high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  const __m256i packed = _mm512_cvtepi32_epi16(high);
  if (n >= W) _mm256_storeu_si256((__m256i*)p, packed);
  else _mm256_mask_storeu_epi16(p, lanes(n), packed);
  return _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
#else
  const vi bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  vi high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const vi is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  if (n >= W) {
    _mm_storeu_si128((__m128i*)p, packed);
  } else {
    alignas(16) uint8_t bytes[16];
    _mm_store_si128((__m128i*)bytes, packed);
    for (int64_t i = 0; i < 2 * n; ++i) p[i] = bytes[i];
  }
  return _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
#endif
}

inline float max_lane(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#endif
}

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
      for (int64_t i = 0; i < n; i += W) vstore(s + i, round_bfloat_n(state + 2 * (row * n + i), vload(s + i), n - i));
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
