// The kernels with int8 activations for 64-bit ARM with the dot product instructions (ARMv8.2).
//
// Signed bytes times signed bytes, four products summed into each of four lanes: weights need no offset. For few tokens a
// lane holds columns of one row; for many, rows are expanded to panels [cols / 4][4 rows][4] first and a lane is a row.
// Compiled for aarch64 alone, where every machine has NEON; dispatch.cpp asks for the dot product.
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "../numeric.h"

namespace slimba {
namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint8_t;

constexpr int64_t kGroup = 128;
constexpr int64_t kRows = 4;        // of a panel
constexpr int64_t kTileTokens = 8;  // of a tile

int64_t groups_of(int64_t cols) { return (cols + kGroup - 1) / kGroup; }
int64_t padded(int64_t cols) { return (cols + 63) / 64 * 64; }
int64_t no_bytes(int64_t) { return 0; }
void no_prepare(const int8_t*, int64_t, uint8_t*) {}

void put(const QuantArgs& a, int64_t r, int64_t t, float value) {
  float& y = a.y[t * a.y_stride + r];
  y = a.add ? y + value : value;
}

void quantize(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sums) {
  float32x4_t most = vdupq_n_f32(0);
  float top = 0, poison = 0;  // x - x is NaN for NaN and infinity, else 0
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float32x4_t v = vld1q_f32(x + i), zero = vsubq_f32(v, v);
    most = vmaxq_f32(most, vabsq_f32(v));
    poison += vaddvq_f32(zero);
  }
  top = vmaxvq_f32(most);
  for (; i < n; ++i) {
    top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    poison += x[i] - x[i];
  }
  const bool damaged = poison != poison, zero = damaged || top < 1e-30f;
  *scale = damaged ? NAN : zero ? 0.0f : top / 127.0f;
  const float inverse = zero ? 0.0f : 127.0f / top;
  const int64_t groups = groups_of(n);
  for (i = 0; i < padded(n); ++i) q[i] = i < n && !zero ? int8_t(vcvtns_s32_f32(x[i] * inverse)) : int8_t(0);
  sums[groups] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int32x4_t sum = vdupq_n_s32(0);
    for (i = g * kGroup; i < (g + 1) * kGroup && i < padded(n); i += 16)
      sum = vdotq_s32(sum, vld1q_s8(q + i), vdupq_n_s8(1));
    sums[g] = vaddvq_s32(sum);
    sums[groups] += sums[g];
  }
}

// The first n (at most 16) bytes at p, zeros behind
uint8x16_t load_n(const uint8_t* p, int64_t n) {
  if (n >= 16) return vld1q_u8(p);
  uint8_t bytes[16] = {};
  if (n > 0) std::memcpy(bytes, p, std::size_t(n));
  return vld1q_u8(bytes);
}

struct SignRow {
  static int64_t row_bytes(int64_t cols) { return (cols + 63) / 64 * 8; }
  static int32_t dot(const uint8_t* row, const int8_t* x, int64_t cols, int32_t total) {
    const uint8_t pattern[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8_t spread[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint8x16_t bits = vld1q_u8(pattern), index = vld1q_u8(spread);
    int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    for (int64_t b = 0; b < row_bytes(cols); b += 8) {
      const uint8x16_t word = vcombine_u8(vld1_u8(row + b), vdup_n_u8(0));
      for (int i = 0; i < 4; ++i) {  // two bytes, 16 columns: the activations that they choose
        const uint8x16_t chosen = vtstq_u8(vqtbl1q_u8(word, vaddq_u8(index, vdupq_n_u8(uint8_t(2 * i)))), bits);
        const int8x16_t v = vandq_s8(vreinterpretq_s8_u8(chosen), vld1q_s8(x + 8 * b + 16 * i));
        sum[i] = vdotq_s32(sum[i], v, vdupq_n_s8(1));
      }
    }
    return 2 * vaddvq_s32(vaddq_s32(vaddq_s32(sum[0], sum[1]), vaddq_s32(sum[2], sum[3]))) - total;
  }
  static int code(const uint8_t* row, int64_t c) { return (row[c / 8] >> (c & 7) & 1) * 2 - 1; }
};

struct Int8Row {
  static int64_t row_bytes(int64_t cols) { return cols; }
  static int32_t dot(const uint8_t* row, const int8_t* x, int64_t cols, int32_t) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t c = 0; c < cols; c += 16)
      sum = vdotq_s32(sum, vreinterpretq_s8_u8(load_n(row + c, cols - c)), vld1q_s8(x + c));
    return vaddvq_s32(sum);
  }
  static int code(const uint8_t* row, int64_t c) { return int8_t(row[c]); }
};

