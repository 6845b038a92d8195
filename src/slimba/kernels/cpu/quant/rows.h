// Few tokens: rows are read as they are stored, once, for AVX2, AVX-VNNI and AVX-512 VNNI.
//
// With AVX-512, 512 signs are one vector, of which a mask leaves bit k of every byte: 0 or 2^k times the activations of 64
// columns, which lie in that order, is one instruction. With AVX2, 32 rows are transposed and their nibbles look up sums of
// four activations (lookup.h).
#pragma once

#include "panel.h"

namespace slimba {
namespace {

constexpr int64_t kAhead = 16384;  // bytes between what is read and what is fetched into the cache `once`
constexpr int64_t kFar = 32768, kNear = 4096;  // else: into the second-level cache, then into the first

// Of rows at p, what will be read later. In two steps, since few lines at a time can be on the way to the first-level cache.
inline void fetch_later(const uint8_t* p, bool once) {
  if (once) return fetch_line(p + kAhead, true);
  fetch_second(p + kFar);
  fetch_line(p + kNear);
}

#if defined(__AVX512F__)
constexpr int64_t kSignColumns = 512;  // whose bits fill a vector

inline int64_t sign_prepared_bytes(int64_t cols) { return round_up(cols, kSignColumns); }

// 512 activations so that vector k of eight holds the columns 8 j + k, j = 0 .. 63: those whose bits are bit k of the bytes.
inline void place_signs(const int8_t* x, uint8_t* out) {
  const vi pairs = irepeat(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  vi v[8], a[8], b[8];
  for (int i = 0; i < 8; ++i) {  // lane l: columns 128 l + 16 i and on, as eight pairs of (column k, column k + 8)
    v[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(x + 16 * i)));
    v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i*)(x + 16 * i + 128)), 1);
    v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i*)(x + 16 * i + 256)), 2);
    v[i] = ishuffle(_mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i*)(x + 16 * i + 384)), 3), pairs);
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]);      // k = 0 .. 3 of two vectors
    a[2 * i + 1] = _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]);  // k = 4 .. 7
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      b[4 * half + 2 * i] = _mm512_unpacklo_epi32(a[4 * i + half], a[4 * i + 2 + half]);
      b[4 * half + 2 * i + 1] = _mm512_unpackhi_epi32(a[4 * i + half], a[4 * i + 2 + half]);
    }
    for (int i = 0; i < 2; ++i) {
      istore(out + (4 * half + 2 * i) * 64, _mm512_unpacklo_epi64(b[4 * half + i], b[4 * half + 2 + i]));
      istore(out + (4 * half + 2 * i + 1) * 64, _mm512_unpackhi_epi64(b[4 * half + i], b[4 * half + 2 + i]));
    }
  }
}

void sign_prepare(const int8_t* x, int64_t cols, uint8_t* out) {
  const int64_t end = round_up(cols, 64);
  for (int64_t c = 0; c < end; c += kSignColumns) {
    if (c + kSignColumns <= end) {
      place_signs(x + c, out + c);
      continue;
    }
    alignas(64) int8_t tail[kSignColumns] = {};
    for (int64_t i = 0; i < end - c; i += 64) istore(tail + i, iload(x + c + i));
    place_signs(tail, out + c);
  }
}

// 64 bytes of RB rows, whose bits stay where they are: bit k stands for 2^k, and sums of different k < 4 are kept apart.
// Bits 4 .. 7 are moved down first.
template <int RB>
inline void sign_step(const vi (&w)[RB], const uint8_t* x, vi (&acc)[RB][4]) {
  vi high[RB];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r) high[r] = ishr16<4>(w[r]);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const vi mask = ibytes(1 << k), even = iload(x + k * 64), odd = iload(x + (k + 4) * 64);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) acc[r][k] = dot4(acc[r][k], iand(w[r], mask), even);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) acc[r][k] = dot4(acc[r][k], iand(high[r], mask), odd);
  }
}

// 64 bits at any address as a mask; as assembly, because GCC takes what memcpy loads through a general register
inline __mmask64 load_mask(const uint8_t* p) {
  struct __attribute__((packed)) Word {
    uint64_t bits;
  };
#if defined(SLIMBA_SIMDE)
  return ((const Word*)p)->bits;
#else
  __mmask64 mask;
  asm("kmovq %1, %0" : "=k"(mask) : "m"(((const Word*)p)->bits));
  return mask;
#endif
}
constexpr int64_t kMaskedBytes = 40;  // of a row's end, up to which masks of 64 columns take fewer instructions

