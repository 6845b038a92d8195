// One set of vector primitives for AVX2 (8 floats) and AVX-512 (16 floats), chosen by the flags of the including file.
//
// Everything is in an anonymous namespace and nothing comes from the standard library: code compiled with wide
// registers must not leak into the portable files through the linker. `vf` is a vector of W floats, `vi` of W 32-bit
// integers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace slimba {
namespace {

using std::int64_t;
using std::uint8_t;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Brings a line into the first-level cache; `once`: and leaves no copy of it in the others. As assembly: GCC 12 takes a
// function that does nothing but prefetch for one without effects, and drops its calls.
inline void fetch_line(const void* p) { asm volatile("prefetcht0 %0" ::"m"(*(const char*)p)); }
inline void fetch_line(const void* p, bool once) {
  if (once) asm volatile("prefetchnta %0" ::"m"(*(const char*)p));
  else fetch_line(p);
}
inline void fetch_second(const void* p) { asm volatile("prefetcht1 %0" ::"m"(*(const char*)p)); }  // into the second-level

#if defined(__AVX512F__)

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;

inline __mmask16 lanes(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
inline vf as_floats(vi v) { return _mm512_castsi512_ps(v); }
inline vi as_ints(vf v) { return _mm512_castps_si512(v); }
inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline vf vload_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }  // other lanes 0
inline void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline void vstore_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }               // b where either is NaN
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vabs(vf a) { return _mm512_abs_ps(a); }
inline vf vround(vf a) { return _mm512_roundscale_ps(a, 0x08); }
inline bool any_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// a 2^n for integral n, rounding to subnormals, zero or infinity as needed
inline vf vscale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }

// float16 and other narrow types; the _n forms read n elements and give 0 for the rest
inline vf half_to_float(__m256i h) { return _mm512_cvtph_ps(h); }
inline vf load_half(const uint8_t* p) { return half_to_float(_mm256_loadu_si256((const __m256i*)p)); }
inline vf load_half_n(const uint8_t* p, int64_t n) { return half_to_float(_mm256_maskz_loadu_epi16(lanes(n), p)); }
inline vf bfloat_to_float(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline vf load_bfloat(const uint8_t* p) { return bfloat_to_float(_mm256_loadu_si256((const __m256i*)p)); }
inline vf load_bfloat_n(const uint8_t* p, int64_t n) { return bfloat_to_float(_mm256_maskz_loadu_epi16(lanes(n), p)); }
inline vf load_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline vf load_int8_n(const uint8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
}
inline vi load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline vi load_bytes_n(const uint8_t* p, int64_t n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)); }

