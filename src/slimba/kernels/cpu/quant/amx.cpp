// Many tokens against sign and int8 rows with the tile registers of AMX.
//
// A tile of 16 tokens x 64 columns (signed bytes, as `quantize` left them) times a tile of the panel (64 columns x 16
// rows, unsigned, as panel.h lays it out) adds to a tile of 16 x 16 whole numbers. Two by two of them share their loads.
// SLIMBA_EMULATE_AMX replaces the instructions by plain loops, so that the rest can be tested on any AVX-512 machine.
#include "panel.h"
#include "sizes.h"

namespace slimba {
namespace {

constexpr int64_t kTokens = 32, kRows = 32;  // of the four result tiles

#if defined(SLIMBA_EMULATE_AMX)
struct Tile {
  int8_t bytes[16][64];
};
thread_local Tile tiles[8];
struct TileScope {};
template <int T>
void tile_clear() { __builtin_memset(&tiles[T], 0, sizeof(Tile)); }
template <int T>
void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(tiles[T].bytes[i], (const char*)p + i * stride, 64);
}
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy((char*)p + i * stride, tiles[T].bytes[i], 64);
}
template <int C, int A, int B>
void tile_dot() {  // C += A (signed) x B (unsigned)
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      __builtin_memcpy(&sum, tiles[C].bytes[m] + 4 * n, 4);
      for (int k = 0; k < 64; ++k) sum += int(tiles[A].bytes[m][k]) * int(uint8_t(tiles[B].bytes[k / 4][4 * n + k % 4]));
      __builtin_memcpy(tiles[C].bytes[m] + 4 * n, &sum, 4);
    }
}
#else
// All eight tiles 16 rows of 64 bytes, while it lives
struct TileScope {
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { asm volatile("tilerelease"); }
};
// Not by intrinsics: GCC's are macros that take the numbers of tiles as text.
template <int T>
inline void tile_clear() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {  // C += A (signed) x B (unsigned)
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

inline void own_line(const void* p) { asm volatile("prefetchw %0" ::"m"(*(const char*)p)); }

// sums [kTokens][kRows] of 32 tokens (at x) and the two blocks of rows at `panel`. Meanwhile the lines of `y`, a row of two
// of them for each token, are fetched for writing: another core may have them.
inline void tile_products(const QuantArgs& a, const uint8_t* panel, const int8_t* x, int32_t* sums, const float* y) {
  tile_clear<0>();
  tile_clear<1>();
  tile_clear<2>();
  tile_clear<3>();
  const int64_t block = panel_bytes(a.cols);
  for (int64_t c = 0; c < a.cols; c += 64, y += a.y_stride) {
    if (c < kTokens * 64) own_line(y), own_line(y + 16);
    tile_load<4>(x + c, a.x_stride);
    tile_load<6>(panel + c * kBlock, 64);
    tile_dot<0, 4, 6>();
    tile_load<7>(panel + block + c * kBlock, 64);
    tile_dot<1, 4, 7>();
    tile_load<5>(x + 16 * a.x_stride + c, a.x_stride);
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
  tile_store<0>(sums, kRows * 4);
  tile_store<1>(sums + 16, kRows * 4);
  tile_store<2>(sums + 16 * kRows, kRows * 4);
  tile_store<3>(sums + 16 * kRows + 16, kRows * 4);
}

template <class P>
void many_tiles(const QuantArgs& a) {
  const Finish finish = {a};
  alignas(64) int32_t sums[kTokens * kRows];
  const TileScope scope;
  (void)scope;
  for (int64_t row = a.row_begin; row < a.row_end; row += kRows) {
    const int64_t n = min64(kRows, a.row_end - row);
    expand_tile<P>(a, row, n);
    vf scale[2];
    for (int v = 0; v < 2; ++v) scale[v] = v * W < n ? finish.scales(row + v * W, n - v * W) : vzero();
    for (int64_t first = 0; first < a.tokens; first += kTokens) {
      tile_products(a, a.scratch, a.x + first * a.x_stride, sums, a.y + first * a.y_stride + row);
      for (int64_t t = 0; t < min64(kTokens, a.tokens - first); ++t) {
        const int total = finish.total(first + t);
        for (int v = 0; v < 2 && v * W < n; ++v) {
          const vi sum = P::correct(iload(sums + t * kRows + v * W), total);
          finish.scaled(row + v * W, min64(W, n - v * W), first + t, sum, scale[v]);
        }
      }
    }
  }
}

template <class P>
const QuantFormat& with_tiles(const QuantFormat& rows) {
  static QuantFormat format = rows;
  format.many = many_tiles<P>;
  format.scratch_bytes = many_scratch_bytes;
  format.many_rows = kPanelRows;
  return format;
}

}  // namespace

void amx_quant(Kernels& k) {
  k.quant[kSign] = &with_tiles<SignPanel>(*k.quant[kSign]);
  k.quant[kInt8] = &with_tiles<Int8Panel>(*k.quant[kInt8]);
}

}  // namespace slimba
