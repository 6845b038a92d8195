// Many tokens against signs with AVX2 and AVX-512: the sums of all subsets of five or six activations are tables, into
// which a row's signs point.
//
// An entry holds the sums of 32 tokens, 16 bits each, so the 64 signs of a word are twelve indices, and two loads with
// additions of 256 bits (one of 512) are up to 192 products; what they cost does not depend on multiplications of bytes.
// The tables of a word fill the first-level cache: they are made for 64 columns at a time and used by a thousand rows.
#pragma once

#include "panel.h"
#include "transpose.h"

namespace slimba {
namespace {

constexpr int64_t kSubsetRows = 2048;            // whose sums stay in the second-level cache
constexpr int64_t kRowStride = kSubsetRows + 8;  // or the words of a row would fight for the same cache sets
constexpr int64_t kSubsetTokens = 32, kEntryBytes = 2 * kSubsetTokens;
constexpr int64_t kLeastTokens = W == 16 ? 24 : 20, kLeastRows = 64;  // below these, others are faster

// ---- 16-bit numbers of 32 tokens

#if defined(__AVX512F__)
struct Numbers {
  __m512i all;
};
constexpr int kRowsAtOnce = 2;  // a row's additions wait for each other
inline Numbers no_numbers() { return {_mm512_setzero_si512()}; }
inline Numbers numbers_at(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Numbers numbers_of(const uint8_t* bytes) { return {_mm512_cvtepi8_epi16(load32(bytes))}; }
inline void put(void* p, Numbers v) { _mm512_storeu_si512(p, v.all); }
inline Numbers operator+(Numbers a, Numbers b) { return {_mm512_add_epi16(a.all, b.all)}; }
inline Numbers less_negatives(Numbers a, Numbers b) {  // a - min(b, 0)
  return {_mm512_sub_epi16(a.all, _mm512_min_epi16(b.all, _mm512_setzero_si512()))};
}
inline Numbers saturated_sum(Numbers a, Numbers b) { return {_mm512_adds_epu16(a.all, b.all)}; }
inline bool any_full(Numbers v) { return _mm512_cmpeq_epi16_mask(v.all, _mm512_set1_epi16(-1)) != 0; }
template <int kOffset, class Tables>
inline void add_entry(Numbers& sum, const uint8_t* tables, uint64_t at) {
#if defined(SLIMBA_SIMDE)
  sum = sum + numbers_at(tables + at + kOffset);
#else
  asm("vpaddw %c3(%1, %2), %0, %0"
      : "+v"(sum.all)
      : "r"(tables), "r"(at), "i"(kOffset), "m"(*(const Tables*)tables));
#endif
}
#else
struct Numbers {
  __m256i low, high;
};
constexpr int kRowsAtOnce = 2;
inline Numbers no_numbers() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Numbers numbers_at(const void* p) { return {load32(p), load32((const uint8_t*)p + 32)}; }
inline Numbers numbers_of(const uint8_t* bytes) {
  const __m128i* p = (const __m128i*)bytes;
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(p)), _mm256_cvtepi8_epi16(_mm_loadu_si128(p + 1))};
}
inline void put(void* p, Numbers v) { store32(p, v.low), store32((uint8_t*)p + 32, v.high); }
inline Numbers operator+(Numbers a, Numbers b) {
  return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
}
inline Numbers less_negatives(Numbers a, Numbers b) {  // a - min(b, 0)
  return {_mm256_sub_epi16(a.low, _mm256_min_epi16(b.low, _mm256_setzero_si256())),
          _mm256_sub_epi16(a.high, _mm256_min_epi16(b.high, _mm256_setzero_si256()))};
}
inline Numbers saturated_sum(Numbers a, Numbers b) {
  return {_mm256_adds_epu16(a.low, b.low), _mm256_adds_epu16(a.high, b.high)};
}
inline bool any_full(Numbers v) {
  const __m256i ones = _mm256_set1_epi16(-1);
  return _mm256_movemask_epi8(_mm256_or_si256(_mm256_cmpeq_epi16(v.low, ones), _mm256_cmpeq_epi16(v.high, ones))) != 0;
}
// As assembly: from intrinsics GCC loads many entries first and adds them up later, a tenth slower.
template <int kOffset, class Tables>
inline void add_entry(Numbers& sum, const uint8_t* tables, uint64_t at) {
  asm("vpaddw %c4(%2, %3), %0, %0\n\tvpaddw %c4 + 32(%2, %3), %1, %1"
      : "+x"(sum.low), "+x"(sum.high)
      : "r"(tables), "r"(at), "i"(kOffset), "m"(*(const Tables*)tables));
}
#endif

// ---- tables of a word

// The 64 columns in groups: kSixes of six, then as many of five as there is room for. Table i has 2^count entries.
template <int kSixes>
struct Groups {
  static constexpr int kTables = kSixes + (64 - 6 * kSixes + 4) / 5;
  static constexpr int first(int i) { return i < kSixes ? 6 * i : 6 * kSixes + 5 * (i - kSixes); }
  static constexpr int count(int i) { return i < kTables - 1 ? (i < kSixes ? 6 : 5) : 64 - first(i); }
  static constexpr int offset(int i) { return int(kEntryBytes) * (i < kSixes ? 64 * i : 64 * kSixes + 32 * (i - kSixes)); }
  static constexpr int64_t kBytes = offset(kTables - 1) + (1 << count(kTables - 1)) * kEntryBytes;
  struct Tables {
    uint8_t bytes[kBytes];
  };
};

constexpr int kMostSixes = W == 16 ? 10 : 4;      // tables of 41 or 32 kB instead of 25, faster where they stay in the
constexpr int64_t kWideCache = int64_t(48) << 10;  // first-level cache: if it is at least so large

// What the activations of some columns add up to, and the negative ones among them, positive.
struct Totals {
  Numbers all = no_numbers(), below = no_numbers();
};

// Entry e is the sum of those of `count` columns whose bits are set in e; columns [count][32 tokens].
template <int count>
inline void subset_table(const uint8_t* columns, uint8_t* table, Totals& totals) {
  const auto column = [&](int c) {
    const Numbers v = numbers_of(columns + c * kSubsetTokens);
    totals.below = less_negatives(totals.below, v);
    return v;
  };
  const Numbers first = column(0), second = column(1), both = first + second;
  Numbers last = both;
  const auto four = [&](uint8_t* to, Numbers base) {
    put(to, base), put(to + kEntryBytes, base + first);
    put(to + 2 * kEntryBytes, base + second), put(to + 3 * kEntryBytes, last = base + both);
  };
  four(table, no_numbers());
  for (int c = 2; c < count; ++c) {
    const Numbers more = column(c);
    const int64_t bytes = (1 << c) * kEntryBytes;
    for (int64_t e = 0; e < bytes; e += 4 * kEntryBytes) four(table + bytes + e, numbers_at(table + e) + more);
  }
  totals.all = totals.all + last;
}

template <int kSixes, int I = 0>
inline void subset_tables(const uint8_t* columns, uint8_t* tables, Totals& totals) {
  using G = Groups<kSixes>;
  if constexpr (I < G::kTables) {
    subset_table<G::count(I)>(columns + G::first(I) * kSubsetTokens, tables + G::offset(I), totals);
    subset_tables<kSixes, I + 1>(columns, tables, totals);
  }
}

// What the words of RK rows choose is added to their sums.
template <int kSixes, int RK, int I = 0>
inline void add_entries(const uint8_t* tables, const uint64_t* words, Numbers (&sums)[RK]) {
  using G = Groups<kSixes>;
  if constexpr (I < G::kTables) {
    constexpr int kUp = 6 - G::first(I);  // to where an index stands for bytes
    constexpr uint64_t kMask = ((1 << G::count(I)) - 1) * kEntryBytes;
    uint64_t at[RK];
#pragma GCC unroll 4
    for (int r = 0; r < RK; ++r) at[r] = (kUp > 0 ? words[r] << (kUp & 63) : words[r] >> (-kUp & 63)) & kMask;
#pragma GCC unroll 4
    for (int r = 0; r < RK; ++r) add_entry<G::offset(I), typename G::Tables>(sums[r], tables, at[r]);
    add_entries<kSixes, RK, I + 1>(tables, words, sums);
  }
}

template <int kSixes, int RK>
inline void add_rows(const uint64_t* from, const uint8_t* tables, bool first, uint16_t* to) {
  uint64_t words[RK];
  Numbers sums[RK];
#pragma GCC unroll 4
  for (int r = 0; r < RK; ++r) {
    words[r] = from[r];
    sums[r] = first ? no_numbers() : numbers_at(to + r * kSubsetTokens);
  }
  add_entries<kSixes, RK>(tables, words, sums);
#pragma GCC unroll 4
  for (int r = 0; r < RK; ++r) put(to + r * kSubsetTokens, sums[r]);
}

// sums [n][32 tokens] += what a word of n rows chooses; set if `first`
template <int kSixes>
__attribute__((noinline)) void add_word(const uint64_t* words, int64_t n, const uint8_t* tables, bool first, uint16_t* sums) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= n; r += kRowsAtOnce) add_rows<kSixes, kRowsAtOnce>(words + r, tables, first, sums + r * kSubsetTokens);
  for (; r < n; ++r) add_rows<kSixes, 1>(words + r, tables, first, sums + r * kSubsetTokens);
}

