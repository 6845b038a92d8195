// Few tokens against signs with AVX2: nibbles of 32 rows look up sums of four activations.
//
// The sum of the activations that four signs choose lies within -508 .. 508; plus 508 it is 32 h + l with h and l below
// 32, so eight of each can be added as bytes before they must be widened. Rows are transposed first, 32 at a time, so
// that a vector of bytes holds eight columns of 32 rows.
#pragma once

#include "rows.h"

namespace slimba {
namespace {

constexpr int64_t kLookupRows = 32;
constexpr int64_t kLookupOffset = 508;
constexpr int64_t kWidenColumns = 8192;  // so many columns' parts fit 16 bits without a sign

inline int64_t lookup_bytes(int64_t cols) { return round_up(cols, 64) * 8; }  // 16 low and 16 high parts for 4 columns

void lookup_prepare(const int8_t* x, int64_t cols, uint8_t* out) {
  const vi first = _mm256_setr_epi32(0, 1, 0x100, 0x101, 0x10000, 0x10001, 0x10100, 0x10101);
  const vi second = ior(first, iset(0x1000000)), ones = _mm256_set1_epi16(1);
  for (int64_t c = 0; c < round_up(cols, 64); c += 4) {
    const vi four = ifour(x + c);
    const vi low = _mm256_madd_epi16(_mm256_maddubs_epi16(first, four), ones);     // entries 0 .. 7
    const vi high = _mm256_madd_epi16(_mm256_maddubs_epi16(second, four), ones);   // entries 8 .. 15
    vi sums = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);       // entries in order
    sums = _mm256_add_epi16(sums, _mm256_set1_epi16(kLookupOffset));
    const vi parts = _mm256_packus_epi16(iand(sums, _mm256_set1_epi16(31)), _mm256_srli_epi16(sums, 5));
    istore(out + c * 8, _mm256_permute4x64_epi64(parts, 0xd8));
  }
}

// 32 rows (n of them real, the last one repeated) -> out[byte][row]
inline void transpose_bytes(const uint8_t* data, int64_t row_bytes, int64_t n, uint8_t* out) {
  for (int64_t c = 0; c < row_bytes; c += 16) {
    vi a[16], b[16];
    for (int64_t i = 0; i < 16; ++i) {
      const uint8_t *p = data + min64(i, n - 1) * row_bytes + c, *q = data + min64(i + 16, n - 1) * row_bytes + c;
      const int64_t left = row_bytes - c;  // 8 or more
      a[i] = _mm256_inserti128_si256(
          _mm256_castsi128_si256(left >= 16 ? _mm_loadu_si128((const __m128i*)p) : _mm_loadl_epi64((const __m128i*)p)),
          left >= 16 ? _mm_loadu_si128((const __m128i*)q) : _mm_loadl_epi64((const __m128i*)q), 1);
    }
    const auto mix = [](const vi(&from)[16], vi(&to)[16]) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + 8]);
        to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + 8]);
      }
    };
    mix(a, b);
    mix(b, a);
    mix(a, b);
    mix(b, a);
    for (int64_t i = 0; i < min64(16, row_bytes - c); ++i) istore(out + (c + i) * 32, a[i]);
  }
}

// Sums of the chosen activations of 32 transposed rows: sum[i] holds the rows 8 i .. 8 i + 8.
inline void look_up(const uint8_t* columns, int64_t row_bytes, const uint8_t* tables, vi (&sum)[4]) {
  const vi nibble = ibytes(15), byte = _mm256_set1_epi16(255);
  const auto table = [](const uint8_t* p) { return irepeat(_mm_loadu_si128((const __m128i*)p)); };
  for (int i = 0; i < 4; ++i) sum[i] = iset(int(-kLookupOffset * 2 * row_bytes));
  for (int64_t from = 0; from < row_bytes; from += kWidenColumns / 8) {
    vi low_even = izero(), low_odd = izero(), high_even = izero(), high_odd = izero();
    const int64_t to = min64(from + kWidenColumns / 8, row_bytes);
    for (int64_t k = from; k < to; k += 4) {  // 32 columns: eight parts a byte
      vi low = izero(), high = izero();
#pragma GCC unroll 4
      for (int64_t j = k; j < k + 4; ++j) {
        const vi v = iload(columns + j * 32), a = iand(v, nibble), b = iand(ishr16<4>(v), nibble);
        const uint8_t* t = tables + j * 64;
        low = _mm256_add_epi8(low, _mm256_add_epi8(ishuffle(table(t), a), ishuffle(table(t + 32), b)));
        high = _mm256_add_epi8(high, _mm256_add_epi8(ishuffle(table(t + 16), a), ishuffle(table(t + 48), b)));
      }
      low_even = _mm256_add_epi16(low_even, iand(low, byte));
      low_odd = _mm256_add_epi16(low_odd, ishr16<8>(low));
      high_even = _mm256_add_epi16(high_even, iand(high, byte));
      high_odd = _mm256_add_epi16(high_odd, ishr16<8>(high));
    }
    const auto widen = [](vi low, vi high, int half) {  // low + 32 high of the rows of one 128-bit half
      const auto part = [&](vi v) {
        return _mm256_cvtepu16_epi32(half ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v));
      };
      return iadd(part(low), ishl<5>(part(high)));
    };
    for (int half = 0; half < 2; ++half) {
      const vi even = widen(low_even, high_even, half), odd = widen(low_odd, high_odd, half);
      const vi a = _mm256_unpacklo_epi32(even, odd), b = _mm256_unpackhi_epi32(even, odd);
      sum[2 * half] = iadd(sum[2 * half], _mm256_permute2x128_si256(a, b, 0x20));
      sum[2 * half + 1] = iadd(sum[2 * half + 1], _mm256_permute2x128_si256(a, b, 0x31));
    }
  }
}

void lookup_few(const QuantArgs& a) {
  const Finish finish = {a};
  const int64_t row_bytes = SignPanel::row_bytes(a.cols);
  for (int64_t row = a.row_begin; row < a.row_end; row += kLookupRows) {
    const int64_t n = min64(kLookupRows, a.row_end - row);
    transpose_bytes(a.data + row * row_bytes, row_bytes, n, a.scratch);
    for (int64_t b = 0; b < kLookupRows * row_bytes; b += 64)
      _mm_prefetch((const char*)a.data + (row + kLookupRows) * row_bytes + b, _MM_HINT_T1);
    for (int64_t t = 0; t < a.tokens; ++t) {
      vi sum[4];
      look_up(a.scratch, row_bytes, a.prepared + t * lookup_bytes(a.cols), sum);
      const int total = finish.total(t);
      for (int i = 0; i < 4 && i * W < n; ++i) {
        const int64_t first = row + i * W, count = min64(W, n - i * W);
        finish.scaled(first, count, t, SignPanel::correct(sum[i], total), finish.scales(first, count));
      }
    }
  }
}

}  // namespace
}  // namespace slimba
