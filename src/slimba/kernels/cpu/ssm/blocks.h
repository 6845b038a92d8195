// The Mamba-2 recurrence with a buffer of tokens (Ssm2Args in kernels.h), for AVX2 and AVX-512.
//
// For each W channels of a head: products of their state rows with every C of the call, W rows summed up by one reduction;
// then what the buffer adds; then, after the last token of a block, the rows are moved on by 16 tokens at once. One token
// and sixteen do the same arithmetic, so where a text is cut does not show. An int8 state meets C as 16-bit numbers (one
// scale a token, error 2^-16 of the largest), whose sums are whole.
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

// ---- pieces of a state row and their products with C

struct FloatPiece {
  static constexpr int64_t kEntries = W, kBytes = 4 * W, kCBytes = 4;
  using Sum = vf;
  vf s;
  void load(const uint8_t* p) { s = vload((const float*)p); }
  vf add(vf sum, const uint8_t* c) const { return vfma(s, vload((const float*)c), sum); }
  static vf zero() { return vzero(); }
  static vf floats(vf sum) { return sum; }
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
  vf add(vf sum, const uint8_t* c) const {
    return vfma(odd, vload((const float*)c + W), vfma(even, vload((const float*)c), sum));
  }
  static vf zero() { return vzero(); }
  static vf floats(vf sum) { return sum; }
};

// 16-bit products, added in pairs
struct Int8Piece {
  static constexpr int64_t kEntries = 2 * W, kBytes = 2 * W, kCBytes = 2;
  using Sum = vi;
  vi s;
#if defined(__AVX512F__)
  void load(const uint8_t* p) { s = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  vi add(vi sum, const uint8_t* c) const {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(s, _mm512_loadu_si512(c)));
  }
  static vi zero() { return _mm512_setzero_si512(); }
  static vf floats(vi sum) { return _mm512_cvtepi32_ps(sum); }
#else
  void load(const uint8_t* p) { s = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  vi add(vi sum, const uint8_t* c) const {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(s, _mm256_loadu_si256((const __m256i*)c)));
  }
  static vi zero() { return _mm256_setzero_si256(); }
  static vf floats(vi sum) { return _mm256_cvtepi32_ps(sum); }
#endif
};
constexpr int64_t kMostWhole = 4096;  // entries of a row whose 16-bit products surely fit a sum

// ---- what the heads of a call share

struct Shared {
  const Ssm2Args& a;
  int64_t padded;         // N in whole vectors
  int64_t row_bytes;      // of the state
  bool whole;             // rows are read as they are stored, else opened into floats first
  float *b, *c, *opened;  // [16, N'], [16, N'] (int8: int16 codes), two rows; N' = round_up(N, 32)
  int64_t stride;         // N'
  float c_scale[kBlockTokens];
  alignas(64) float scores[kBlockTokens][kBlockTokens];  // <b_i, C_t>, 0 for later tokens

  explicit Shared(const Ssm2Args& args) : a(args) {
    padded = round_up(a.d_state, W), stride = round_up(a.d_state, 32);
    row_bytes = a.d_state * (a.type == kStateFloat32 ? 4 : a.type == kStateBfloat16 ? 2 : 1);
    whole = a.d_state % (2 * W) == 0 && a.d_state <= kMostWhole;
    b = a.work, c = b + kBlockTokens * stride, opened = c + kBlockTokens * stride;
    for (int64_t i = 0; i < a.filled + a.tokens; ++i) {
      const float* fresh = a.b + (i - a.filled) * a.xbc_stride;
      const uint8_t* old = a.held_b + i * a.d_state * (a.type == kStateFloat32 ? 4 : 2);
      for (int64_t n = 0; n < padded; n += W)
        vstore(b + i * stride + n, i < a.filled ? load_held(a.type, old, n, a.d_state - n)
                                                : round_held(a.type, vload_n(fresh + n, a.d_state - n)));
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      score(t);
      place(t, a.c + t * a.xbc_stride);
    }
  }

  void score(int64_t t) {
    const float* row = a.c + t * a.xbc_stride;
    for (int64_t first = 0; first < kBlockTokens; first += W) {
      vf sums[W];
      for (int64_t k = 0; k < W; ++k) {
        sums[k] = vzero();
        if (first + k > a.filled + t) continue;
        for (int64_t n = 0; n < padded; n += W)
          sums[k] = vfma(vload(b + (first + k) * stride + n), vload_n(row + n, a.d_state - n), sums[k]);
      }
      vstore(scores[t] + first, reduce_rows(sums));
    }
  }

