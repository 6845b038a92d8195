// Parts of the Mamba-2 kernels in blocks.h: numbers held in a buffer, and pieces of a state row times C.
#pragma once

#include "rounded.h"

namespace slimba {
namespace {

constexpr int64_t kBlockTokens = kStateBlock;
using std::int16_t;

void hold(StateType type, const float* x, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += W) {
    if (type == kStateFloat32) vstore_n((float*)out + i, vload_n(x + i, n - i), n - i);
    else store_bfloat_n(out + 2 * i, round_bfloat_safely(vload_n(x + i, n - i)), n - i);
  }
}

inline vf load_held(StateType type, const uint8_t* row, int64_t i, int64_t n) {
  return type == kStateFloat32 ? vload_n((const float*)row + i, n) : load_bfloat_n(row + 2 * i, n);
}
inline vf round_held(StateType type, vf v) { return type == kStateFloat32 ? v : round_bfloat_safely(v); }

// The even ones of 2 W numbers, then the odd ones
inline void store_apart(float* out, vf first, vf second) {
#if defined(__AVX512F__)
  const vi even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  vstore(out, _mm512_permutex2var_ps(first, even, second));
  vstore(out + W, _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second));
#else
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0xdd));
  vstore(out, _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)));
  vstore(out + W, _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8)));
#endif
}

// W numbers rounded to 16-bit ones
inline void store_words(int16_t* out, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
#else
  const vi whole = _mm256_cvtps_epi32(v);
  _mm_storeu_si128((__m128i*)out, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#endif
}

// ---- pieces of a state row and their products with C

// Keeps v in a register: else GCC reads it anew for every row that it meets, and loads are what these loops wait for.
template <class V>
inline V kept(V v) {
#if defined(SLIMBA_SIMDE)
  return v;
#elif defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
  return v;
}

struct FloatPiece {
  static constexpr int64_t kEntries = W, kBytes = 4 * W, kCBytes = 4;
  using Sum = vf;
  vf s;
  void load(const uint8_t* p) { s = vload((const float*)p); }
  using Other = vf;
  static Other other(const uint8_t* c) { return kept(vload((const float*)c)); }
  vf add(vf sum, Other c) const { return vfma(s, c, sum); }
  static vf zero() { return vzero(); }
  static vf reduce(const vf* sums, int64_t) { return reduce_rows(sums); }
};

// Even entries in one vector, odd ones in the other: two instructions for 2 W entries. C lies in the same order.
struct BfloatPiece {
  static constexpr int64_t kEntries = 2 * W, kBytes = 4 * W, kCBytes = 4;
  using Sum = vf;
  vf even, odd;
  void load(const uint8_t* p) {
#if defined(__AVX512F__)
    const vi v = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))));
#else
    const vi v = _mm256_loadu_si256((const __m256i*)p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000u))));
#endif
  }
  struct Other {
    vf even, odd;
  };
  static Other other(const uint8_t* c) { return {kept(vload((const float*)c)), kept(vload((const float*)c + W))}; }
  vf add(vf sum, const Other& c) const { return vfma(odd, c.odd, vfma(even, c.even, sum)); }
  static vf zero() { return vzero(); }
  static vf reduce(const vf* sums, int64_t) { return reduce_rows(sums); }
};

// 16-bit products, added in pairs
struct Int8Piece {
  static constexpr int64_t kEntries = 2 * W, kBytes = 2 * W, kCBytes = 2;
  using Sum = vi;
  vi s;
#if defined(__AVX512F__)
  void load(const uint8_t* p) { s = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static vi other(const uint8_t* c) { return kept(_mm512_loadu_si512(c)); }
  vi add(vi sum, vi c) const { return plus(sum, _mm512_madd_epi16(s, c)); }
  static vi zero() { return _mm512_setzero_si512(); }
  static vi plus(vi a, vi b) { return _mm512_add_epi32(a, b); }
  static vf floats(vi sum) { return _mm512_cvtepi32_ps(sum); }
#else
  void load(const uint8_t* p) { s = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static vi other(const uint8_t* c) { return kept(_mm256_loadu_si256((const __m256i*)c)); }
  vi add(vi sum, vi c) const { return plus(sum, _mm256_madd_epi16(s, c)); }
  static vi zero() { return _mm256_setzero_si256(); }
  static vi plus(vi a, vi b) { return _mm256_add_epi32(a, b); }
  static vf floats(vi sum) { return _mm256_cvtepi32_ps(sum); }
#endif
  // Whole numbers as long as they surely fit: 127 * 32767 for each of N entries
  static vf reduce(const vi* sums, int64_t n) {
    if (n <= 512) return floats(as_ints(reduce_with((const vf*)sums, [](vf a, vf b) {
      return as_floats(plus(as_ints(a), as_ints(b)));
    })));
    vf rows[W];
    for (int64_t k = 0; k < W; ++k) rows[k] = floats(sums[k]);
    return reduce_rows(rows);
  }
};
constexpr int64_t kMostWhole = 4096;  // entries of a row whose 16-bit products surely fit a sum

}  // namespace
}  // namespace slimba
