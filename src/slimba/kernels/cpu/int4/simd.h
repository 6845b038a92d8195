// int4 rows (groups of 128 columns) for AVX2 and AVX-512.
//
// A vector of W bytes holds 2 W columns: its low nibbles are the even ones, its high nibbles the odd ones. So
// activations are stored with the even and odd columns of every 2 W apart, and weight vector 2 j (2 j + 1) holds the
// even (odd) columns 2 W j ... A group's sum is made of whole numbers times activations and meets its scale once, at
// the end of the group. AVX-512 looks up nibble - 8; AVX2 multiplies the bare nibble and starts each group at -8 times
// the sum of its activations (lane by lane, made once per token by `prepare`). Every (row, token) has one accumulator a
// group and one for the row, whatever the tile: results do not depend on T.
#include "../dots.h"

namespace slimba {
namespace {

constexpr int64_t kGroup = 128;
#if defined(__AVX512F__)
constexpr int kInt4Rows = 4;  // x 4 tokens that fit the registers
#else
constexpr int kInt4Rows = 2;
#endif

inline int64_t int4_groups(int64_t cols) { return (cols + kGroup - 1) / kGroup; }
// Activations, and behind them where each group's sum starts
inline int64_t int4_offsets(int64_t cols) { return padded(cols) + 16; }
inline int64_t int4_prepared_floats(int64_t cols) { return round_up(int4_offsets(cols) + int4_groups(cols) * W, 16); }

// Vector `odd` of the two in W bytes, as whole numbers
inline vf int4_numbers(vi bytes, bool odd) {
#if defined(__AVX512F__)
  const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(odd ? _mm512_srli_epi32(bytes, 4) : bytes, table);  // looks at four bits only
#else
  return _mm256_cvtepi32_ps(odd ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
#endif
}

struct Int4Rows {
  const uint8_t *data, *scales;
  int64_t cols, row_bytes, groups;

  const uint8_t* row(int64_t r) const { return data + r * row_bytes; }
  void fetch(int64_t r, int64_t pair) const { fetch_line((const uint8_t*)row(r + W) + pair * W); }
  int64_t whole_pairs() const { return row_bytes / W; }
  static vf load(const uint8_t* row, int64_t pair, bool odd) { return int4_numbers(load_bytes(row + pair * W), odd); }
  vf load_end(const uint8_t* row, int64_t pair, bool odd) const {
    return int4_numbers(load_bytes_n(row + pair * W, row_bytes - pair * W), odd);
  }
  vf scale(int64_t r, int64_t group) const {
    const uint8_t* p = scales + 2 * (r * groups + group);
    return vset(_cvtsh_ss((unsigned short)(p[0] | p[1] << 8)));
  }
};

// acc[r][t] of RB rows and TK tokens over all columns.
template <int RB, int TK>
inline void int4_tile(const Int4Rows& w, const int64_t* rows, const float* x, int64_t stride, vf (*acc)[4]) {
  constexpr int64_t kPairs = kGroup / (2 * W);
  const uint8_t* row[RB];
  vf sum[RB][TK];
  for (int r = 0; r < RB; ++r) {
    row[r] = w.row(rows[r]);
    for (int t = 0; t < TK; ++t) acc[r][t] = vzero();
  }
  const auto add_pair = [&](int64_t pair, auto load) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      vf in[TK];
#pragma GCC unroll 8
      for (int t = 0; t < TK; ++t) in[t] = vload(x + t * stride + (2 * pair + odd) * W);
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) {
        const vf numbers = load(row[r], pair, odd);
#pragma GCC unroll 8
        for (int t = 0; t < TK; ++t) sum[r][t] = vfma(numbers, in[t], sum[r][t]);
      }
    }
  };
  const int64_t pairs = (w.cols + 2 * W - 1) / (2 * W);
  for (int64_t g = 0; g < w.groups; ++g) {
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) {
      w.fetch(rows[r], g * kPairs);
#pragma GCC unroll 8
      for (int t = 0; t < TK; ++t) sum[r][t] = W == 16 ? vzero() : vload(x + t * stride + int4_offsets(w.cols) + g * W);
    }
    const int64_t end = min64(pairs, (g + 1) * kPairs), whole = min64(end, w.whole_pairs());
    int64_t pair = g * kPairs;
    for (; pair < whole; ++pair)
      add_pair(pair, [](const uint8_t* p, int64_t k, bool odd) { return Int4Rows::load(p, k, odd); });
    if (pair < end) add_pair(pair, [&](const uint8_t* p, int64_t k, bool odd) { return w.load_end(p, k, odd); });
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) {
      const vf scale = w.scale(rows[r], g);
#pragma GCC unroll 8
      for (int t = 0; t < TK; ++t) acc[r][t] = vfma(scale, sum[r][t], acc[r][t]);
    }
  }
}

// y of W rows (n of them real) from `row` on and TK tokens from `token` on; RB rows share registers at a time.
template <int RB, int TK>
inline void int4_rows(const Int4Rows& w, const MatmulArgs& a, int64_t row, int64_t n, int64_t token) {
  const int64_t stride = int4_prepared_floats(a.cols);
  vf acc[W][4];
  for (int first = 0; first < W; first += RB) {
    int64_t rows[RB];
    for (int r = 0; r < RB; ++r) rows[r] = row + min64(first + r, n - 1);  // past the end: the last row again
    int4_tile<RB, TK>(w, rows, a.x + token * stride, stride, acc + first);
  }
  for (int t = 0; t < TK; ++t) {
    vf column[W];
    for (int r = 0; r < W; ++r) column[r] = acc[r][t];
    float* out = a.y + (token + t) * a.y_stride + row;
    const vf v = reduce_rows(column);
    vstore_n(out, a.add ? vadd(v, vload_n(out, n)) : v, n);
  }
}

inline void int4_tokens(const Int4Rows& w, const MatmulArgs& a, int64_t row, int64_t n) {
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) int4_rows<kInt4Rows, 4>(w, a, row, n, t);
  for (; t + 2 <= a.tokens; t += 2) int4_rows<4, 2>(w, a, row, n, t);
  for (; t < a.tokens; ++t) int4_rows<8, 1>(w, a, row, n, t);
}

void prepare(const float* x, int64_t cols, float* out) {
  for (int64_t c = 0; c < padded(cols); c += 2 * W) {
    for (int64_t i = 0; i < W; ++i) {
      const int64_t even = c + 2 * i;
      out[c + i] = even < cols ? x[even] : 0.0f;
      out[c + W + i] = even + 1 < cols ? x[even + 1] : 0.0f;
    }
  }
  for (int64_t g = 0; g < int4_groups(cols); ++g) {
    vf sum = vzero();
    for (int64_t c = g * kGroup; c < min64((g + 1) * kGroup, padded(cols)); c += W) sum = vadd(sum, vload(out + c));
    vstore(out + int4_offsets(cols) + g * W, vmul(vset(-8.0f), sum));
  }
}

void matmul(const MatmulArgs& a) {
  const Int4Rows w = {a.data, a.scale, a.cols, (a.cols + 1) / 2, int4_groups(a.cols)};
  for (int64_t row = a.row_begin; row < a.row_end; row += W) int4_tokens(w, a, row, min64(W, a.row_end - row));
}

}  // namespace
}  // namespace slimba
