// Sign rows for AVX2 and AVX-512: table look-ups instead of multiplications, no activation is rounded.
//
// A handful of neighbouring columns (4 with AVX-512, 3 with AVX2) has 16 (8) possible signed sums of its activations.
// Those tables are made once per token (`sign_prepare`) and one permute instruction looks up W rows at once: a lane
// holds 32 columns of its row, its low bits select, and a shift brings the next columns down. That is three
// instructions for 64 (24) weights, two when several tokens share the shift. Rows are transposed first, W of them at a
// time, so that a lane is a row. Every (row, token) meets its columns in order with one accumulator: results do not
// depend on T or on the tile.
#include "../simd.h"

namespace slimba {
namespace {

#if defined(__AVX512F__)
constexpr int kColumns = 4, kTables = 8;  // of 16 entries, for the 32 columns of a word
#else
constexpr int kColumns = 3, kTables = 11;  // of 8 entries; the last one has two columns
#endif
constexpr int64_t kWordFloats = kTables * W;
constexpr int kMaxBlocks = 4;        // blocks of W rows that share a look at the tables
constexpr int64_t kPanelRows = 256;  // rows transposed at once when many tokens meet them

inline int64_t sign_words(int64_t cols) { return (cols + 63) / 64 * 2; }
inline int64_t sign_prepared_floats(int64_t cols) { return sign_words(cols) * kWordFloats + 16; }  // see dots.h
// and a little more: words are read up to three bytes past their end
inline int64_t sign_scratch_floats(int64_t cols) { return kPanelRows * sign_words(cols) + W; }

inline vi vload_words(const float* p) {
#if defined(__AVX512F__)
  return _mm512_loadu_si512(p);
#else
  return _mm256_loadu_si256((const __m256i*)p);
#endif
}
inline void vstore_words(float* p, vi v) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(p, v);
#else
  _mm256_storeu_si256((__m256i*)p, v);
#endif
}
inline vi next_columns(vi v) {
#if defined(__AVX512F__)
  return _mm512_srli_epi32(v, kColumns);
#else
  return _mm256_srli_epi32(v, kColumns);
#endif
}
inline vf look_up(vi index, vf table) {  // only the low log2(W) bits of a lane count
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(index, table);
#else
  return _mm256_permutevar8x32_ps(table, index);
#endif
}

// Entry e of a table is sum_j (bit j of e ? x_j : -x_j).
void sign_prepare(const float* x, int64_t cols, float* out) {
  alignas(64) float signs[kColumns][W];
  for (int j = 0; j < kColumns; ++j)
    for (int e = 0; e < W; ++e) signs[j][e] = e >> j & 1 ? 1.0f : -1.0f;
  vf sign[kColumns];
  for (int j = 0; j < kColumns; ++j) sign[j] = vload(signs[j]);
  for (int64_t word = 0; word < sign_words(cols); ++word) {
    float in[kTables * kColumns] = {};
    for (int64_t i = 0; i < 32 && word * 32 + i < cols; ++i) in[i] = x[word * 32 + i];
    for (int g = 0; g < kTables; ++g) {
      vf table = vmul(sign[0], vset(in[g * kColumns]));
      for (int j = 1; j < kColumns; ++j) table = vfma(sign[j], vset(in[g * kColumns + j]), table);
      vstore(out + word * kWordFloats + g * W, table);
    }
  }
}

// 16 (or, at the end of a row, 8) bytes of the rows q, q + 4, ... of a block side by side.
inline vi load_quarter(const uint8_t* const* rows, int q, int64_t byte, bool wide) {
  const auto part = [&](int i) {
    const __m128i* p = (const __m128i*)(rows[4 * i + q] + byte);
    return wide ? _mm_loadu_si128(p) : _mm_loadl_epi64(p);
  };
#if defined(__AVX512F__)
  vi v = _mm512_castsi128_si512(part(0));
  v = _mm512_inserti32x4(v, part(1), 1);
  v = _mm512_inserti32x4(v, part(2), 2);
  return _mm512_inserti32x4(v, part(3), 3);
#else
  return _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
#endif
}

// Rows row .. row + n (n <= W; the last one is repeated) -> out[word][lane] = word of the lane's row.
inline void transpose_block(const uint8_t* data, int64_t row_bytes, int64_t row, int64_t n, float* out) {
  const uint8_t* rows[W];
  for (int i = 0; i < W; ++i) rows[i] = data + (row + min64(i, n - 1)) * row_bytes;
  for (int64_t byte = 0; byte < row_bytes; byte += 16) {
    const bool wide = byte + 16 <= row_bytes;
    vi r[4];
    for (int q = 0; q < 4; ++q) r[q] = load_quarter(rows, q, byte, wide);
#if defined(__AVX512F__)
    const vi a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const vi c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    const vi w0 = _mm512_unpacklo_epi64(a, c), w1 = _mm512_unpackhi_epi64(a, c);
    const vi w2 = _mm512_unpacklo_epi64(b, d), w3 = _mm512_unpackhi_epi64(b, d);
#else
    const vi a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const vi c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    const vi w0 = _mm256_unpacklo_epi64(a, c), w1 = _mm256_unpackhi_epi64(a, c);
    const vi w2 = _mm256_unpacklo_epi64(b, d), w3 = _mm256_unpackhi_epi64(b, d);
#endif
    float* to = out + byte / 4 * W;
    vstore_words(to, w0);
    vstore_words(to + W, w1);
    if (!wide) break;
    vstore_words(to + 2 * W, w2);
    vstore_words(to + 3 * W, w3);
  }
}

// Adds what the tables say about the next columns of RB blocks for TK tokens; table 0 of the first token is at
// `tables`.
template <int RB, int TK>
inline void add_columns(const vi (&index)[RB], const float* tables, int64_t stride, vf (&sum)[RB][TK]) {
#pragma GCC unroll 4
  for (int t = 0; t < TK; ++t) {
    const vf table = vload(tables + t * stride);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) sum[r][t] = vadd(sum[r][t], look_up(index[r], table));
  }
}

