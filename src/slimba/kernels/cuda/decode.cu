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
    return half_bits_to_float(((const u16*)s.scale)[row * s.groups + c / 128]) * (float)(code - 8);
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
};

// One block a sequence. out[b][count[b]++] = ids[b] = the lowest id among the largest logits; -2 where one is not finite.
DEV void argmax(const Argmax& p, float* best_value, i32* best_id) {
  const int b = blockIdx.x, t = threadIdx.x;
  const float* x = (const float*)p.logits + b * p.stride;
  float best = -bits_to_float(INF_BITS);
  i32 id = 0x7fffffff;
  bool bad = false;
  constexpr int AHEAD = 8;  // loads in flight
  const int n = *(const i32*)p.n_valid;
  for (int i = t; i < n; i += AHEAD * (int)blockDim.x) {
    float v[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int at = i + k * (int)blockDim.x;
      v[k] = at < n ? load_fresh(x + at) : best;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      bad |= i + k * (int)blockDim.x < n && (float_to_bits(v[k]) & 0x7fffffffu) >= INF_BITS;
      if (v[k] > best) {
        best = v[k];
        id = i + k * (int)blockDim.x;
      }
    }
  }
  best_value[t] = best;
  best_id[t] = bad ? -2 : id;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (t < half) {
      const float other = best_value[t + half];
      const i32 other_id = best_id[t + half];
      if (best_id[t] == -2 || other_id == -2) best_id[t] = -2;
      else if (other > best_value[t] || (other == best_value[t] && other_id < best_id[t])) {
        best_value[t] = other;
        best_id[t] = other_id;
      }
    }
    __syncthreads();
  }
  if (t) return;
  const i32 chosen = best_id[0];
  ((i32*)p.ids)[b] = chosen < 0 ? 0 : chosen;
  i32* count = (i32*)p.count + b;
  ((i32*)p.out)[b * p.out_stride + (*count)++] = chosen;
  ++((i32*)state_array(p.state, 3))[slot_of(p.state, b)];
}

KERNEL(slimba_argmax, Argmax, 1024) {
  SHARED(smem);
  await_previous();
  release_next();
  argmax(p, (float*)smem, (i32*)(smem + 4096));
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
