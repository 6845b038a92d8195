// Rows of float16, bfloat16 or int8 that pass through registers, times a few vectors in shared memory.
//
// A warp owns 256 columns and multiplies all rows of the block by them. Eight rows are a tile: the columns of a tensor-core
// product whose 16 rows are the vectors, or the parts of one vector. Lane 4 g + t has row g of a tile, 16 bytes
// of each 64, so a load of a warp is whole sectors and an operand as it is. DEPTH such loads are on their way at any time, over
// tiles and barriers: a load follows as soon as the one DEPTH before it has been multiplied.
#define SLIM 8  // rows of a tile

template <int FORMAT, int TILES, int DEPTH, int LOOP>
struct Ring {
  static constexpr int STEPS = FORMAT == INT8 ? 4 : 8;  // of 64 bytes, which are 256 columns of a row
  static constexpr int PAIR = TILES > 1 ? 2 : 1;        // tiles that are multiplied by the same piece of the vectors
  static constexpr int PIECES = TILES * STEPS;          // loads of a round
  static_assert(TILES % PAIR == 0 && DEPTH <= PIECES && (!LOOP || PIECES % DEPTH == 0), "shape of a ring");
  uint4 piece[DEPTH];
  const u8* from;  // the lane's first bytes of the block's first tile
  i64 stride;      // bytes from one tile of the block to the next
  int row, rows, apart;  // the lane's row of the block's first tile; of the segment; from tile to tile

  DEV_MEMBER void start(const Segment& s, int cg) {
    const int lane = threadIdx.x % WARP;
    row = (int)blockIdx.x * SLIM + lane / 4, rows = (int)s.rows, apart = (int)gridDim.x * SLIM;
    stride = apart * s.stride;
    from = (const u8*)s.data + row * s.stride + cg * (STEPS * 64) + lane % 4 * 16;
#pragma unroll
    for (int n = 0; n < DEPTH; ++n) piece[n] = load(0, n);
  }
  // Piece n of a round: of pairs of tiles, their steps, the tiles of the pair.
  DEV_MEMBER uint4 load(int round, int n) const {
    const int tile = round * TILES + n / (PAIR * STEPS) * PAIR + n % PAIR, step = n / PAIR % STEPS;
    return row + tile * apart < rows ? load_weights(from + tile * stride + step * 64) : uint4{0, 0, 0, 0};
  }
  DEV_MEMBER uint4 take(int round, int n) {
    const uint4 out = piece[n % DEPTH];
    if (n + DEPTH < PIECES) piece[n % DEPTH] = load(round, n + DEPTH);
    else if (LOOP) piece[n % DEPTH] = load(round + 1, n + DEPTH - PIECES);
    return out;
  }
  // All tiles of a round: multiply(step, w, acc) for each pair, then put(tile of the block, acc) for each tile.
  template <typename Sum, typename Multiply, typename Put>
  DEV_MEMBER void round_of(int round, Multiply multiply, Put put) {
#pragma unroll
    for (int i = 0; i < TILES; i += PAIR) {
      Sum acc[PAIR][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        uint4 w[PAIR];
#pragma unroll
        for (int q = 0; q < PAIR; ++q) w[q] = take(round, i * STEPS + step * PAIR + q);
        multiply(step, w, acc);
      }
#pragma unroll
      for (int q = 0; q < PAIR; ++q) put(i + q, acc[q]);
    }
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
