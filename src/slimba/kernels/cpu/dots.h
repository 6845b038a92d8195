// Matrix products of formats whose weights become floats one vector at a time (floats, int8), for AVX2 and AVX-512.
//
// A Loader gives W consecutive weights of a row: `load(row, k)` for whole vectors, `load_n(row, k, n)` for the last
// one, and `scale(row, n)`, the factors of W consecutive rows applied at the end; `at(row, k)` is where vector k lies
// and kVectorsPerLine how many vectors a cache line holds. Lanes run over columns: every (row, token) has one
// accumulator that meets the columns in order and is reduced in one fixed way, whatever the tile, so results do not
// depend on T.
#pragma once

#include "simd.h"

namespace slimba {
namespace {

// acc[row][token] of RB rows and TK tokens over all columns. x: TK tokens, stride floats apart, zero-padded to 2 W.
template <class Loader, int RB, int TK>
inline void dot_tile(const Loader& loader, const int64_t* rows, const float* x, int64_t stride, vf (*acc)[4]) {
  const int64_t whole = loader.vectors(), tail = loader.tail();
  vf sum[RB][TK];
#pragma GCC unroll 16
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TK; ++t) sum[r][t] = vzero();
  for (int64_t k = 0; k < whole; ++k) {
    if (k % Loader::kVectorsPerLine == 0) {  // the rows after the next ones are on their way
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r) _mm_prefetch((const char*)loader.at(rows[r] + W, k), _MM_HINT_T1);
    }
    vf in[TK];
#pragma GCC unroll 4
    for (int t = 0; t < TK; ++t) in[t] = vload(x + t * stride + k * W);
#pragma GCC unroll 16
    for (int r = 0; r < RB; ++r) {
      const vf w = loader.load(rows[r], k);
#pragma GCC unroll 4
      for (int t = 0; t < TK; ++t) sum[r][t] = vfma(w, in[t], sum[r][t]);
    }
  }
  for (int64_t k = whole; k < whole + tail; ++k) {
    for (int r = 0; r < RB; ++r) {
      const vf w = loader.load_n(rows[r], k);
      for (int t = 0; t < TK; ++t) sum[r][t] = vfma(w, vload(x + t * stride + k * W), sum[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TK; ++t) acc[r][t] = sum[r][t];
}

// y of W rows (n of them real) and TK tokens; RB rows share registers at a time.
template <class Loader, int RB, int TK>
inline void dot_rows(const Loader& loader, int64_t row, int64_t n, vf scale, const float* x, int64_t stride, float* y,
                     int64_t y_stride, bool add) {
  vf acc[W][4];
  for (int first = 0; first < W; first += RB) {
    int64_t rows[RB];
    for (int r = 0; r < RB; ++r) rows[r] = row + min64(first + r, n - 1);  // past the end: the last row again
    dot_tile<Loader, RB, TK>(loader, rows, x, stride, acc + first);
  }
  for (int t = 0; t < TK; ++t) {
    vf column[W];
    for (int r = 0; r < W; ++r) column[r] = acc[r][t];
    float* out = y + t * y_stride;
    vf v = reduce_rows(column);
    v = add ? vfma(v, scale, vload_n(out, n)) : vmul(v, scale);
    vstore_n(out, v, n);
  }
}

template <class Loader>
inline void dot_tokens(const Loader& loader, int64_t row, int64_t n, vf scale, const float* x, int64_t stride,
                       int64_t tokens, float* y, int64_t y_stride, bool add) {
  constexpr int kRows = W == 16 ? 4 : 2;  // rows x 4 tokens that fit the registers
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    dot_rows<Loader, kRows, 4>(loader, row, n, scale, x + t * stride, stride, y + t * y_stride, y_stride, add);
  for (; t + 2 <= tokens; t += 2)
    dot_rows<Loader, 4, 2>(loader, row, n, scale, x + t * stride, stride, y + t * y_stride, y_stride, add);
  for (; t < tokens; ++t)
    dot_rows<Loader, 8, 1>(loader, row, n, scale, x + t * stride, stride, y + t * y_stride, y_stride, add);
}

// Tokens are a cache line apart from a power of two, or they would fight for the same cache sets.
inline int64_t padded(int64_t cols) { return round_up(cols, 32); }
inline int64_t dot_prepared_floats(int64_t cols) { return padded(cols) + 16; }
inline int64_t dot_scratch_floats(int64_t) { return 0; }

inline void dot_prepare(const float* x, int64_t cols, float* out) {
  int64_t c = 0;
  for (; c + W <= cols; c += W) vstore(out + c, vload(x + c));
  for (; c < padded(cols); c += W) vstore(out + c, c < cols ? vload_n(x + c, cols - c) : vzero());
}

// One token and rows of a single vector (the A of a low-rank correction): same sums, no bookkeeping.
template <class Loader>
inline void short_rows(const Loader& loader, const MatmulArgs& a) {
  const vf x = vload(a.x);
  for (int64_t row = a.row_begin; row < a.row_end; row += W) {
    const int64_t n = min64(W, a.row_end - row);
    vf products[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) products[r] = vfma(loader.load(row + min64(r, n - 1), 0), x, vzero());
    const vf v = reduce_rows(products), scale = loader.scale(row, n);
    vstore_n(a.y + row, a.add ? vfma(v, scale, vload_n(a.y + row, n)) : vmul(v, scale), n);
  }
}

// The whole product, W rows at a time.
template <class Loader>
inline void dot_matmul(const Loader& loader, const MatmulArgs& a) {
  if (a.tokens == 1 && loader.vectors() == 1 && !loader.tail()) return short_rows(loader, a);
  const int64_t stride = dot_prepared_floats(a.cols);
  for (int64_t row = a.row_begin; row < a.row_end; row += W) {
    const int64_t n = min64(W, a.row_end - row);
    dot_tokens(loader, row, n, loader.scale(row, n), a.x, stride, a.tokens, a.y + row, a.y_stride, a.add);
  }
}

}  // namespace
}  // namespace slimba