  // C of token t in the order and type that the state's pieces want
  void place(int64_t t, const float* row) {
    float* out = c + t * stride;
    if (!whole || a.type == kStateFloat32) {
      for (int64_t n = 0; n < padded; n += W) vstore(out + n, vload_n(row + n, a.d_state - n));
    } else if (a.type == kStateBfloat16) {
      for (int64_t n = 0; n < a.d_state; n += 2 * W)
        for (int64_t k = 0; k < W; ++k) out[n + k] = row[n + 2 * k], out[n + W + k] = row[n + 2 * k + 1];
    } else {
      vf top = vzero();
      for (int64_t n = 0; n < a.d_state; n += W) top = vmax(vabs(vload(row + n)), top);
      const float most = max_lane(top);
      const vf inverse = vset(most < 1e-30f ? 0.0f : 32767.0f / most);
      for (int64_t n = 0; n < a.d_state; n += W) {
        alignas(64) float codes[W];
        vstore(codes, vround(vmul(vload(row + n), inverse)));
        for (int64_t k = 0; k < W; ++k) ((int16_t*)out)[n + k] = int16_t(codes[k]);
      }
      c_scale[t] = most == most ? (most < 1e-30f ? 0.0f : most / 32767.0f) : __builtin_nanf("");
    }
  }
};

// ---- a head

// Products of RB rows, NP pieces from `at` on, with all C: added to sums[t][r], W lanes not yet summed up.
template <class Piece, int RB, int NP>
inline void dots(const uint8_t* rows, int64_t row_bytes, const uint8_t* c, int64_t c_bytes, int64_t tokens, bool first,
                 float* sums) {
  using Sum = typename Piece::Sum;
  constexpr int64_t kC = Piece::kEntries * Piece::kCBytes;
  Piece s[RB][NP];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NP; ++v) s[r][v].load(rows + r * row_bytes + v * Piece::kBytes);
  for (int64_t t = 0; t < tokens; ++t) {
    Sum sum[RB];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) sum[r] = first ? Piece::zero() : *(const Sum*)(sums + (t * W + r) * W);
#pragma GCC unroll 8
    for (int v = 0; v < NP; ++v)
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) sum[r] = s[r][v].add(sum[r], c + t * c_bytes + v * kC);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) *(Sum*)(sums + (t * W + r) * W) = sum[r];
  }
}

// The same over the whole rows: `pieces` of them.
template <class Piece, int RB>
inline void row_dots(const uint8_t* rows, int64_t row_bytes, const float* c, int64_t c_stride, int64_t pieces,
                     int64_t tokens, float* sums) {
  constexpr int NP = (W == 16 ? 8 : 4) * W / Piece::kEntries;
  constexpr int64_t kC = Piece::kEntries * Piece::kCBytes;
  const uint8_t* at = (const uint8_t*)c;
  int64_t i = 0;
  for (; i + NP <= pieces; i += NP)
    dots<Piece, RB, NP>(rows + i * Piece::kBytes, row_bytes, at + i * kC, c_stride * 4, tokens, i == 0, sums);
  for (; i < pieces; ++i)
    dots<Piece, RB, 1>(rows + i * Piece::kBytes, row_bytes, at + i * kC, c_stride * 4, tokens, i == 0, sums);
}

// In decode a state comes from memory: what lies kFetch bytes on is fetched meanwhile.
constexpr int64_t kFetch = 4096;

struct Head {
  const Shared& shared;
  const Ssm2Args& a;
  int64_t h;
  const uint8_t* u;
  int64_t u_bytes;                                       // of a row [P]
  float from_start[kBlockTokens];                        // exp(L_j) of the call's tokens
  alignas(64) float weight[kBlockTokens][kBlockTokens];  // of u_i in y_t
  alignas(64) float gain[kBlockTokens];                  // of u_i in the state after the block
  alignas(64) float sums[kBlockTokens * W * W];

