// Few tokens against signs with AVX2: nibbles of 32 rows look up sums of four activations.
//
// The sum of the activations that four signs choose lies within -508 .. 508; plus 508 it is 32 h + l with h and l below
// 32, so eight of each can be added as bytes before they must be widened. Rows are transposed first, 32 at a time, so
// that a vector of bytes holds eight columns of 32 rows.
#pragma once

#include "rows.h"
#include "transpose.h"

namespace slimba {
namespace {

constexpr int64_t kLookupRows = kTurnedRows;
constexpr int64_t kLookupOffset = 508;
constexpr int64_t kWidenColumns = 256;  // whose sums of 32 h + l fit 16 bits without a sign

// 16 low and 16 high parts for 4 columns, and a line more: or tokens would fight for the same cache sets
inline int64_t lookup_bytes(int64_t cols) { return round_up(cols, 64) * 8 + 64; }

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

// sum += table[index], byte by byte. As assembly: from intrinsics GCC makes all look-ups of a step first, and then lacks
// registers for the sums.
inline void add_looked_up(vi& sum, vi table, vi index) {
  vi found;
  asm("vpshufb %3, %2, %1\n\tvpaddb %1, %0, %0" : "+x"(sum), "=x"(found) : "x"(table), "x"(index));
}

inline void looked_up(vi& sum, vi table, vi index) { asm("vpshufb %2, %1, %0" : "=x"(sum) : "x"(table), "x"(index)); }

inline vi table_at(const uint8_t* p) { return irepeat(_mm_loadu_si128((const __m128i*)p)); }

// low + 32 high of 32 rows, added to 16-bit sums: wide[0] has the rows 0 .. 7 and 16 .. 23, wide[1] the others.
inline void widen(vi low, vi high, vi (&wide)[2]) {
  const vi weights = _mm256_set1_epi16(0x2001);
  wide[0] = _mm256_add_epi16(wide[0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), weights));
  wide[1] = _mm256_add_epi16(wide[1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), weights));
}

// The rows 8 i .. 8 i + 8 of what `widen` added up
inline vi widened(const vi (&wide)[2], int i) {
  const vi v = wide[i % 2];
  return _mm256_cvtepu16_epi32(i < 2 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1));
}

// Sums of the chosen activations of 32 transposed rows: sum[i] holds the rows 8 i .. 8 i + 8. fetch(k) before eight bytes.
template <class Fetch>
inline void look_up(const uint8_t* columns, int64_t row_bytes, const uint8_t* tables, const Fetch& fetch, vi (&sum)[4]) {
  const vi nibble = ibytes(15);
  for (int i = 0; i < 4; ++i) sum[i] = iset(int(-kLookupOffset * 2 * row_bytes));
  for (int64_t from = 0; from < row_bytes; from += kWidenColumns / 8) {
    vi wide[2] = {izero(), izero()};
    const int64_t to = min64(from + kWidenColumns / 8, row_bytes);
    for (int64_t k = from; k < to; k += 8) {  // 64 columns: eight parts in every byte of a sum
      vi low[2] = {izero(), izero()}, high[2] = {izero(), izero()};
      fetch(k);
#pragma GCC unroll 8
      for (int64_t j = k; j < k + 8; ++j) {
        const vi v = iload(columns + j * 32), a = iand(v, nibble), b = iand(ishr16<4>(v), nibble);
        const uint8_t* t = tables + j * 64;
        add_looked_up(low[0], table_at(t), a);
        add_looked_up(high[0], table_at(t + 16), a);
        add_looked_up(low[1], table_at(t + 32), b);
        add_looked_up(high[1], table_at(t + 48), b);
      }
      widen(low[0], high[0], wide);
      widen(low[1], high[1], wide);
    }
    for (int i = 0; i < 4; ++i) sum[i] = iadd(sum[i], widened(wide, i));
  }
}

void lookup_few(const QuantArgs& a) {
  const Finish finish = {a};
  const int64_t row_bytes = SignPanel::row_bytes(a.cols);
  for (int64_t row = a.row_begin; row < a.row_end; row += kLookupRows) {
    const int64_t n = min64(kLookupRows, a.row_end - row);
    transpose_bytes(a.data + row * row_bytes, row_bytes, n, 0, row_bytes, a.scratch);
    const uint8_t* rows = a.data + row * row_bytes;
    const auto fetch = [&](int64_t k) {  // of eight bytes of every row
      for (int64_t i = 0; i < 8 * kLookupRows; i += 64) fetch_later(rows + k * kLookupRows + i, a.once);
    };
    for (int64_t t = 0; t < a.tokens; ++t) {
      vi sum[4];
      const uint8_t* tables = a.prepared + t * lookup_bytes(a.cols);
      if (t == 0) look_up(a.scratch, row_bytes, tables, fetch, sum);
      else look_up(a.scratch, row_bytes, tables, [](int64_t) {}, sum);
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