// sum[i]: activations where the bit is 1, of RB rows and the token whose activations are x as prepared, and q in their own
// order. `fetch`: these rows are read for the first time, so what lies behind them is fetched.
template <int RB>
inline void sign_dots(const uint8_t* const* rows, int64_t bytes, const uint8_t* x, const int8_t* q, bool fetch,
                      bool once, vi* sum) {
  vi acc[RB][4], w[RB];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc[r][k] = izero();
  int64_t b = 0;
  for (; b + 64 <= bytes; b += 64, x += kSignColumns) {
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      if (fetch) fetch_later(rows[r] + b, once);
      w[r] = iload(rows[r] + b);
    }
    sign_step<RB>(w, x, acc);
  }
  if (b < bytes && bytes - b <= kMaskedBytes) {
    for (int r = 0; r < RB; ++r)
      if (fetch) fetch_later(rows[r] + b, once);
    for (; b < bytes; b += 8) {
      const vi own = iload(q + b * 8);
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r)
        acc[r][0] = dot4(acc[r][0], ibytes(1), _mm512_maskz_mov_epi8(load_mask(rows[r] + b), own));
    }
  } else if (b < bytes) {
    const __mmask64 some = (__mmask64(1) << (bytes - b)) - 1;
    for (int r = 0; r < RB; ++r) {
      if (fetch) fetch_later(rows[r] + b, once);
      w[r] = _mm512_maskz_loadu_epi8(some, rows[r] + b);
    }
    sign_step<RB>(w, x, acc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r) {
    sum[r] = iadd(iadd(acc[r][0], _mm512_srai_epi32(acc[r][1], 1)),
                  iadd(_mm512_srai_epi32(acc[r][2], 2), _mm512_srai_epi32(acc[r][3], 3)));
  }
}

void sign_few(const QuantArgs& a) {
  constexpr int RB = 4;
  const Finish finish = {a};
  const int64_t bytes = SignPanel::row_bytes(a.cols), stride = sign_prepared_bytes(a.cols);
  for (int64_t row = a.row_begin; row < a.row_end; row += W) {
    const int64_t n = min64(W, a.row_end - row);
    const vf scale = finish.scales(row, n);
    const uint8_t* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = a.data + (row + min64(i, n - 1)) * bytes;
    for (int64_t t = 0; t < a.tokens; ++t) {
      vi sum[W];
      for (int r = 0; r < W; r += RB)
        sign_dots<RB>(rows + r, bytes, a.prepared + t * stride, a.x + t * a.x_stride, t == 0, a.once, sum + r);
      finish.scaled(row, n, t, SignPanel::correct(reduce_ints(sum), finish.total(t)), scale);
    }
  }
}
#endif

// One vector of an int8 row against one of x; the last one may be cut to `left` bytes.
inline vi int8_step(vi sum, const uint8_t* row, const int8_t* x, int64_t left) {
#if defined(__AVX512F__)
  const vi w = left >= 64 ? iload(row) : _mm512_maskz_loadu_epi8((__mmask64(1) << left) - 1, row);
  return dot4(sum, ixor(w, ibytes(0x80)), iload(x));
#elif defined(__AVXVNNI__)
  const vi w = left >= 32 ? iload(row)
                          : _mm256_inserti128_si256(_mm256_castsi128_si256(load16(row, left)), load16(row + 16, left - 16), 1);
  return dot4(sum, ixor(w, ibytes(0x80)), iload(x));
#else
  const vi w = _mm256_cvtepi8_epi16(load16(row, left)), v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x));
  return iadd(sum, _mm256_madd_epi16(w, v));
#endif
}
constexpr int64_t kInt8Step = kVnni ? 4 * W : 16;

template <int TK>
inline void int8_rows(const QuantArgs& a, int64_t row, int64_t n, int64_t token) {
  constexpr int RB = 8 / TK < 2 ? 2 : 8 / TK;
  vi sum[TK][W];
  for (int first = 0; first < W; first += RB) {
    const uint8_t* rows[RB];
    vi acc[RB][TK];
    for (int r = 0; r < RB; ++r) {
      rows[r] = a.data + (row + min64(first + r, n - 1)) * a.cols;
      for (int t = 0; t < TK; ++t) acc[r][t] = izero();
    }
    for (int64_t c = 0; c < a.cols; c += kInt8Step) {
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) _mm_prefetch((const char*)rows[r] + RB * a.cols + c, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < TK; ++t)
          acc[r][t] = int8_step(acc[r][t], rows[r] + c, a.x + (token + t) * a.x_stride + c, a.cols - c);
    }
    for (int r = 0; r < RB; ++r)
      for (int t = 0; t < TK; ++t) sum[t][first + r] = acc[r][t];
  }
  const Finish finish = {a};
  const vf scale = finish.scales(row, n);
  for (int t = 0; t < TK; ++t) {
    const vi total = reduce_ints(sum[t]);
    finish.scaled(row, n, token + t, kVnni ? Int8Panel::correct(total, finish.total(token + t)) : total, scale);
  }
}

