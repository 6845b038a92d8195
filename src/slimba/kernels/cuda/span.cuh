// What the recurrences over many tokens share: their arguments, and how tokens lie to the writings of a state.
// How a call of `length` tokens lies to the writings of the state: `stored` of its tokens are in the state when it ends, or
// none is written; the others are kept, from place `at` of the buffer on.
struct Span {
  int before, stored, at;  // before: tokens that were kept when the call began
};
DEV Span span_of(int time, i64 length) {
  const int before = time % KEPT, end = (int)((before + length) / KEPT) * KEPT;
  return end ? Span{before, end - before, 0} : Span{before, 0, before};
}

// The largest |v| of row k of a state of which four lanes have two entries a tile each; infinity where one is not finite. entry(j, i): the
// lane's i-th of tile j, row k has those from 2 k on.
template <int TILES, typename Entry>
DEV float largest_of_row(int k, Entry entry) {
  float most = 0;
  bool bad = false;
#pragma unroll
  for (int j = 0; j < TILES; ++j)
    for (int e = 0; e < 2; ++e) {
      const float v = fabsf(entry(j, 2 * k + e));
      bad |= float_to_bits(v) >= INF_BITS;
      most = fmaxf(most, v);
    }
  if (bad) most = bits_to_float(INF_BITS);
  most = fmaxf(most, shuffle_xor(most, 1));
  return fmaxf(most, shuffle_xor(most, 2));
}

// Mamba-2's recurrence over many tokens.
struct Scan {
  StateRef state;
  i64 batch, length, heads, headdim, d_state, groups, inner, span, state_type, d_per_channel;
  i64 a, d, dt_bias;                          // float32
  i64 xbc, xbc_stride, dt, dt_stride, y, y_stride;  // x | B | C after the convolution; dt float32, before its bias
  i64 dt_low, dt_high;
};

// A value as it is after being stored and opened again.
DEV float rounded(i64 type, float v, const Int8Scale& code) {
  if (type == STATE_BF16) return bfloat_to_float(float_to_bfloat(v));
  if (type == STATE_INT8) return code.step * (float)__float2int_rn(v * code.to_code);
  return v;
}

// Eight kept values as halves.
DEV uint4 kept_octet(const Kept& k, i64 array, i64 i) {
  u32 two[4];
  for (int c = 0; c < 4; ++c) two[c] = pack_halves(kept_value(k, array, i + 2 * c), kept_value(k, array, i + 2 * c + 1));
  return uint4{two[0], two[1], two[2], two[3]};
}

// Of the chunked ones: tokens of a chunk, headdim.
#define CHUNK 64
#define HEAD 64
#define MIXER_LEAST 1e-30f  // added to mean squares of a head (mixer.cu)