struct Int4Row {
  static int64_t row_bytes(int64_t cols) { return (cols + 1) / 2; }
  // Group g of a row; x holds its 64 even, then its 64 odd columns
  static int32_t dot(const uint8_t* row, const int8_t* x, int64_t left) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t b = 0; b < 64; b += 16) {
      const uint8x16_t v = load_n(row + b, left - b);
      const int8x16_t low = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15))), vdupq_n_s8(8));
      const int8x16_t high = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(v, 4)), vdupq_n_s8(8));
      sum = vdotq_s32(sum, low, vld1q_s8(x + b));
      sum = vdotq_s32(sum, high, vld1q_s8(x + 64 + b));
    }
    return vaddvq_s32(sum);
  }
  static int code(const uint8_t* row, int64_t c) { return (row[c / 2] >> (c & 1) * 4 & 15) - 8; }
};

template <class Row>
void few(const QuantArgs& a) {
  const int64_t sums = groups_of(a.cols) + 1;
  for (int64_t r = a.row_begin; r < a.row_end; ++r) {
    const uint8_t* row = a.data + r * Row::row_bytes(a.cols);
    const float scale = load_half(a.scale + 2 * r);
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int32_t n = Row::dot(row, a.x + t * a.x_stride, a.cols, a.x_sums[t * sums + sums - 1]);
      put(a, r, t, float(n) * (scale * a.x_scale[t]));
    }
  }
}

int64_t int4_prepared_bytes(int64_t cols) { return groups_of(cols) * kGroup; }
void int4_prepare(const int8_t* x, int64_t cols, uint8_t* out) {
  for (int64_t c = 0; c < groups_of(cols) * kGroup; ++c)
    out[c / kGroup * kGroup + c % kGroup / 2 + c % 2 * 64] = c < padded(cols) ? uint8_t(x[c]) : 0;
}

void int4_few(const QuantArgs& a) {
  const int64_t groups = groups_of(a.cols), row_bytes = Int4Row::row_bytes(a.cols);
  for (int64_t r = a.row_begin; r < a.row_end; ++r) {
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int8_t* x = reinterpret_cast<const int8_t*>(a.prepared) + t * groups * kGroup;
      float total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int32_t n = Int4Row::dot(a.data + r * row_bytes + g * 64, x + g * kGroup, row_bytes - g * 64);
        total += load_half(a.scale + 2 * (r * groups + g)) * float(n);
      }
      put(a, r, t, total * a.x_scale[t]);
    }
  }
}

// kRows rows (n of them real, the last one repeated) -> [cols padded / 4][kRows][4]
template <class Row>
void expand(const QuantArgs& a, int64_t row, int64_t n, int8_t* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    const uint8_t* p = a.data + (row + (i < n ? i : n - 1)) * Row::row_bytes(a.cols);
    for (int64_t c = 0; c < padded(a.cols); ++c)
      out[c / 4 * 16 + i * 4 + c % 4] = c < a.cols ? int8_t(Row::code(p, c)) : int8_t(0);
  }
}

