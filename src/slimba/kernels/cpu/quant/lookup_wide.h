// Many tokens against signs with AVX-512: five signs of 32 rows look up sums of five activations, 16 bits each.
//
// A look-up and an addition are 160 products, two of each a cycle where `vpermw` is one operation (AMD from Zen 4 on):
// multiplying bytes (panel.h) is 64 an instruction. The 64 columns of a word are twelve groups of five and one of four, so
// that the sums of four words, 52 groups, fit 16 bits: 4 * 64 * 127 = 32512. What lies above the five bits of an index
// is ignored by the instruction and left as it is; the table of the group of four has every entry twice.
#pragma once

#include "panel.h"

namespace slimba {
namespace {

constexpr int64_t kWordGroups = 13, kLaneRows = 32;  // of 64 columns; of a vector of indices
constexpr int64_t kChunkWords = 4, kChunkGroups = kChunkWords * kWordGroups;
constexpr int kTileLanes = 4, kTileTokens = 6;      // 24 sums in registers
constexpr int64_t kWideRows = 1024, kWideTokens = 128;  // whose sums stay in the second-level cache
constexpr int64_t kTableBytes = 64;

// and a line more: or tokens would fight for the same cache sets
inline int64_t wide_bytes(int64_t cols) { return round_up(cols, 64) / 64 * kWordGroups * kTableBytes + 64; }

inline int64_t wide_scratch_bytes(int64_t cols) {
  const int64_t wide = kWideRows / kLaneRows * kChunkGroups * kTableBytes + kWideTokens * kWideRows * 4;
  const int64_t rows = many_scratch_bytes(cols);
  return wide > rows ? wide : rows;
}

// Entry e of a table: the sum of the activations whose bits are set in e.
void wide_prepare(const int8_t* x, int64_t cols, uint8_t* out) {
  alignas(64) int8_t chosen[3][64];  // of two activations each, as bytes that multiply them
  for (int pair = 0; pair < 3; ++pair)
    for (int i = 0; i < 64; ++i) chosen[pair][i] = 2 * pair + i % 2 < 5 ? int8_t(i / 2 >> (2 * pair + i % 2) & 1) : 0;
  const vi first = iload(chosen[0]), second = iload(chosen[1]), third = iload(chosen[2]);
  const auto products = [](vi bits, const int8_t* two) {
    short word;
    __builtin_memcpy(&word, two, 2);
    return _mm512_maddubs_epi16(bits, _mm512_set1_epi16(word));
  };
  for (int64_t c = 0; c < round_up(cols, 64); c += 64) {
    for (int g = 0; g < kWordGroups; ++g, out += kTableBytes) {
      const int8_t* q = x + c + 5 * g;
      vi sums = _mm512_add_epi16(products(first, q), products(second, q + 2));
      if (g < kWordGroups - 1) sums = _mm512_add_epi16(sums, products(third, q + 4));
      istore(out, sums);
    }
  }
}

// 64 columns of 32 rows as indices: out[group][row]. Vector j holds in its word k the bits of row 4 k + j, so that four of
// them blended are the rows in order.
inline void spread_word(const uint8_t* const (&rows)[kLaneRows], int64_t byte, uint8_t* out) {
  vi v[4];
  for (int j = 0; j < 4; ++j) {
    long long words[8];
    for (int k = 0; k < 8; ++k) __builtin_memcpy(words + k, rows[4 * k + j] + byte, 8);
    v[j] = _mm512_setr_epi64(words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]);
  }
  v[1] = _mm512_rol_epi64(v[1], 16), v[2] = _mm512_rol_epi64(v[2], 32), v[3] = _mm512_rol_epi64(v[3], 48);
  for (int g = 0; g < kWordGroups; ++g, out += kTableBytes) {
    const vi low = _mm512_mask_blend_epi16(0x22222222u, v[0], v[1]), high = _mm512_mask_blend_epi16(0x88888888u, v[2], v[3]);
    istore(out, _mm512_mask_blend_epi32(0xaaaa, low, high));
    for (int j = 0; j < 4; ++j) v[j] = _mm512_ror_epi64(v[j], 5);
  }
}

// Words from .. from + words of n rows as indices: [32 rows][word][group][row]
inline void spread_rows(const uint8_t* data, int64_t row_bytes, int64_t n, int64_t from, int64_t words, uint8_t* out) {
  for (int64_t first = 0; first < n; first += kLaneRows, out += kChunkGroups * kTableBytes) {
    const uint8_t* rows[kLaneRows];
    for (int64_t i = 0; i < kLaneRows; ++i) rows[i] = data + min64(first + i, n - 1) * row_bytes;
    for (int64_t w = 0; w < words; ++w) spread_word(rows, 8 * (from + w), out + w * kWordGroups * kTableBytes);
  }
}

// sum += table[index]. As assembly: from intrinsics GCC makes all look-ups of a step first, and then lacks registers.
inline void add_wide(vi& sum, vi table, vi index) {
#if defined(SLIMBA_SIMDE)
  sum = _mm512_add_epi16(sum, _mm512_permutexvar_epi16(index, table));
#else
  vi found;
  asm("vpermw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+v"(sum), "=&v"(found) : "v"(table), "v"(index));
#endif
}

// sum[t][l] of TK tokens and LK vectors of 32 rows over `groups` groups
template <int TK, int LK>
inline void wide_sums(const uint8_t* indices, int64_t groups, const uint8_t* tables, int64_t stride, vi (&out)[TK][LK]) {
  vi sum[TK][LK];  // of this function alone: the compiler keeps it in registers
#pragma GCC unroll 8
  for (int t = 0; t < TK; ++t)
#pragma GCC unroll 4
    for (int l = 0; l < LK; ++l) sum[t][l] = izero();
  const uint8_t* third[(TK + 2) / 3];  // every third token: the others are one and two strides on
#pragma GCC unroll 4
  for (int i = 0; i < (TK + 2) / 3; ++i) third[i] = tables + 3 * i * stride;
  for (int64_t g = 0; g < groups; ++g) {
    vi index[LK];
#pragma GCC unroll 4
    for (int l = 0; l < LK; ++l) index[l] = iload(indices + (l * kChunkGroups + g) * kTableBytes);
#pragma GCC unroll 8
    for (int t = 0; t < TK; ++t) {
      const vi table = iload(third[t / 3] + t % 3 * stride + g * kTableBytes);
#pragma GCC unroll 4
      for (int l = 0; l < LK; ++l) add_wide(sum[t][l], table, index[l]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TK; ++t)
#pragma GCC unroll 4
    for (int l = 0; l < LK; ++l) out[t][l] = sum[t][l];
}

// Those sums as 32-bit numbers: sums[t][row] is set if `first`, else added to.
template <int TK, int LK>
inline void wide_tile(const uint8_t* indices, int64_t groups, const uint8_t* tables, int64_t stride, bool first,
                      int32_t* sums) {
  vi sum[TK][LK];
  wide_sums<TK, LK>(indices, groups, tables, stride, sum);
  for (int t = 0; t < TK; ++t) {
    for (int l = 0; l < LK; ++l) {
      int32_t* to = sums + t * kWideRows + l * kLaneRows;
      const vi low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(sum[t][l]));
      const vi high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(sum[t][l], 1));
      istore(to, first ? low : iadd(iload(to), low));
      istore(to + W, first ? high : iadd(iload(to + W), high));
    }
  }
}

// One tile's tokens and all rows
template <int TK>
inline void wide_tokens(const uint8_t* indices, int64_t lanes_used, int64_t groups, const uint8_t* tables, int64_t stride,
                        bool first, int32_t* sums) {
  int64_t l = 0;
  for (; l + kTileLanes <= lanes_used; l += kTileLanes)
    wide_tile<TK, kTileLanes>(indices + l * kChunkGroups * kTableBytes, groups, tables, stride, first, sums + l * kLaneRows);
  for (; l < lanes_used; ++l)
    wide_tile<TK, 1>(indices + l * kChunkGroups * kTableBytes, groups, tables, stride, first, sums + l * kLaneRows);
}

// y of the rows row .. row + n and `tokens` tokens from `token` on
inline void wide_block(const QuantArgs& a, int64_t row, int64_t n, int64_t token, int64_t tokens) {
  const Finish finish = {a};
  const int64_t row_bytes = SignPanel::row_bytes(a.cols), words = row_bytes / 8, stride = wide_bytes(a.cols);
  const int64_t used = (n + kLaneRows - 1) / kLaneRows;
  uint8_t* indices = a.scratch;
  int32_t* sums = (int32_t*)(indices + kWideRows / kLaneRows * kChunkGroups * kTableBytes);
  for (int64_t from = 0; from < words; from += kChunkWords) {
    const int64_t some = min64(kChunkWords, words - from), groups = some * kWordGroups;
    spread_rows(a.data + row * row_bytes, row_bytes, n, from, some, indices);
    const uint8_t* tables = a.prepared + token * stride + from * kWordGroups * kTableBytes;
    int64_t t = 0;
    for (; t + kTileTokens <= tokens; t += kTileTokens)
      wide_tokens<kTileTokens>(indices, used, groups, tables + t * stride, stride, from == 0, sums + t * kWideRows);
    for (; t + 2 <= tokens; t += 2)
      wide_tokens<2>(indices, used, groups, tables + t * stride, stride, from == 0, sums + t * kWideRows);
    for (; t < tokens; ++t)
      wide_tokens<1>(indices, used, groups, tables + t * stride, stride, from == 0, sums + t * kWideRows);
  }
  vf scale[kWideRows / W];
  for (int64_t v = 0; v * W < n; ++v) scale[v] = finish.scales(row + v * W, n - v * W);
  for (int64_t t = 0; t < tokens; ++t) {
    const int total = finish.total(token + t);
    for (int64_t v = 0; v * W < n; ++v)
      finish.scaled(row + v * W, min64(W, n - v * W), token + t,
                    SignPanel::correct(iload(sums + t * kWideRows + v * W), total), scale[v]);
  }
}

void wide_many(const QuantArgs& a) {
  for (int64_t token = 0; token < a.tokens; token += kWideTokens)
    for (int64_t row = a.row_begin; row < a.row_end; row += kWideRows)
      wide_block(a, row, min64(kWideRows, a.row_end - row), token, min64(kWideTokens, a.tokens - token));
}

}  // namespace
}  // namespace slimba
