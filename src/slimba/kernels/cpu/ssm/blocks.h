// The Mamba-2 recurrence with a buffer of tokens (Ssm2Args in kernels.h), for AVX2 and AVX-512.
//
// For each W channels of a head: products of their state rows with every C of the call, W rows summed up by one reduction;
// then what the buffer adds; then, after the last token of a block, the rows are moved on by 16 tokens at once. One token
// and sixteen do the same arithmetic, so where a text is cut does not show. An int8 state meets C as 16-bit numbers (one
// scale a token, error 2^-16 of the largest), whose sums are whole.
#pragma once

#include "pieces.h"

namespace slimba {
namespace {

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
      for (int64_t n = 0; n < a.d_state; n += 2 * W) store_apart(out + n, vload(row + n), vload(row + n + W));
    } else {
      vf top = vzero();
      for (int64_t n = 0; n < a.d_state; n += W) top = vmax(vabs(vload(row + n)), top);
      const float most = max_lane(top);
      const vf inverse = vset(most < 1e-30f ? 0.0f : 32767.0f / most);
      for (int64_t n = 0; n < a.d_state; n += W) store_words((int16_t*)out + n, vmul(vload(row + n), inverse));
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
    for (int v = 0; v < NP; ++v) {
      const auto other = Piece::other(c + t * c_bytes + v * kC);
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) sum[r] = s[r][v].add(sum[r], other);
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) *(Sum*)(sums + (t * W + r) * W) = sum[r];
  }
}

// The same over the whole rows: `pieces` of them.
template <class Piece, int RB>
inline void row_dots(const uint8_t* rows, int64_t row_bytes, const float* c, int64_t c_stride, int64_t pieces,
                     int64_t tokens, float* sums) {
  constexpr int NP = (W == 16 && RB < 4 ? 8 : 4) * W / Piece::kEntries;
  constexpr int64_t kC = Piece::kEntries * Piece::kCBytes;
  const uint8_t* at = (const uint8_t*)c;
  int64_t i = 0;
  for (; i + NP <= pieces; i += NP)
    dots<Piece, RB, NP>(rows + i * Piece::kBytes, row_bytes, at + i * kC, c_stride * 4, tokens, i == 0, sums);
  for (; i < pieces; ++i)
    dots<Piece, RB, 1>(rows + i * Piece::kBytes, row_bytes, at + i * kC, c_stride * 4, tokens, i == 0, sums);
}