// sum[t] += products of the columns begin .. end (multiples of 16) of a panel and TK tokens at x
template <int TK>
void tile(const int8_t* panel, int64_t begin, int64_t end, const int8_t* x, int64_t stride, int32x4_t (&sum)[TK]) {
  for (int64_t c = begin; c < end; c += 16) {
    int8x16_t w[4];
    for (int i = 0; i < 4; ++i) w[i] = vld1q_s8(panel + (c / 4 + i) * 16);
    for (int t = 0; t < TK; ++t) {
      const int8x16_t v = vld1q_s8(x + t * stride + c);
      sum[t] = vdotq_laneq_s32(sum[t], w[0], v, 0);
      sum[t] = vdotq_laneq_s32(sum[t], w[1], v, 1);
      sum[t] = vdotq_laneq_s32(sum[t], w[2], v, 2);
      sum[t] = vdotq_laneq_s32(sum[t], w[3], v, 3);
    }
  }
}

// y of the kRows rows of a panel and TK tokens from `token` on; a group of columns, if Grouped, meets its own scale.
template <int TK, bool Grouped>
void panel_tokens(const QuantArgs& a, const int8_t* panel, int64_t row, int64_t n, int64_t token) {
  const int64_t groups = groups_of(a.cols), end = padded(a.cols);
  const int8_t* x = a.x + token * a.x_stride;
  float total[TK][kRows] = {};
  for (int64_t first = 0; first < end; first += Grouped ? kGroup : end) {
    int32x4_t sum[TK];
    for (int t = 0; t < TK; ++t) sum[t] = vdupq_n_s32(0);
    tile<TK>(panel, first, Grouped && first + kGroup < end ? first + kGroup : end, x, a.x_stride, sum);
    for (int t = 0; t < TK; ++t) {
      int32_t whole[kRows];
      vst1q_s32(whole, sum[t]);
      for (int64_t i = 0; i < n; ++i) {
        const float scale = load_half(a.scale + 2 * (Grouped ? (row + i) * groups + first / kGroup : row + i));
        if (Grouped) total[t][i] += scale * float(whole[i]);
        else total[t][i] = float(whole[i]) * (scale * a.x_scale[token + t]);
      }
    }
  }
  for (int t = 0; t < TK; ++t)
    for (int64_t i = 0; i < n; ++i) put(a, row + i, token + t, Grouped ? total[t][i] * a.x_scale[token + t] : total[t][i]);
}

template <class Row, bool Grouped>
void many(const QuantArgs& a) {
  int8_t* panel = reinterpret_cast<int8_t*>(a.scratch);
  for (int64_t row = a.row_begin; row < a.row_end; row += kRows) {
    const int64_t n = row + kRows <= a.row_end ? kRows : a.row_end - row;
    expand<Row>(a, row, n, panel);
    int64_t t = 0;
    for (; t + kTileTokens <= a.tokens; t += kTileTokens) panel_tokens<kTileTokens, Grouped>(a, panel, row, n, t);
    for (; t < a.tokens; ++t) panel_tokens<1, Grouped>(a, panel, row, n, t);
  }
}

int64_t panel_bytes(int64_t cols) { return padded(cols) * kRows; }

constexpr QuantInput kNothing = {no_bytes, no_prepare};
const QuantFormat kSignRows = {kNothing, kNothing, panel_bytes, few<SignRow>, many<SignRow, false>, 4, 64};
const QuantFormat kInt8Rows = {kNothing, kNothing, panel_bytes, few<Int8Row>, many<Int8Row, false>, 4, 64};
const QuantFormat kInt4Rows = {{int4_prepared_bytes, int4_prepare}, kNothing, panel_bytes, int4_few, many<Int4Row, true>, 4, 64};

}  // namespace

void neon_quant(Kernels& k) {
  k.quantize = quantize;
  k.quant[kSign] = &kSignRows;
  k.quant[kInt8] = &kInt8Rows;
  k.quant[kInt4] = &kInt4Rows;
}

}  // namespace slimba
