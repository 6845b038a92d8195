// Transpositions with 256-bit vectors, for AVX2 and AVX-512.
#pragma once

#include "lanes.h"

namespace slimba {
namespace {

constexpr int64_t kTurnedRows = 32;

inline __m256i load32(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store32(void* p, __m256i v) { _mm256_storeu_si256((__m256i*)p, v); }

// Half a transposition of 16 x 16 bytes in both 128-bit lanes: two of them are a whole one.
template <class Load>
inline void transpose_half(const Load& load, uint8_t* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i r0 = load(i), r1 = load(i + 4), r2 = load(i + 8), r3 = load(i + 12);
    const __m256i a = _mm256_unpacklo_epi8(r0, r2), b = _mm256_unpackhi_epi8(r0, r2);
    const __m256i c = _mm256_unpacklo_epi8(r1, r3), d = _mm256_unpackhi_epi8(r1, r3);
    store32(out + (4 * i) * 32, _mm256_unpacklo_epi8(a, c));
    store32(out + (4 * i + 1) * 32, _mm256_unpackhi_epi8(a, c));
    store32(out + (4 * i + 2) * 32, _mm256_unpacklo_epi8(b, d));
    store32(out + (4 * i + 3) * 32, _mm256_unpackhi_epi8(b, d));
  }
}

// Bytes from .. to of 32 rows (n of them real, the last one repeated) -> out[byte][row]; to - from is a multiple of 8.
// Writes whole steps of 16 bytes.
inline void transpose_bytes(const uint8_t* data, int64_t row_bytes, int64_t n, int64_t from, int64_t to, uint8_t* out) {
  const uint8_t* rows[kTurnedRows];
  for (int64_t i = 0; i < kTurnedRows; ++i) rows[i] = data + min64(i, n - 1) * row_bytes;
  alignas(32) uint8_t half[16 * 32];
  const auto again = [&](int i) { return load32(half + i * 32); };
  for (int64_t c = from; c < to; c += 16, out += 16 * 32) {
    if (c + 16 <= to) {
      transpose_half([&](int i) {
        const __m128i low = _mm_loadu_si128((const __m128i*)(rows[i] + c));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i*)(rows[i + 16] + c)), 1);
      }, half);
    } else {
      transpose_half([&](int i) {
        const __m128i low = _mm_loadl_epi64((const __m128i*)(rows[i] + c));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadl_epi64((const __m128i*)(rows[i + 16] + c)), 1);
      }, half);
    }
    transpose_half(again, out);
  }
}

// v[i][j] -> v[j][i]
inline void transpose_floats(__m256 (&v)[8]) {
  __m256 a[8];
  const auto low = [](__m256 p, __m256 q) { return _mm256_shuffle_ps(p, q, 0x44); };
  const auto high = [](__m256 p, __m256 q) { return _mm256_shuffle_ps(p, q, 0xee); };
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 p = _mm256_unpacklo_ps(v[i], v[i + 1]), q = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const __m256 r = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), s = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    a[i] = low(p, r), a[i + 1] = high(p, r), a[i + 2] = low(q, s), a[i + 3] = high(q, s);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace slimba