// Sums of RB blocks (block_floats apart) and TK tokens (stride apart) over all columns. Meanwhile the rows at
// `upcoming`, as many bytes as these blocks have, are fetched into the cache (null: nothing).
template <int RB, int TK>
inline void sign_tile(const float* blocks, int64_t block_floats, int64_t words, const float* x, int64_t stride,
                      vf (&sum)[RB][TK], const uint8_t* upcoming) {
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TK; ++t) sum[r][t] = vzero();
  for (int64_t word = 0; word < words; ++word) {
    if (upcoming) {
      for (int i = 0; i < RB * W * 4; i += 64) _mm_prefetch((const char*)upcoming + word * RB * W * 4 + i, _MM_HINT_T1);
    }
    const float *tables = x + word * kWordFloats, *at = blocks + word * W;
    vi index[RB];
    // The loops are not unrolled: GCC would string the additions of one accumulator together and spill the rest.
#if defined(__AVX512F__)
    // A load one byte further on is a shift by 8 (for the bits that count), which leaves every other shift to do.
#pragma GCC unroll 1
    for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) index[r] = vload_words((const float*)((const char*)(at + r * block_floats) + byte));
      add_columns<RB, TK>(index, tables + 2 * byte * W, stride, sum);
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) index[r] = next_columns(index[r]);
      add_columns<RB, TK>(index, tables + (2 * byte + 1) * W, stride, sum);
    }
#else
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) index[r] = vload_words(at + r * block_floats);
#pragma GCC unroll 1
    for (int g = 0; g < kTables; ++g) {
      add_columns<RB, TK>(index, tables + g * W, stride, sum);
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) index[r] = next_columns(index[r]);
    }
#endif
  }
}

// One tile and its results: rows row .. of the segment, RB blocks of them, ends clipped to `end`.
template <int RB, int TK>
inline void sign_rows(const MatmulArgs& a, const float* blocks, int64_t row, int64_t end, int64_t token,
                      const uint8_t* upcoming) {
  const int64_t words = sign_words(a.cols), stride = sign_prepared_floats(a.cols);
  vf sum[RB][TK];
  sign_tile<RB, TK>(blocks, words * W, words, a.x + token * stride, stride, sum, upcoming);
  for (int r = 0; r < RB; ++r) {
    const int64_t first = row + r * W, n = min64(W, end - first);
    const vf scale = load_half_n(a.scale + 2 * first, n);
    for (int t = 0; t < TK; ++t) {
      float* y = a.y + (token + t) * a.y_stride + first;
      vstore_n(y, a.add ? vfma(sum[r][t], scale, vload_n(y, n)) : vmul(sum[r][t], scale), n);
    }
  }
}

// All blocks of a transposed panel against TK tokens; `ahead` bytes after a row, its successor is fetched (0: none).
template <int TK>
inline void sign_panel(const MatmulArgs& a, int64_t row, int64_t end, int64_t token, int64_t ahead) {
  constexpr int kBlocks = W == 8 && TK == 4 ? 2 : kMaxBlocks;  // what the registers hold
  const int64_t words = sign_words(a.cols);
  const float* blocks = a.scratch;
  while (row < end) {
    if (row + (kBlocks - 1) * W < end) {
      sign_rows<kBlocks, TK>(a, blocks, row, end, token, ahead ? a.data + row * words * 4 + ahead : nullptr);
      row += kBlocks * W;
      blocks += kBlocks * words * W;
    } else {
      sign_rows<1, TK>(a, blocks, row, end, token, nullptr);
      row += W;
      blocks += words * W;
    }
  }
}

void sign_matmul(const MatmulArgs& a) {
  const int64_t row_bytes = sign_words(a.cols) * 4, panel = a.tokens > 4 ? kPanelRows : kMaxBlocks * W;
  for (int64_t row = a.row_begin; row < a.row_end; row += panel) {
    const int64_t end = min64(row + panel, a.row_end);
    for (int64_t first = row; first < end; first += W) {
      transpose_block(a.data, row_bytes, first, min64(W, end - first), a.scratch + (first - row) * sign_words(a.cols));
    }
    // The panel after the next one, during the first tokens of this one
    const int64_t ahead = end + panel < a.row_end ? 2 * panel * row_bytes : 0;
    int64_t t = 0;
    for (; t + 4 <= a.tokens; t += 4) sign_panel<4>(a, row, end, t, t ? 0 : ahead);
    for (; t + 2 <= a.tokens; t += 2) sign_panel<2>(a, row, end, t, t ? 0 : ahead);
    for (; t < a.tokens; ++t) sign_panel<1>(a, row, end, t, t ? 0 : ahead);
  }
}

}  // namespace
}  // namespace slimba
