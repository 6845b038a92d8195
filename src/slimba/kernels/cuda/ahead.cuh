// What later kernels of a step will read, asked for ahead: weights come from memory once a token, and a kernel of two
// microseconds that asked for its own would wait as long for them. Each kernel asks for what its like in the next layer reads, so
// that it lies in the L2 cache by then; three kernels are between.
template <typename T>
struct Then : T {
  i64 ahead, ahead_lines;  // lines of 128 bytes
};
struct QuickRecurrence : Recurrence {
  i64 ahead, ahead_lines, layers;
};

DEV void fetch_ahead(i64 from, i64 lines) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < (int)lines; i += gridDim.x * blockDim.x)
    prefetch_far((const u8*)from + i * 128);
}

// The state of the next layer's like block, and the u that are kept there since it was stored.
DEV void fetch_state_ahead(const QuickRecurrence& p) {
  StateRef s = p.state;
  if (++s.layer >= p.layers) return;
  const int inner = (int)p.inner, n = (int)p.d_state, per_sequence = inner / (int)p.span, unit = blockIdx.x;
  const int b = unit / per_sequence, first = unit % per_sequence * (int)p.span;
  const int entry = p.state_type == STATE_F32 ? 4 : p.state_type == STATE_BF16 ? 2 : 1, kept_entry = entry < 4 ? 2 : 4;
  const i64 slot = slot_of(s, b);
  const u8* rows = (const u8*)state_array(s, 0) + ((s.layer * state_array(s, 4) + slot) * inner + first) * n * entry;
  for (int i = threadIdx.x; i < (int)p.span * n * entry / 128; i += blockDim.x) prefetch_far(rows + i * 128);
  const Kept kept = kept_of(s, p.state_type, slot, inner, p.groups * n, p.heads);
  const int token = threadIdx.x;
  if (token < (int)position(s, slot) % KEPT) prefetch_far((const u8*)kept.u + ((i64)token * inner + first) * kept_entry);
}