// ---- blocks of rows and tokens

template <int kSixes>
struct SubsetScratch {
  uint8_t *tables, *columns;  // of a word; its activations [64][32 tokens]
  uint16_t* sums;             // [kSubsetRows][32 tokens]
  int32_t* wide;              // the same, of the runs before
  uint64_t* words;            // [columns / 64][kRowStride] of the rows

  static int64_t bytes(int64_t cols) {
    return Groups<kSixes>::kBytes + 64 * kSubsetTokens + kSubsetRows * kSubsetTokens * 6 + round_up(cols, 64) / 8 * kRowStride;
  }
  explicit SubsetScratch(uint8_t* p) {
    tables = p, p += Groups<kSixes>::kBytes;
    columns = p, p += 64 * kSubsetTokens;
    sums = (uint16_t*)p, p += kSubsetRows * kSubsetTokens * 2;
    wide = (int32_t*)p, p += kSubsetRows * kSubsetTokens * 4;
    words = (uint64_t*)p;
  }
};

// Words of n rows beside each other, so that a pass over the rows reads memory in order
inline void gather_words(const uint8_t* data, int64_t row_bytes, int64_t n, uint64_t* out) {
  for (int64_t r = 0; r < n; r += 4) {
    const uint8_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = data + min64(r + i, n - 1) * row_bytes;
    int64_t w = 0;
    for (; 8 * w + 32 <= row_bytes; w += 4) {
      __m256i v[4];
      for (int i = 0; i < 4; ++i) v[i] = load32(rows[i] + 8 * w);
      const __m256i a = _mm256_unpacklo_epi64(v[0], v[1]), b = _mm256_unpackhi_epi64(v[0], v[1]);
      const __m256i c = _mm256_unpacklo_epi64(v[2], v[3]), d = _mm256_unpackhi_epi64(v[2], v[3]);
      uint64_t* to = out + w * kRowStride + r;
      store32(to, _mm256_permute2x128_si256(a, c, 0x20)), store32(to + kRowStride, _mm256_permute2x128_si256(b, d, 0x20));
      store32(to + 2 * kRowStride, _mm256_permute2x128_si256(a, c, 0x31));
      store32(to + 3 * kRowStride, _mm256_permute2x128_si256(b, d, 0x31));
    }
    for (; 8 * w < row_bytes; ++w)
      for (int64_t i = 0; i < 4; ++i) __builtin_memcpy(out + w * kRowStride + r + i, rows[i] + 8 * w, 8);
  }
}

