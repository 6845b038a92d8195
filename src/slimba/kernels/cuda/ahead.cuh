// A product that also asks the L2 cache for memory that a later kernel of the same step reads.
template <typename T>
struct Then : T {
  i64 ahead, ahead_lines;  // lines of 128 bytes
};
DEV void fetch_ahead(i64 from, i64 lines) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < (int)lines; i += gridDim.x * blockDim.x)
    prefetch_far((const u8*)from + i * 128);
}