struct Int8Rows {
  const QuantArgs& a;
  int64_t row, n;
  template <int TK>
  void tokens(int64_t t) const { int8_rows<TK>(a, row, n, t); }
};

// A group of an int4 row: its even columns are low nibbles, its odd ones high nibbles; x holds 64 even, then 64 odd ones.
inline vi int4_group(const uint8_t* row, const int8_t* x, int64_t left) {
  const vi low = ibytes(15);
#if defined(__AVX512F__)
  const vi v = left >= 64 ? iload(row) : _mm512_maskz_loadu_epi8((__mmask64(1) << left) - 1, row);
  return dot4(dot4(izero(), iand(v, low), iload(x)), iand(ishr16<4>(v), low), iload(x + 64));
#else
  vi v[2];
  for (int i = 0; i < 2; ++i) {
    v[i] = left >= 32 * (i + 1) ? iload(row + 32 * i)
                                : _mm256_inserti128_si256(_mm256_castsi128_si256(load16(row + 32 * i, left - 32 * i)),
                                                          load16(row + 32 * i + 16, left - 32 * i - 16), 1);
  }
  vi sum = izero();
  for (int i = 0; i < 2; ++i) {
    sum = dot4(sum, iand(v[i], low), iload(x + 32 * i));
    sum = dot4(sum, iand(ishr16<4>(v[i]), low), iload(x + 64 + 32 * i));
  }
  return sum;
#endif
}

void int4_few(const QuantArgs& a) {
  const Finish finish = {a};
  const int64_t groups = groups_of(a.cols), row_bytes = Int4Panel::row_bytes(a.cols), stride = groups * kGroup;
  float* scales = (float*)a.scratch;
  for (int64_t row = a.row_begin; row < a.row_end; row += W) {
    const int64_t n = min64(W, a.row_end - row);
    group_scales(a, row, n, scales);
    const uint8_t* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = a.data + (row + min64(i, n - 1)) * row_bytes;
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int8_t* x = (const int8_t*)a.prepared + t * stride;
      vf total = vzero();
      for (int64_t g = 0; g < groups; ++g) {
        for (int i = 0; i < W && t == 0; ++i) _mm_prefetch((const char*)rows[i] + W * row_bytes + g * 64, _MM_HINT_T1);
        vi sum[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) sum[r] = int4_group(rows[r] + g * 64, x + g * kGroup, row_bytes - g * 64);
        const vi whole = Int4Panel::correct(reduce_ints(sum), a.x_sums[t * (groups + 1) + g]);
        total = vadd(total, vmul(vload(scales + g * W), to_float(whole)));
      }
      finish.put(row, n, t, vmul(total, vset(a.x_scale[t])));
    }
  }
}

inline int64_t int4_prepared_bytes(int64_t cols) { return groups_of(cols) * kGroup; }
void int4_prepare(const int8_t* x, int64_t cols, uint8_t* out) {
  const int64_t padded = round_up(cols, 64);
  for (int64_t g = 0; g < groups_of(cols); ++g) {
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t c = g * kGroup + i;
      out[g * kGroup + i / 2 + (i % 2) * 64] = c < padded ? uint8_t(x[c]) : 0;
    }
  }
}

template <class Rows>
void few_rows(const QuantArgs& a) {
  for (int64_t row = a.row_begin; row < a.row_end; row += W) {
    const Rows rows = {a, row, min64(W, a.row_end - row)};
    int64_t t = 0;
    for (; t + 4 <= a.tokens; t += 4) rows.template tokens<4>(t);
    for (; t + 2 <= a.tokens; t += 2) rows.template tokens<2>(t);
    for (; t < a.tokens; ++t) rows.template tokens<1>(t);
  }
}

inline int64_t no_bytes(int64_t) { return 0; }
inline void no_prepare(const int8_t*, int64_t, uint8_t*) {}

}  // namespace
}  // namespace slimba