// 16 bytes, of which those beyond n become 0
inline __m128i load_some(const uint8_t* p, int64_t n) {
  if (n >= 16) return _mm_loadu_si128((const __m128i*)p);
  alignas(16) uint8_t some[16] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return _mm_load_si128((const __m128i*)some);
}

// Sums of eight tokens and what is below them, a number without a sign
inline __m256i true_sums(const uint16_t* sums, const uint16_t* below) {
  const __m128i v = _mm_loadu_si128((const __m128i*)sums), b = _mm_load_si128((const __m128i*)below);
  return _mm256_cvtepu16_epi32(_mm_add_epi16(v, b));
}

// Words one after another whose sums fit 16 bits. A token's lie within -below .. size - below, size being the magnitudes of
// all its activations, so they are exact while that is less than 2^16: 512 columns at least, more of common activations.
struct Run {
  Numbers below = no_numbers(), size = no_numbers();
  bool begun = false;

  // Whether the word fits in; counts it if so.
  bool takes(const Totals& word) {
    const Numbers more = saturated_sum(size, word.all + word.below + word.below);
    if (begun && any_full(more)) return false;
    size = more, below = below + word.below, begun = true;
    return true;
  }
};

// y of n rows from `row` on and `tokens` (<= 32) tokens from `token` on: sums of the last run, and `wide` of those before,
// if there were any.
struct Block {
  const QuantArgs& a;
  int64_t row, n, token, tokens;
  alignas(64) uint16_t below[kSubsetTokens] = {};     // of the last run
  alignas(64) int32_t all_below[kSubsetTokens] = {};  // what the sums of all runs have too much
  bool widened = false;

  void close(const Run& run) {
    put(below, run.below);
    for (int64_t t = 0; t < kSubsetTokens; ++t) all_below[t] += below[t];
  }

  void widen(const uint16_t* sums, int32_t* wide) {
    for (int64_t i = 0; i < n * kSubsetTokens; i += 8) {
      const __m256i v = true_sums(sums + i, below + i % kSubsetTokens);
      store32(wide + i, widened ? _mm256_add_epi32(load32(wide + i), v) : v);
    }
    widened = true;
  }

