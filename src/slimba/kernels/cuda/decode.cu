// Decoding a small batch: the kernels of one step, three a layer, launched one after another in a CUDA graph.
//
// slimba_embed -> (product in_proj, recur, product out_proj) * layers -> product head -> slimba_argmax
// The products and recurrences of a model are kernels of their own, in which its shape is a constant
// (runtime/backends/cuda_bake.py); those for any shape are in generic.cu.

struct Embed {
  Matrix m;
  StateRef state;
  i64 batch, ids, u;  // ids int32 [B]; u float32 [B, D]
};

// What a kernel of a sequence does before it reads what the one before wrote.
struct InOrder {
  DEV_MEMBER void operator()() const {
    await_previous();
    release_next();
  }
};

struct AtOnce {  // of a kernel that has let the next one begin before anything else
  DEV_MEMBER void operator()() const { await_previous(); }
};
struct Early {  // lets the kernel after begin sooner
  DEV_MEMBER void operator()() const {
    release_next();
    await_previous();
  }
};

DEV float embedding_entry(const Matrix& m, i64 row, i64 c) {
  const Segment& s = m.segment[0];
  const u8* at = (const u8*)s.data + row * s.stride;
  if (s.format == F32) return ((const float*)at)[c];
  if (s.format == F16) return half_bits_to_float(((const u16*)at)[c]);
  if (s.format == BF16) return bfloat_to_float(((const u16*)at)[c]);
  const i64 word = (c >> 5) * 8 + (c & 7), byte = (c >> 3) & 3;  // the order of matrix.cuh
  if (s.format == INT8) return half_bits_to_float(((const u16*)s.scale)[row]) * (float)(i8)at[word * 4 + byte];
  if (s.format == INT4) {
    const int code = at[(word >> 1) * 4 + byte] >> (word & 1) * 4 & 15;
    return half_bits_to_float(((const u16*)s.scale)[row * s.groups + c / 128]) * (float)((code ^ 8) - 8);
  }
  const float scale = half_bits_to_float(((const u16*)s.scale)[row]);
  return at[c >> 3] >> (c & 7) & 1 ? scale : -scale;
}

DEV void embed(const Embed& p, int block, int blocks) {
  for (i64 i = (i64)block * THREADS + threadIdx.x; i < p.batch * p.m.cols; i += (i64)blocks * THREADS) {
    const i64 b = i / p.m.cols, c = i % p.m.cols;
    ((float*)p.u)[i] = embedding_entry(p.m, ((const i32*)p.ids)[b], c);
  }
}

KERNEL(slimba_embed, Embed, THREADS) {
  await_previous();
  release_next();
  embed(p, blockIdx.x, gridDim.x);
}

// Greedy choice for every sequence, fed back as the next id; the position of every sequence moves on by one.
struct Argmax {
  StateRef state;
  i64 batch, logits, stride, n_valid, ids, out, out_stride, count;  // n_valid: where the number of ids is that may be chosen
  i64 keys, tickets;  // u64 [B][blocks of a sequence], u32 [B], 0 between launches
};

// Larger for larger logits and, among equals, for lower ids; largest of all where a logit is not finite.
DEV u64 choice_key(float v, int id) {
  const u32 bits = float_to_bits(v);
  if ((bits & 0x7fffffffu) >= INF_BITS) return ~0ull;
  const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (u64)ordered << 32 | (0x7fffffffu - (u32)id);
}
DEV u64 largest_of_warp(u64 key) {
  for (int by = 16; by; by /= 2) {
    const u64 other = shuffle_xor(key, by);
    key = other > key ? other : key;
  }
  return key;
}
template <int W>
DEV u64 largest_key(u64 key, u64* scratch) {  // of a block of W warps, in thread 0
  key = largest_of_warp(key);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = key;
  __syncthreads();
  for (int w = 0; threadIdx.x == 0 && w < W; ++w) key = scratch[w] > key ? scratch[w] : key;
  return key;
}

DEV u64 largest_of_blocks(const u64* keys, int blocks) {  // by one warp
  u64 key = 0;
  for (int i = threadIdx.x; i < blocks; i += WARP) {
    const u64 other = load_fresh(keys + i);
    key = other > key ? other : key;
  }
  return largest_of_warp(key);
}
DEV i32 key_id(u64 key) { return (i32)(0x7fffffffu - (u32)key); }
// The choice of sequence b for who reads it, by one thread. Returns the next id.
DEV i32 record_choice(const Argmax& p, int b, u64 key) {
  const i32 chosen = key == ~0ull ? -2 : key_id(key), id = chosen < 0 ? 0 : chosen;
  *((u32*)p.tickets + b) = 0;
  ((i32*)p.ids)[b] = id;
  i32* count = (i32*)p.count + b;
  ((i32*)p.out)[b * p.out_stride + (*count)++] = chosen;
  return id;
}

// Grid: parts of the logits, sequences. The last block of a sequence: out[b][count[b]++] = ids[b] = the lowest id among
// the largest logits; -2 where one is not finite.
DEV void argmax(const Argmax& p, u64* scratch) {
  const int b = blockIdx.y, parts = gridDim.x, n = *(const i32*)p.n_valid, each = (n + parts - 1) / parts;
  const int first = (int)blockIdx.x * each, stop = first + each < n ? first + each : n;
  const float* x = (const float*)p.logits + b * p.stride;
  u64 key = 0;
#pragma unroll 8
  for (int i = first + threadIdx.x; i < stop; i += THREADS) {
    const u64 one = choice_key(load_fresh(x + i), i);
    key = one > key ? one : key;
  }
  key = largest_key<WARPS>(key, scratch);
  if (threadIdx.x >= WARP) return;
  u64* keys = (u64*)p.keys + (i64)b * parts;
  int last = 0;
  if (threadIdx.x == 0) {
    store_fresh(keys + blockIdx.x, key);
    last = take_ticket((u32*)p.tickets + b) == (u32)parts - 1;
  }
  if (!warp_sum(last)) return;
  key = largest_of_blocks(keys, parts);
  if (threadIdx.x) return;
  record_choice(p, b, key);
  ++((i32*)state_array(p.state, 3))[slot_of(p.state, b)];
}

KERNEL(slimba_argmax, Argmax, THREADS) {
  SHARED(smem);
  await_previous();
  release_next();
  argmax(p, (u64*)smem);
}

// Moves the positions of the sequences on by `tokens`.
struct Advance {
  StateRef state;
  i64 batch, tokens;
};
KERNEL(slimba_advance, Advance, THREADS) {
  await_previous();
  release_next();
  const i64 b = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (b < p.batch) ((i32*)state_array(p.state, 3))[slot_of(p.state, (int)b)] += (i32)p.tokens;
}
