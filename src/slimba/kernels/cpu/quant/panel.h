// Many tokens: rows become panels of bytes, then blocks of them meet tiles of tokens, for AVX2, AVX-VNNI and AVX-512 VNNI.
//
// A panel holds kBlock rows as [cols / 4][kBlock][4] unsigned bytes u, columns padded to 64: a vector of it against four
// activations of a token, the same in every lane, is one instruction and needs no sum over lanes. The weight is 2 u - 1
// (sign), u - 128 (int8) or u - 8 (int4), so the sum of the activations corrects the result. AVX2 without VNNI keeps
// partial sums in 16 bits, and splits the u of int8 into two panels of four bits.
#pragma once

#include "lanes.h"

namespace slimba {
namespace {

constexpr int kTileVectors = 2;                                     // of rows, per tile
constexpr int64_t kTileRows = kTileVectors * W;
inline int64_t panel_bytes(int64_t cols) { return round_up(cols, 64) * kBlock; }
inline int64_t vector_step(int64_t cols) { return W == 16 ? panel_bytes(cols) : 4 * W; }  // to the tile's second vector

// Bytes byte .. byte + 16 of the W rows: out[i] holds in lane r bytes 4 i .. 4 i + 4 of row r.
inline void load_words(const uint8_t* const* rows, int64_t byte, int64_t row_bytes, vi (&out)[4]) {
  const int64_t left = row_bytes - byte;
  vi r[4];
  for (int q = 0; q < 4; ++q) {
#if defined(__AVX512F__)
    vi v = _mm512_castsi128_si512(load16(rows[q] + byte, left));
    v = _mm512_inserti32x4(v, load16(rows[4 + q] + byte, left), 1);
    v = _mm512_inserti32x4(v, load16(rows[8 + q] + byte, left), 2);
    r[q] = _mm512_inserti32x4(v, load16(rows[12 + q] + byte, left), 3);
#else
    r[q] = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(rows[q] + byte, left)),
                                   load16(rows[4 + q] + byte, left), 1);
#endif
  }
#if defined(__AVX512F__)
  const vi a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const vi c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
#else
  const vi a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
  const vi c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
  out[0] = _mm256_unpacklo_epi64(a, c), out[1] = _mm256_unpackhi_epi64(a, c);
  out[2] = _mm256_unpacklo_epi64(b, d), out[3] = _mm256_unpackhi_epi64(b, d);
#endif
}

// How a format's rows become panels: kPanels of them, `expand` for one word of W rows (a lane each), `correct` for the sum.
struct SignPanel {
  static constexpr int kPanels = 1, kFlush = 128;        // 128 pairs of two activations fit 16 bits
  static constexpr int64_t kColumnsPerByte = 8;
  static int64_t row_bytes(int64_t cols) { return (cols + 63) / 64 * 8; }
  static void expand(vi word, uint8_t* out, int64_t) {
    const vi low = iset(0x08040201), high = iset(int(0x80402010u)), one = ibytes(1);
    for (int b = 0; b < 4; ++b) {
      const vi byte = ishuffle(word, irepeat(_mm_setr_epi32(b * 0x01010101, (b + 4) * 0x01010101, (b + 8) * 0x01010101,
                                                            (b + 12) * 0x01010101)));
      istore(out + 2 * b * 64, imin_bytes(iand(byte, low), one));
      istore(out + (2 * b + 1) * 64, imin_bytes(iand(byte, high), one));
    }
  }
  static vi correct(vi sum, int total) { return isub(iadd(sum, sum), iset(total)); }
};

struct Int8Panel {
  static constexpr int kPanels = kVnni ? 1 : 2, kFlush = 8;
  static constexpr int64_t kColumnsPerByte = 1;
  static int64_t row_bytes(int64_t cols) { return cols; }
  static void expand(vi word, uint8_t* out, int64_t second) {
    const vi u = ixor(word, ibytes(0x80));
    if (kVnni) return istore(out, u);
    istore(out, iand(u, ibytes(15)));
    istore(out + second, iand(ishr16<4>(u), ibytes(15)));
  }
  static vi correct(vi sum, int total) { return isub(sum, iset(128 * total)); }
};

struct Int4Panel {
  static constexpr int kPanels = 1, kFlush = 8;
  static constexpr int64_t kColumnsPerByte = 2;
  static int64_t row_bytes(int64_t cols) { return (cols + 1) / 2; }
  static void expand(vi word, uint8_t* out, int64_t) {
    for (int half = 0; half < 2; ++half) {  // two bytes of a lane, each twice: its low nibble, then its high one
      const int at = half ? 0x03030202 : 0x01010000, four = 0x04040404;
      const vi twice = ishuffle(word, irepeat(_mm_setr_epi32(at, at + four, at + 2 * four, at + 3 * four)));
      const vi u = ior(iand(twice, iset(0x000f000f)), iand(ishr16<4>(twice), iset(0x0f000f00)));
      istore(out + half * 64, u);
    }
  }
  static vi correct(vi sum, int total) { return isub(sum, iset(8 * total)); }
};