  void finish(const uint16_t* sums, const int32_t* wide) {
    alignas(64) int32_t taken[kSubsetTokens];
    alignas(64) float steps[kSubsetTokens];
    for (int64_t t = 0; t < kSubsetTokens; ++t) {
      const int64_t real = token + min64(t, tokens - 1);
      taken[t] = 2 * all_below[t] + Finish{a}.total(real), steps[t] = a.x_scale[real];
    }
    for (int64_t r = 0; r < n; r += 16) {  // whole lines of y
      for (int64_t t = 0; t < tokens; t += 8) {
        tile(sums, wide, taken, steps, r, t);
        if (r + 8 < n) tile(sums, wide, taken, steps, r + 8, t);
      }
    }
  }

  // Eight rows and tokens
  void tile(const uint16_t* sums, const int32_t* wide, const int32_t* taken, const float* steps, int64_t r, int64_t t) const {
    alignas(32) float scale[8];
    _mm256_store_ps(scale, _mm256_cvtph_ps(load_some(a.scale + 2 * (row + r), 2 * (n - r))));
    __m256 out[8];
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t at = (r + i) * kSubsetTokens + t;
      __m256i sum = true_sums(sums + at, below + t);
      if (widened) sum = _mm256_add_epi32(sum, load32(wide + at));
      sum = _mm256_sub_epi32(_mm256_add_epi32(sum, sum), load32(taken + t));
      out[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(_mm256_set1_ps(scale[i]), _mm256_load_ps(steps + t)));
    }
    transpose_floats(out);
    float* y = a.y + (token + t) * a.y_stride + row + r;
    if (n - r < 8 || tokens - t < 8) {
      for (int64_t i = 0; i < min64(8, tokens - t); ++i, y += a.y_stride) {
        alignas(32) float some[8];
        _mm256_store_ps(some, out[i]);
        for (int64_t k = 0; k < min64(8, n - r); ++k) y[k] = a.add ? y[k] + some[k] : some[k];
      }
      return;
    }
    if (a.add) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) out[i] = _mm256_add_ps(_mm256_loadu_ps(y + i * a.y_stride), out[i]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; ++i) _mm256_storeu_ps(y + i * a.y_stride, out[i]);
  }
};

template <int kSixes>
inline void subset_block(const SubsetScratch<kSixes>& s, Block& b) {
  const QuantArgs& a = b.a;
  const uint8_t* x = (const uint8_t*)a.x + b.token * a.x_stride;
  Run run;
  for (int64_t w = 0; 64 * w < a.cols; ++w) {
    Totals word;
    transpose_bytes(x, a.x_stride, b.tokens, w * 64, w * 64 + 64, s.columns);
    subset_tables<kSixes>(s.columns, s.tables, word);
    bool fresh = w == 0;
    if (!run.takes(word)) {
      b.close(run);
      b.widen(s.sums, s.wide);
      run = Run();
      fresh = run.takes(word);
    }
    add_word<kSixes>(s.words + w * kRowStride, b.n, s.tables, fresh, s.sums);
  }
  b.close(run);
  b.finish(s.sums, s.wide);
}

// How many of the tokens are worth it; the others are the last ones.
inline int64_t subset_tokens(const QuantArgs& a) {
  if (a.row_end - a.row_begin < kLeastRows) return 0;
  return a.tokens % kSubsetTokens < kLeastTokens ? a.tokens / kSubsetTokens * kSubsetTokens : a.tokens;
}

// `rest`: less than kLeastTokens tokens at a time, with nothing prepared
template <int kSixes, void (*rest)(const QuantArgs& a)>
void subset_many(const QuantArgs& a) {
  const int64_t row_bytes = SignPanel::row_bytes(a.cols), stop = subset_tokens(a);
  const SubsetScratch<kSixes> s(a.scratch);
  for (int64_t row = a.row_begin; row < a.row_end && stop; row += kSubsetRows) {
    const int64_t n = min64(kSubsetRows, a.row_end - row);
    gather_words(a.data + row * row_bytes, row_bytes, n, s.words);
    for (int64_t token = 0; token < stop; token += kSubsetTokens) {
      Block b = {a, row, n, token, min64(kSubsetTokens, stop - token)};
      subset_block<kSixes>(s, b);
    }
  }
  for (int64_t token = stop; token < a.tokens; token += kLeastTokens - 1) {
    QuantArgs some = a;
    some.x += token * a.x_stride, some.x_scale += token, some.x_sums += token * (groups_of(a.cols) + 1);
    some.y += token * a.y_stride, some.tokens = min64(kLeastTokens - 1, a.tokens - token);
    rest(some);
  }
}

}  // namespace
}  // namespace slimba
