// Rows of float16, bfloat16 or int8 that pass through registers, times a few vectors in shared memory.
//
// A warp owns 256 columns and multiplies all rows of the block by them. Eight rows are a tile: the columns of a tensor-core
// product whose 16 rows are the vectors, or the parts of one vector. Lane 4 g + t has row g of a tile, 16 bytes
// of each 64, so a load of a warp is whole sectors and an operand as it is. DEPTH such loads are on their way at any time, over
// tiles and barriers: a load follows as soon as the one DEPTH before it is in use.
#define SLIM 8  // rows of a tile

template <int FORMAT, int GROUP, int DEPTH>
struct Ring {
  static constexpr int STEPS = FORMAT == INT8 ? 4 : 8;  // of 64 bytes, which are 256 columns of a row
  static constexpr int PIECES = GROUP * STEPS;          // loads of GROUP tiles, which are multiplied side by side
  static_assert(PIECES % DEPTH == 0, "shape of a ring");
  uint4 piece[DEPTH];
  const u8* from;  // the lane's first bytes of the first tile of the group
  i64 stride;      // bytes from one tile of the block to the next
  int row, rows, apart;  // the lane's row of that tile; of the segment; from tile to tile

  DEV_MEMBER void start(const Segment& s, int cg) {
    const int lane = threadIdx.x % WARP;
    row = (int)blockIdx.x * SLIM + lane / 4, rows = (int)s.rows, apart = (int)gridDim.x * SLIM;
    stride = apart * s.stride;
    from = (const u8*)s.data + row * s.stride + cg * (STEPS * 64) + lane % 4 * 16;
#pragma unroll
    for (int n = 0; n < DEPTH; ++n) piece[n] = load(n);
  }
  // Piece n of the group, or of the next: step by step, in each the tiles of the group.
  DEV_MEMBER uint4 load(int n) const {
    const int tile = n / PIECES * GROUP + n % GROUP, step = n % PIECES / GROUP;
    return row + tile * apart < rows ? load_weights(from + tile * stride + step * 64) : uint4{0, 0, 0, 0};
  }
  // multiply(step, w, acc) for the tiles of the group, then put(tile of the group, acc) for each; and on to the next.
  template <typename Sum, typename Multiply, typename Put>
  DEV_MEMBER void group(Multiply multiply, Put put) {
    Sum acc[GROUP][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      uint4 w[GROUP];
#pragma unroll
      for (int q = 0; q < GROUP; ++q) {
        const int n = step * GROUP + q;
        w[q] = piece[n % DEPTH];
        piece[n % DEPTH] = load(n + DEPTH);
      }
      multiply(step, w, acc);
    }
#pragma unroll
    for (int q = 0; q < GROUP; ++q) put(q, acc[q]);
    from += GROUP * stride;
    row += GROUP * apart;
  }
};

// acc += the vectors, hi in its first eight rows and lo in the others, times 16 bytes of eight rows.
template <int FORMAT>
DEV void multiply_floats(float (&acc)[4], const uint4& hi, const uint4& lo, const uint4& w) {
  if (FORMAT == BF16) {
    mma_bf16(acc, hi.x, lo.x, hi.y, lo.y, w.x, w.y);
    mma_bf16(acc, hi.z, lo.z, hi.w, lo.w, w.z, w.w);
  } else {
    mma_f16(acc, hi.x, lo.x, hi.y, lo.y, w.x, w.y);
    mma_f16(acc, hi.z, lo.z, hi.w, lo.w, w.z, w.w);
  }
}
DEV u32 pack_bfloats(float lo, float hi) { return (u32)float_to_bfloat(lo) | (u32)float_to_bfloat(hi) << 16; }
