// AVX-512 in plain C++ for machines without it: Debian's libsimde-dev and the intrinsics that its version 0.7.4 lacks.
//
// Stands in for the compiler's header of the same name where scripts/build_cpp.sh is called with SIMDE=1, and only for the
// files that are compiled for AVX-512. Needs no instruction beyond SSE2. Run: pytest -m slow tests/kernels/test_cpp_engine.py
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
using __mmask16 = simde__mmask16;
using __mmask32 = simde__mmask32;
using __mmask64 = simde__mmask64;
#undef _mm512_madd_epi16  // taken by the masked one's name in 0.7.4
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16((a), (b))
#define _mm512_shuffle_f32x4(a, b, imm) \
  simde_mm512_castsi512_ps(simde_mm512_shuffle_i32x4(simde_mm512_castps_si512(a), simde_mm512_castps_si512(b), (imm)))

namespace {

template <class To, class From>
inline To simde_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, int N>
struct Lanes {
  T lane[N];
};

// f of every lane: In is what a lane of the argument holds, Out of the result.
template <class To, class Out, class In, int N, class From, class F>
inline To each(const From& from, F f) {
  Lanes<In, N> in;
  std::memcpy(&in, &from, sizeof in);
  Lanes<Out, N> out;
  for (int i = 0; i < N; ++i) out.lane[i] = Out(f(in.lane[i]));
  return simde_bits<To>(out);
}

template <class To, class T, int N>
inline To load_masked(std::uint64_t mask, const void* p) {
  Lanes<T, N> out = {};
  for (int i = 0; i < N; ++i)
    if (mask >> i & 1) std::memcpy(&out.lane[i], static_cast<const T*>(p) + i, sizeof(T));
  return simde_bits<To>(out);
}

template <class T, int N, class From>
inline void store_masked(void* p, std::uint64_t mask, const From& from) {
  const auto in = simde_bits<Lanes<T, N>>(from);
  for (int i = 0; i < N; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &in.lane[i], sizeof(T));
}

inline std::int32_t nearest(float x) {
  return x >= -2147483648.0f && x < 2147483648.0f ? std::int32_t(std::nearbyintf(x)) : INT32_MIN;
}

}  // namespace

#define _mm512_cvtepi32_ps(a) each<__m512, float, std::int32_t, 16>((a), [](std::int32_t x) { return float(x); })
#define _mm512_cvtps_epi32(a) each<__m512i, std::int32_t, float, 16>((a), nearest)
#define _mm512_cvtepi32_epi16(a) each<__m256i, std::int16_t, std::int32_t, 16>((a), [](std::int32_t x) { return x; })
#define _mm512_cvtepi32_epi8(a) each<__m128i, std::int8_t, std::int32_t, 16>((a), [](std::int32_t x) { return x; })
#define _mm512_cvtepi8_epi32(a) each<__m512i, std::int32_t, std::int8_t, 16>((a), [](std::int8_t x) { return x; })
#define _mm512_cvtepi16_epi32(a) each<__m512i, std::int32_t, std::int16_t, 16>((a), [](std::int16_t x) { return x; })
#define _mm512_cvtepu8_epi32(a) each<__m512i, std::int32_t, std::uint8_t, 16>((a), [](std::uint8_t x) { return x; })
#define _mm512_cvtepu16_epi32(a) each<__m512i, std::int32_t, std::uint16_t, 16>((a), [](std::uint16_t x) { return x; })
#define _mm512_srai_epi32(a, n) each<__m512i, std::int32_t, std::int32_t, 16>((a), [](std::int32_t x) { return x >> (n); })
#define _mm512_cvtph_ps(a) each<__m512, float, std::uint16_t, 16>((a), simde_float16_lane)
#define _cvtsh_ss(h) simde_float16_lane(h)
#define _mm512_maskz_loadu_ps(k, p) load_masked<__m512, float, 16>((k), (p))
#define _mm512_maskz_loadu_epi8(k, p) load_masked<__m512i, std::int8_t, 64>((k), (p))
#define _mm256_maskz_loadu_epi16(k, p) load_masked<__m256i, std::int16_t, 16>((k), (p))
#define _mm_maskz_loadu_epi8(k, p) load_masked<__m128i, std::int8_t, 16>((k), (p))
#define _mm512_mask_storeu_ps(p, k, a) store_masked<float, 16>((p), (k), (a))
#define _mm256_mask_storeu_epi16(p, k, a) store_masked<std::int16_t, 16>((p), (k), (a))
#define _mm_mask_storeu_epi8(p, k, a) store_masked<std::int8_t, 16>((p), (k), (a))

namespace {

inline float simde_float16_lane(std::uint16_t h) { return simde_float16_to_float32(simde_uint16_as_float16(h)); }

inline float _mm512_reduce_max_ps(__m512 v) {
  const auto in = simde_bits<Lanes<float, 16>>(v);
  float top = in.lane[0];
  for (const float x : in.lane) top = x > top ? x : top;
  return top;
}

}  // namespace
