// Some tokens against signs with AVX2: the look-ups of lookup.h with nibbles that are spread to bytes once for all tokens.
//
// Two vectors of rows and two tokens make a tile: eight look-ups a step of four columns, each an instruction and an
// addition of bytes. That is 32 products an instruction; multiplying bytes (panel.h) is 16.
#pragma once

#include "lookup.h"
#include "sizes.h"
#include "subsets.h"

namespace slimba {
namespace {

constexpr int64_t kWideBytes = kWidenColumns / 8;  // of a row, between two widenings to 32 bits
constexpr int kPairRows = 2 * kLookupRows;
constexpr int64_t kTaskRows = 8 * kPairRows;  // rows and tokens whose sums stay in the second-level cache
constexpr int64_t kTaskTokens = 32;

inline int64_t lookup_scratch_bytes(int64_t cols) {
  const int64_t many = kWideBytes * kLookupRows + 2 * kWideBytes * kTaskRows + kTaskTokens * kTaskRows * 4;
  return round_up(cols, 64) * 4 + 512 > many ? round_up(cols, 64) * 4 + 512 : many;  // 32 rows transposed, for `few`
}

// Bytes from .. to of kPairRows rows (n of them real) as nibbles: out[nibble][row]; `bytes` is room for half of them.
inline void spread_nibbles(const uint8_t* data, int64_t row_bytes, int64_t n, int64_t from, int64_t to, uint8_t* bytes,
                           uint8_t* out) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t skip = half * kLookupRows < n ? half * kLookupRows : 0;
    transpose_bytes(data + skip * row_bytes, row_bytes, min64(kLookupRows, n - skip), from, to, bytes);
    uint8_t* at = out + half * kLookupRows;
    for (int64_t i = 0; i < to - from; ++i) {
      const vi v = iload(bytes + i * kLookupRows);
      istore(at + 2 * i * kPairRows, iand(v, ibytes(15)));
      istore(at + (2 * i + 1) * kPairRows, iand(ishr16<4>(v), ibytes(15)));
    }
  }
}

// sums[t][row] of TK tokens and a pair of vectors of rows over at most kWideBytes: set if `first`, else added to.
template <int TK>
inline void lookup_tile(const uint8_t* nibbles, int64_t bytes, const uint8_t* tables, int64_t stride, bool first,
                        int32_t* sums) {
  vi wide[TK][2][2];
  for (int t = 0; t < TK; ++t)
    for (int r = 0; r < 2; ++r) wide[t][r][0] = wide[t][r][1] = izero();
  for (int64_t k = 0; k < 2 * bytes; k += 8) {  // 32 columns: eight parts in every byte of a sum
    vi low[TK][2], high[TK][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int64_t j = k + i;
      const vi index[2] = {iload(nibbles + j * kPairRows), iload(nibbles + j * kPairRows + kLookupRows)};
#pragma GCC unroll 2
      for (int t = 0; t < TK; ++t) {
        const vi table = table_at(tables + t * stride + j * 32), above = table_at(tables + t * stride + j * 32 + 16);
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          if (i == 0) {
            looked_up(low[t][r], table, index[r]);
            looked_up(high[t][r], above, index[r]);
          } else {
            add_looked_up(low[t][r], table, index[r]);
            add_looked_up(high[t][r], above, index[r]);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < TK; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) widen(low[t][r], high[t][r], wide[t][r]);
  }
  for (int t = 0; t < TK; ++t)
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        int32_t* to = sums + t * kTaskRows + r * kLookupRows + i * W;
        const vi more = widened(wide[t][r], i);
        istore(to, first ? more : iadd(iload(to), more));
      }
}

// y of the rows row .. row + n and `tokens` tokens from `token` on
inline void lookup_block(const QuantArgs& a, int64_t row, int64_t n, int64_t token, int64_t tokens) {
  const Finish finish = {a};
  const int64_t row_bytes = SignPanel::row_bytes(a.cols), stride = lookup_bytes(a.cols);
  const int64_t pairs = (n + kPairRows - 1) / kPairRows, pair_bytes = 2 * kWideBytes * kPairRows;
  uint8_t *bytes = a.scratch, *nibbles = bytes + kWideBytes * kLookupRows;
  int32_t* sums = (int32_t*)(nibbles + 2 * kWideBytes * kTaskRows);
  for (int64_t from = 0; from < row_bytes; from += kWideBytes) {
    const int64_t to = min64(from + kWideBytes, row_bytes);
    for (int64_t p = 0; p < pairs; ++p)
      spread_nibbles(a.data + (row + p * kPairRows) * row_bytes, row_bytes, min64(kPairRows, n - p * kPairRows), from, to,
                     bytes, nibbles + p * pair_bytes);
    for (int64_t t = 0; t < tokens; t += 2) {
      const uint8_t* tables = a.prepared + (token + t) * stride + from * 64;
      for (int64_t p = 0; p < pairs; ++p) {
        int32_t* at = sums + t * kTaskRows + p * kPairRows;
        if (t + 2 <= tokens) lookup_tile<2>(nibbles + p * pair_bytes, to - from, tables, stride, from == 0, at);
        else lookup_tile<1>(nibbles + p * pair_bytes, to - from, tables, stride, from == 0, at);
      }
    }
  }
  const vi offset = iset(int(kLookupOffset * 2 * row_bytes));
  vf scale[kTaskRows / W];
  for (int64_t v = 0; v * W < n; ++v) scale[v] = finish.scales(row + v * W, n - v * W);
  for (int64_t t = 0; t < tokens; ++t) {
    const int total = finish.total(token + t);
    for (int64_t v = 0; v * W < n; ++v) {
      const vi sum = isub(iload(sums + t * kTaskRows + v * W), offset);
      finish.scaled(row + v * W, min64(W, n - v * W), token + t, SignPanel::correct(sum, total), scale[v]);
    }
  }
}

void lookup_many(const QuantArgs& a) {
  for (int64_t token = 0; token < a.tokens; token += kTaskTokens)
    for (int64_t row = a.row_begin; row < a.row_end; row += kTaskRows)
      lookup_block(a, row, min64(kTaskRows, a.row_end - row), token, min64(kTaskTokens, a.tokens - token));
}

void lookup_some(const QuantArgs& a) { return a.tokens <= kFew ? lookup_few(a) : lookup_many(a); }

// The same where the tables are still to be made, of less than kLeastTokens tokens
inline int64_t unprepared_bytes(int64_t cols) { return (kLeastTokens - 1) * lookup_bytes(cols); }
void lookup_unprepared(const QuantArgs& a) {
  QuantArgs ready = a;
  for (int64_t t = 0; t < a.tokens; ++t)
    lookup_prepare(a.x + t * a.x_stride, a.cols, a.scratch + t * lookup_bytes(a.cols));
  ready.prepared = a.scratch, ready.scratch += unprepared_bytes(a.cols);
  lookup_some(ready);
}

}  // namespace
}  // namespace slimba