// In decode a state comes from memory: what lies further on is fetched meanwhile, in two steps unless it is read `once`.
constexpr int64_t kStateAhead = 8192, kStateFar = 16384, kStateNear = 4096;  // bytes

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
      const uint8_t* from = state(row);
      for (int64_t i = 0; i < count * bytes; i += 64) {
        if (a.once) fetch_line(from + kStateAhead + i, true);
        else fetch_second(from + kStateFar + i), fetch_line(from + kStateNear + i);
      }
    };
    int64_t r = 0;
    // Four rows where C is what is read most; floats from memory come faster two rows at a time
    for (; W == 16 && (a.tokens > 4 || Piece::kCBytes == 2) && r + 4 <= n; r += 4) {
      fetch(p + r, 4);
      row_dots<Piece, 4>(state(p + r), bytes, shared.c, shared.stride, pieces, a.tokens, sums + r * W);
    }
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
      typename Piece::Sum rows[W];
      for (int64_t k = 0; k < W; ++k) rows[k] = k < n ? *(const typename Piece::Sum*)(sums + (t * W + k) * W) : Piece::zero();
      vf old = Piece::reduce(rows, a.d_state);
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

  // NV vectors of RB rows from entry `at` on, moved on by the block; coefficient[i][r] of b_i. A bfloat16 row is read and
  // written where it lies, and so are whole int8 rows (kWhole); others come from and go to `rows`, int8 ones with their
  // largest magnitudes' bits in `top`.
  template <StateType kType, int RB, int NV, bool kWhole = false>
  void move(int64_t p, float* const* rows, int64_t at, const float* coefficient, vi* top) const {
    vf s[RB][NV];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t i = at + v * W;
        const vf old = kWhole                      ? vmul(load_int8(state(p + r) + i), vset(a.state_scale[h * a.headdim + p + r]))
                       : kType == kStateBfloat16 ? load_bfloat_n(state(p + r) + 2 * i, a.d_state - i)
                                                 : vload(rows[r] + i);
        s[r][v] = vmul(vset(last), old);
      }
    for (int64_t i = 0; i < kBlockTokens; ++i) {
      vf k[RB];
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) k[r] = vset(coefficient[i * W + r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const vf b = kept(vload(shared.b + i * shared.stride + at + v * W));
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) s[r][v] = vfma(k[r], b, s[r][v]);
      }
    }
    if constexpr (kWhole) {
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) {
        vi most = magnitude_bits(s[r][0]);
#pragma GCC unroll 8
        for (int v = 1; v < NV; ++v) most = max_bits(most, magnitude_bits(s[r][v]));
        const auto [step, inverse] = int8_scale(as_floats(most), any_damaged(most));
        a.state_scale[h * a.headdim + p + r] = step;
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store_int8_n(state(p + r) + v * W, vround(vmul(s[r][v], vset(inverse))), W);
      }
      return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t i = at + v * W;
        if (kType == kStateBfloat16) {
          store_bfloat_n(state(p + r) + 2 * i, round_bfloat_safely(s[r][v]), a.d_state - i);
        } else {
          vstore(rows[r] + i, s[r][v]);
          if (kType == kStateInt8) top[r] = max_bits(top[r], magnitude_bits(s[r][v]));
        }
      }
  }

  template <StateType kType, int RB>
  void store_rows(int64_t p, const float* coefficient) const {
    if constexpr (kType == kStateInt8 && W == 16) {  // N of most models: rows that fit the registers
      if (a.d_state == 8 * W) return move<kType, RB, 8, true>(p, nullptr, 0, coefficient, nullptr);
    }
    float* rows[RB];
    vi top[RB];
    for (int r = 0; r < RB; ++r) {
      rows[r] = kType == kStateBfloat16 ? nullptr : open(p + r, shared.opened + r * shared.stride);
      top[r] = magnitude_bits(vzero());
    }
    constexpr int NV = W == 16 ? 8 : RB == 4 ? 2 : 4;
    int64_t n = 0;
    for (; n + NV * W <= shared.padded; n += NV * W) move<kType, RB, NV>(p, rows, n, coefficient, top);
    for (; n < shared.padded; n += W) move<kType, RB, 1>(p, rows, n, coefficient, top);
    for (int r = 0; r < RB && kType != kStateBfloat16; ++r) {
      float* out = (float*)state(p + r);
      if (kType == kStateInt8) stored(p + r).round(rows[r], as_floats(top[r]), any_damaged(top[r]), false);
      else if (rows[r] != out)
        for (int64_t i = 0; i < a.d_state; i += W) vstore_n(out + i, vload(rows[r] + i), a.d_state - i);
    }
  }

  template <StateType kType>
  void store_pairs(int64_t p, int64_t n, const float* coefficient) const {
    int64_t r = 0;
    if constexpr (W == 8 && kType == kStateBfloat16)  // fewer loads; other rows are opened, two at a time
      for (; r + 4 <= n; r += 4) store_rows<kType, 4>(p + r, coefficient + r);
    for (; r + 2 <= n; r += 2) store_rows<kType, 2>(p + r, coefficient + r);
    for (; r < n; ++r) store_rows<kType, 1>(p + r, coefficient + r);
  }

  void store(int64_t p, int64_t n) const {
    alignas(64) float coefficient[kBlockTokens * W];
    for (int64_t i = 0; i < kBlockTokens; ++i)
      vstore(coefficient + i * W, vmul(vset(gain[i]), load_held(a.type, u + i * u_bytes, p, n)));
    if (a.type == kStateFloat32) store_pairs<kStateFloat32>(p, n, coefficient);
    else if (a.type == kStateBfloat16) store_pairs<kStateBfloat16>(p, n, coefficient);
    else store_pairs<kStateInt8>(p, n, coefficient);
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

inline void fetch_buffer(const Ssm2Args& a, int64_t h) {
  const int64_t row = a.headdim * (a.type == kStateFloat32 ? 4 : 2);
  const char* u = (const char*)a.held_u + h * kBlockTokens * row;
  for (int64_t i = 0; i < row * (a.filled + a.tokens); i += 64) fetch_line(u + i);
  fetch_line(a.logs + h * kBlockTokens);
}

inline void fetch_rows(const float* p, int64_t stride, int64_t rows, int64_t n) {
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; i += 16) fetch_line(p + t * stride + i);
}

// x of a head to come; after the last one, what the first head wants for the next tokens
inline void fetch_inputs(const Ssm2Args& a, int64_t h) {
  if (h < a.heads) return fetch_rows(a.x + h * a.headdim, a.xbc_stride, a.tokens, a.headdim);
  const int64_t next = a.tokens * a.xbc_stride;
  fetch_rows(a.x + next, a.xbc_stride, a.tokens, a.headdim);
  fetch_rows(a.b + next, a.xbc_stride, a.tokens, a.d_state);
  fetch_rows(a.c + next, a.xbc_stride, a.tokens, a.d_state);
}

void ssm2(const Ssm2Args& a) {
  const Shared shared(a);
  for (int64_t h = 0; h < a.heads; ++h) {
    if (a.tokens <= 4) fetch_buffer(a, h + 1);
    else fetch_inputs(a, h + 1);
    Head head(shared, h);
    for (int64_t p = 0; p < a.headdim; p += W) head.channels(p, min64(W, a.headdim - p));
  }
}

}  // namespace
}  // namespace slimba