  Head(const Shared& s, int64_t head) : shared(s), a(s.a), h(head) {
    u_bytes = a.headdim * (a.type == kStateFloat32 ? 4 : 2);
    uint8_t* rows = a.held_u + h * kBlockTokens * u_bytes;
    u = rows;
    float* logs = a.logs + h * kBlockTokens;
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t j = a.filled + t;
      const float dt = a.dt[t * a.dt_stride + h];
      logs[j] = (j ? logs[j - 1] : 0.0f) + dt * a.a[h];
      const float* x = a.x + t * a.xbc_stride + h * a.headdim;
      for (int64_t p = 0; p < a.headdim; p += W) {
        const int64_t n = a.headdim - p;
        const vf v = vmul(vset(dt), vload_n(x + p, n));
        if (a.type == kStateFloat32) vstore_n((float*)(rows + j * u_bytes) + p, v, n);
        else store_bfloat_n(rows + j * u_bytes + 2 * p, round_bfloat_safely(v), n);
      }
    }
    const vf low = vset(-1e30f);
    for (int64_t i = 0; i < kBlockTokens; i += W) {
      for (int64_t t = 0; t < a.tokens; ++t) {
        const vf back = vsub(vset(logs[a.filled + t]), vload(logs + i));  // of later tokens: anything, the score is 0
        vstore(weight[t] + i, vmul(vexp(vmax(vmin(back, vzero()), low)), vload(shared.scores[t] + i)));
      }
      vstore(gain + i, vexp(vmin(vsub(vset(logs[kBlockTokens - 1]), vload(logs + i)), vzero())));
    }
    alignas(64) float all[kBlockTokens];
    for (int64_t i = 0; i < kBlockTokens; i += W) vstore(all + i, vexp(vmin(vload(logs + i), vzero())));
    for (int64_t t = 0; t < a.tokens; ++t) from_start[t] = all[a.filled + t];
    last = all[kBlockTokens - 1];
  }
  float last;  // exp(L_16)

  uint8_t* state(int64_t p) const { return a.state + (h * a.headdim + p) * shared.row_bytes; }

  StoredRow stored(int64_t p) const { return {a.type, a.state, a.state_scale, h * a.headdim + p, a.d_state}; }

  // Row p as floats, padded with zeros
  float* open(int64_t p, float* to) const {
    if (a.type != kStateFloat32) {
      stored(p).open(to);
      return to;
    }
    float* row = (float*)state(p);
    if (a.d_state % W == 0) return row;
    for (int64_t n = 0; n < a.d_state; n += W) vstore(to + n, vload_n(row + n, a.d_state - n));
    return to;
  }

  template <class Piece>
  void products(int64_t p, int64_t n) {
    const int64_t pieces = a.d_state / Piece::kEntries, bytes = shared.row_bytes;
    const auto fetch = [&](int64_t row, int64_t count) {
      if (a.tokens > 4) return;  // the state comes from the cache
      for (int64_t i = 0; i < count * bytes; i += 64) _mm_prefetch((const char*)state(row) + kFetch + i, _MM_HINT_T0);
    };
    int64_t r = 0;
    for (; r + 2 <= n; r += 2) {
      fetch(p + r, 2);
      row_dots<Piece, 2>(state(p + r), bytes, shared.c, shared.stride, pieces, a.tokens, sums + r * W);
    }
    for (; r < n; ++r) row_dots<Piece, 1>(state(p + r), bytes, shared.c, shared.stride, pieces, a.tokens, sums + r * W);
  }

  // y of the rows p .. p + n from the products and what the buffer adds
  template <class Piece>
  void old_state(int64_t p, int64_t n, const vf* more) {
    const vf d = a.d_per_channel ? vload_n(a.d + h * a.headdim + p, n) : vset(a.d[h]);
    vf scale = vset(1.0f);
    constexpr bool codes = Piece::kCBytes == 2;
    if (codes) scale = vload_n(a.state_scale + h * a.headdim + p, n);
    for (int64_t t = 0; t < a.tokens; ++t) {
      vf rows[W];
      for (int64_t k = 0; k < W; ++k)
        rows[k] = k < n ? Piece::floats(*(const typename Piece::Sum*)(sums + (t * W + k) * W)) : vzero();
      vf old = reduce_rows(rows);
      if (codes) old = vmul(old, vmul(scale, vset(shared.c_scale[t])));
      const vf x = vload_n(a.x + t * a.xbc_stride + h * a.headdim + p, n);
      const vf y = vfma(d, x, vfma(vset(from_start[t]), old, more[t]));
      vstore_n(a.y + t * a.y_stride + h * a.headdim + p, y, n);
    }
  }

  // What the buffer adds to y of W channels
  void buffered(int64_t p, int64_t n, vf* more) const {
    for (int64_t t = 0; t < a.tokens; ++t) more[t] = vzero();
    for (int64_t i = 0; i < a.filled + a.tokens; ++i) {
      const vf v = load_held(a.type, u + i * u_bytes, p, n);
      for (int64_t t = i < a.filled ? 0 : i - a.filled; t < a.tokens; ++t) more[t] = vfma(vset(weight[t][i]), v, more[t]);
    }
  }

  // NV vectors of RB opened rows moved on by the block; coefficient[i][r] of b_i
  template <int RB, int NV>
  void move(float* const* rows, int64_t at, float keep, const float* coefficient, vf* top, vf* bad) const {
    vf s[RB][NV];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) s[r][v] = vmul(vset(keep), vload(rows[r] + at + v * W));
    for (int64_t i = 0; i < kBlockTokens; ++i) {
      vf k[RB];
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) k[r] = vset(coefficient[i * W + r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const vf b = vload(shared.b + i * shared.stride + at + v * W);
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) s[r][v] = vfma(k[r], b, s[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        vstore(rows[r] + at + v * W, s[r][v]);
        top[r] = vmax(top[r], vabs(s[r][v]));
        bad[r] = vfma(s[r][v], vzero(), bad[r]);
      }
  }

  template <int RB>
  void store_rows(int64_t p, const float* coefficient) const {
    float* rows[RB];
    vf top[RB], bad[RB];
    for (int r = 0; r < RB; ++r) rows[r] = open(p + r, shared.opened + r * shared.stride), top[r] = bad[r] = vzero();
    constexpr int NV = W == 16 ? 8 : 4;
    int64_t n = 0;
    for (; n + NV * W <= shared.padded; n += NV * W) move<RB, NV>(rows, n, last, coefficient, top, bad);
    for (; n < shared.padded; n += W) move<RB, 1>(rows, n, last, coefficient, top, bad);
    for (int r = 0; r < RB; ++r) {
      float* out = (float*)state(p + r);
      if (a.type != kStateFloat32) stored(p + r).round(rows[r], top[r], any_nan(bad[r]), false);
      else if (rows[r] != out)
        for (int64_t i = 0; i < a.d_state; i += W) vstore_n(out + i, vload(rows[r] + i), a.d_state - i);
    }
  }

  void store(int64_t p, int64_t n) const {
    alignas(64) float coefficient[kBlockTokens * W];
    for (int64_t i = 0; i < kBlockTokens; ++i)
      vstore(coefficient + i * W, vmul(vset(gain[i]), load_held(a.type, u + i * u_bytes, p, n)));
    int64_t r = 0;
    for (; r + 2 <= n; r += 2) store_rows<2>(p + r, coefficient + r);
    for (; r < n; ++r) store_rows<1>(p + r, coefficient + r);
  }

  void channels(int64_t p, int64_t n) {
    vf more[kBlockTokens];
    buffered(p, n, more);
    if (!shared.whole || a.type == kStateFloat32) {
      if (a.type == kStateFloat32 && shared.whole) {
        products<FloatPiece>(p, n);
      } else {
        for (int64_t r = 0; r < n; ++r)
          row_dots<FloatPiece, 1>((const uint8_t*)open(p + r, shared.opened), 0, shared.c, shared.stride,
                                  shared.padded / W, a.tokens, sums + r * W);
      }
      old_state<FloatPiece>(p, n, more);
    } else if (a.type == kStateBfloat16) {
      products<BfloatPiece>(p, n);
      old_state<BfloatPiece>(p, n, more);
    } else {
      products<Int8Piece>(p, n);
      old_state<Int8Piece>(p, n, more);
    }
    if (a.filled + a.tokens == kBlockTokens) store(p, n);
  }
};

void ssm2(const Ssm2Args& a) {
  const Shared shared(a);
  for (int64_t h = 0; h < a.heads; ++h) {
    Head head(shared, h);
    for (int64_t p = 0; p < a.headdim; p += W) head.channels(p, min64(W, a.headdim - p));
  }
}

}  // namespace
}  // namespace slimba