// kBlock rows from `row` on (n of them real, the last one repeated) as a panel at `out`.
template <class P>
inline void expand_block(const QuantArgs& a, int64_t row, int64_t n, uint8_t* out) {
  const int64_t row_bytes = P::row_bytes(a.cols), bytes = round_up(a.cols, 64) / P::kColumnsPerByte;
  for (int64_t half = 0; half < kBlock; half += W) {
    const uint8_t* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = a.data + (row + min64(half + i, n - 1)) * row_bytes;
    for (int64_t byte = 0; byte < bytes; byte += 16) {
      vi words[4];
      load_words(rows, byte, row_bytes, words);
      for (int i = 0; i < 4 && byte + 4 * i < bytes; ++i)
        P::expand(words[i], out + (byte + 4 * i) * P::kColumnsPerByte * kBlock + half * 4, panel_bytes(a.cols));
    }
  }
}

#if !defined(__AVX512F__) && !defined(__AVXVNNI__)
// sum += products of bytes, added in pairs. As assembly: from intrinsics GCC makes all products of a step first, and then
// lacks registers for the sums.
inline void add_pairs(vi& sum, vi u, vi s) {
  vi pairs;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(u), "x"(s));
}
#endif

// sum[t][v] += products of `steps` times four columns; `panel` is where the first of them lies, x the first token's.
template <int TK, int kFlush>
inline void tile(const uint8_t* panel, int64_t step, int64_t steps, const int8_t* x, int64_t stride,
                 vi (&sum)[TK][kTileVectors]) {
  const int8_t* third[(TK + 2) / 3];  // every third token: the others are one and two strides on
  for (int i = 0; i < (TK + 2) / 3; ++i) third[i] = x + 3 * i * stride;
#if defined(__AVX512F__) || defined(__AVXVNNI__)
  vi part[TK][kTileVectors];  // of this function alone: the compiler keeps it in registers
#pragma GCC unroll 16
  for (int t = 0; t < TK; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) part[t][v] = sum[t][v];
  for (int64_t k = 0; k < steps; ++k) {
    vi w[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) w[v] = iload(panel + v * step + k * 64);
#pragma GCC unroll 16
    for (int t = 0; t < TK; ++t) {
      const vi four = ifour(third[t / 3] + t % 3 * stride + 4 * k);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) part[t][v] = dot4(part[t][v], w[v], four);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < TK; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sum[t][v] = part[t][v];
#else
  for (int64_t first = 0; first < steps; first += kFlush) {
    vi part[TK][kTileVectors];
#pragma GCC unroll 16
    for (int t = 0; t < TK; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) part[t][v] = izero();
    for (int64_t k = first; k < min64(first + kFlush, steps); ++k) {
      vi w[kTileVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) w[v] = iload(panel + v * step + k * 64);
#pragma GCC unroll 16
      for (int t = 0; t < TK; ++t) {
        const vi four = ifour(third[t / 3] + t % 3 * stride + 4 * k);
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) add_pairs(part[t][v], w[v], four);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < TK; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v)
        sum[t][v] = iadd(sum[t][v], _mm256_madd_epi16(part[t][v], _mm256_set1_epi16(1)));
  }
#endif
}

template <int TK>
inline void clear(vi (&sum)[TK][kTileVectors]) {
  for (int t = 0; t < TK; ++t)
    for (int v = 0; v < kTileVectors; ++v) sum[t][v] = izero();
}

// A tile of sign or int8 rows with TK tokens from `token` on; scale[v] are its rows' scales.
template <class P, int TK>
inline void whole_tile(const QuantArgs& a, const uint8_t* panel, int64_t row, int64_t n, const vf* scale, int64_t token) {
  const Finish finish = {a};
  const int64_t step = vector_step(a.cols), steps = round_up(a.cols, 64) / 4;
  const int8_t* x = a.x + token * a.x_stride;
  vi sum[TK][kTileVectors];
  clear(sum);
  if (P::kPanels == 2) {
    tile<TK, P::kFlush>(panel + panel_bytes(a.cols), step, steps, x, a.x_stride, sum);
    for (int t = 0; t < TK; ++t)
      for (int v = 0; v < kTileVectors; ++v) sum[t][v] = ishl<4>(sum[t][v]);
  }
  tile<TK, P::kFlush>(panel, step, steps, x, a.x_stride, sum);
  for (int t = 0; t < TK; ++t) {
    const int total = finish.total(token + t);
    for (int v = 0; v < kTileVectors && v * W < n; ++v)
      finish.scaled(row + v * W, min64(W, n - v * W), token + t, P::correct(sum[t][v], total), scale[v]);
  }
}

// The same of int4 rows; scale[v] are [groups, W].
template <int TK>
inline void group_tile(const QuantArgs& a, const uint8_t* panel, int64_t row, int64_t n, const float* const* scale,
                       int64_t token) {
  const Finish finish = {a};
  const int64_t step = vector_step(a.cols), steps = round_up(a.cols, 64) / 4, groups = groups_of(a.cols);
  const int8_t* x = a.x + token * a.x_stride;
  vf total[TK][kTileVectors];
  for (int t = 0; t < TK; ++t)
    for (int v = 0; v < kTileVectors; ++v) total[t][v] = vzero();
  for (int64_t g = 0; g < groups; ++g) {
    constexpr int64_t kSteps = kGroup / 4;
    vi sum[TK][kTileVectors];
    clear(sum);
    tile<TK, Int4Panel::kFlush>(panel + g * kSteps * 64, step, min64(kSteps, steps - g * kSteps), x + g * kGroup,
                                a.x_stride, sum);
    for (int t = 0; t < TK; ++t) {
      const int part = a.x_sums[(token + t) * (groups + 1) + g];
      for (int v = 0; v < kTileVectors; ++v)
        total[t][v] = vadd(total[t][v], vmul(vload(scale[v] + g * W), to_float(Int4Panel::correct(sum[t][v], part))));
    }
  }
  for (int t = 0; t < TK; ++t)
    for (int v = 0; v < kTileVectors && v * W < n; ++v)
      finish.put(row + v * W, min64(W, n - v * W), token + t, vmul(total[t][v], vset(a.x_scale[token + t])));
}

// Calls use.template tokens<TK>(t) for tiles that cover all tokens.
template <class Use>
inline void for_tokens(int64_t tokens, const Use& use) {
  int64_t t = 0;
#if defined(__AVX512F__)
  for (; t + 8 <= tokens; t += 8) use.template tokens<8>(t);
#endif
  for (; t + 4 <= tokens; t += 4) use.template tokens<4>(t);
  for (; t + 2 <= tokens; t += 2) use.template tokens<2>(t);
  for (; t < tokens; ++t) use.template tokens<1>(t);
}

template <class P>
struct WholeTiles {
  const QuantArgs& a;
  const uint8_t* panel;
  int64_t row, n;
  const vf* scale;
  template <int TK>
  void tokens(int64_t t) const { whole_tile<P, TK>(a, panel, row, n, scale, t); }
};

struct GroupTiles {
  const QuantArgs& a;
  const uint8_t* panel;
  int64_t row, n;
  const float* const* scale;
  template <int TK>
  void tokens(int64_t t) const { group_tile<TK>(a, panel, row, n, scale, t); }
};

// Panels of kTileRows rows at a time (rounded up to whole blocks) in a.scratch.
template <class P>
inline void expand_tile(const QuantArgs& a, int64_t row, int64_t n) {
  for (int64_t b = 0; b < kTileRows; b += kBlock)
    expand_block<P>(a, row + min64(b, (n - 1) / kBlock * kBlock), min64(kBlock, n - min64(b, (n - 1) / kBlock * kBlock)),
                    a.scratch + b / kBlock * panel_bytes(a.cols));
}

template <class P>
void many_whole(const QuantArgs& a) {
  for (int64_t row = a.row_begin; row < a.row_end; row += kTileRows) {
    const int64_t n = min64(kTileRows, a.row_end - row);
    expand_tile<P>(a, row, n);
    vf scale[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      scale[v] = v * W < n ? load_half_n(a.scale + 2 * (row + v * W), n - v * W) : vzero();
    for_tokens(a.tokens, WholeTiles<P>{a, a.scratch, row, n, scale});
  }
}

inline void many_int4(const QuantArgs& a) {
  const int64_t floats = groups_of(a.cols) * W;
  float* scales = (float*)(a.scratch + kTileRows / kBlock * panel_bytes(a.cols));
  const float* scale[kTileVectors] = {scales, scales + floats};
  for (int64_t row = a.row_begin; row < a.row_end; row += kTileRows) {
    const int64_t n = min64(kTileRows, a.row_end - row);
    expand_tile<Int4Panel>(a, row, n);
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t first = min64(v * W, n - 1);
      group_scales(a, row + first, min64(W, n - first), scales + v * floats);
    }
    for_tokens(a.tokens, GroupTiles{a, a.scratch, row, n, scale});
  }
}

inline int64_t many_scratch_bytes(int64_t cols) {
  return 2 * kQuantBlock / kBlock * panel_bytes(cols) + groups_of(cols) * kTileRows * 4;
}

}  // namespace
}  // namespace slimba