// The sum of every one of W vectors: lane i of the result is the sum of v[i]. One fixed order of additions.
template <class Add>
inline vf reduce_with(const vf* v, Add add) {
  vf r[4];
  for (int i = 0; i < 4; ++i) {
    const vf* q = v + 4 * i;
    const vf a = add(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
    const vf b = add(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
    const __m512d ad = _mm512_castps_pd(a), bd = _mm512_castps_pd(b);
    r[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(ad, bd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ad, bd)));
  }
  const vf a = add(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
  const vf b = add(_mm512_shuffle_f32x4(r[2], r[3], 0x88), _mm512_shuffle_f32x4(r[2], r[3], 0xdd));
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

#else  // AVX2

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;

inline vi lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vf as_floats(vi v) { return _mm256_castsi256_ps(v); }
inline vi as_ints(vf v) { return _mm256_castps_si256(v); }
inline vf vset(float x) { return _mm256_set1_ps(x); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline vf vload_n(const float* p, int64_t n) { return n >= 8 ? vload(p) : _mm256_maskload_ps(p, lanes(n)); }
inline void vstore(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline void vstore_n(float* p, vf v, int64_t n) {
  if (n >= 8) vstore(p, v);
  else _mm256_maskstore_ps(p, lanes(n), v);  // takes tens of cycles on AMD
}
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf vabs(vf a) { return _mm256_andnot_ps(vset(-0.0f), a); }
inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline bool any_nan(vf a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
// In two halves, so that 2^n itself never leaves the range of float32 for -300 < n < 300.
inline vf vscale2(vf a, vf n) {
  const vi whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const vi bias = _mm256_set1_epi32(127);
  a = vmul(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return vmul(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

// n bytes at p, zeros behind; AVX2 has no masked load of bytes
inline __m128i load_tail(const uint8_t* p, int64_t n) {
  alignas(16) uint8_t buffer[16] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return _mm_load_si128((const __m128i*)buffer);
}
inline vf load_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline vf load_half_n(const uint8_t* p, int64_t n) {
  return n >= 8 ? load_half(p) : _mm256_cvtph_ps(load_tail(p, 2 * n));
}
inline vf bfloat_to_float(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline vf load_bfloat(const uint8_t* p) { return bfloat_to_float(_mm_loadu_si128((const __m128i*)p)); }
inline vf load_bfloat_n(const uint8_t* p, int64_t n) {
  return n >= 8 ? load_bfloat(p) : bfloat_to_float(load_tail(p, 2 * n));
}
inline vf int8_to_float(__m128i b) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)); }
inline vf load_int8(const uint8_t* p) { return int8_to_float(_mm_loadl_epi64((const __m128i*)p)); }
inline vf load_int8_n(const uint8_t* p, int64_t n) { return n >= 8 ? load_int8(p) : int8_to_float(load_tail(p, n)); }
inline vi load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline vi load_bytes_n(const uint8_t* p, int64_t n) {
  return n >= 8 ? load_bytes(p) : _mm256_cvtepu8_epi32(load_tail(p, n));
}

template <class Add>
inline vf reduce_with(const vf* v, Add add) {
  vf r[2];
  for (int i = 0; i < 2; ++i) {
    const vf* q = v + 4 * i;
    const vf a = add(_mm256_unpacklo_ps(q[0], q[1]), _mm256_unpackhi_ps(q[0], q[1]));
    const vf b = add(_mm256_unpacklo_ps(q[2], q[3]), _mm256_unpackhi_ps(q[2], q[3]));
    const __m256d ad = _mm256_castps_pd(a), bd = _mm256_castps_pd(b);
    r[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(ad, bd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ad, bd)));
  }
  return add(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}

#endif

inline vf vzero() { return vset(0.0f); }
inline vf reduce_rows(const vf* v) { return reduce_with(v, [](vf a, vf b) { return vadd(a, b); }); }

// The largest of the W lanes
inline float max_lane(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#endif
}

// Sum of the W lanes, in pairs.
inline float sum_lanes(vf v) {
  alignas(64) float x[W];
  vstore(x, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// exp with a relative error below 2e-7 (tested): 2^n exp(r), |r| <= ln(2) / 2, Taylor series to r^7. NaN stays NaN.
inline vf vexp(vf x) {
  x = vmin(vset(89.0f), vmax(vset(-104.0f), x));  // infinity above, zero below
  const vf n = vround(vmul(x, vset(1.44269504f)));
  vf r = vfnma(n, vset(0.693359375f), x);
  r = vfnma(n, vset(-2.12194440e-4f), r);
  vf p = vset(1.0f / 5040);
  p = vfma(p, r, vset(1.0f / 720));
  p = vfma(p, r, vset(1.0f / 120));
  p = vfma(p, r, vset(1.0f / 24));
  p = vfma(p, r, vset(1.0f / 6));
  p = vfma(p, r, vset(0.5f));
  p = vfma(p, r, vset(1.0f));
  p = vfma(p, r, vset(1.0f));
  return vscale2(p, n);
}

inline vf vsilu(vf x) { return vdiv(x, vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

// log(1 + exp(x)) = max(x, 0) + log1p(u), u = exp(-|x|); log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3, series to s^15.
inline vf vsoftplus(vf x) {
  const vf u = vexp(vsub(vzero(), vabs(x)));
  const vf s = vdiv(u, vadd(vset(2.0f), u)), q = vmul(s, s);
  vf p = vset(2.0f / 15);
  p = vfma(p, q, vset(2.0f / 13));
  p = vfma(p, q, vset(2.0f / 11));
  p = vfma(p, q, vset(2.0f / 9));
  p = vfma(p, q, vset(2.0f / 7));
  p = vfma(p, q, vset(2.0f / 5));
  p = vfma(p, q, vset(2.0f / 3));
  p = vfma(p, q, vset(2.0f));
  return vfma(p, s, vmax(vzero(), x));
}

}  // namespace
}  // namespace slimba
