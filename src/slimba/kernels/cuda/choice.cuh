// The last product of a step that also chooses: the greedy choice of slimba_argmax and the work of slimba_embed for the next step, by
// the block that finishes last, for one sequence. The logits need not be read again and two launches are not waited for.
//
// Naive twins: `sample` in runtime/sampling.py and a row of the embedding. Tests: tests/runtime/test_cuda_engine.py and test_cuda_codes.py.
struct Head {
  Product p;
  Argmax choice;  // with keys 0 nothing is chosen; n_valid, state and batch 1 as in slimba_argmax
  Embed next;
};

// What the kernels after this one read before their wait, the sequence's position alone, must be there when they are let in.
struct HeadOrder {
  const Head& s;
  DEV_MEMBER void operator()() const {
    i32* at = nullptr;
    i32 next = 0;
    if (!s.choice.keys) {
      release_next();
    } else if (blockIdx.x == 0 && threadIdx.x == 0) {
      at = (i32*)state_array(s.choice.state, 3) + slot_of(s.choice.state, 0);
      next = *at + 1;
    }
    await_previous();
    if (!s.choice.keys || threadIdx.x) return;
    if (at) *at = next, seen_by_all();
    release_next();
  }
};

struct Unchosen {  // what becomes of the rows of other products
  DEV_MEMBER void operator()(int, float) const {}
};
// The largest key of the rows that a thread finishes.
struct Choosing {
  int valid;
  u64 key = 0;
  DEV_MEMBER void operator()(int row, float y) {
    const u64 one = row < valid ? choice_key(y, row) : 0;
    key = one > key ? one : key;
  }
};

// W: warps of the block, all of which come here; scratch: shared memory for W + 1 keys, of which nothing is read any more.
template <int W>
DEV void choose(const Head& s, u64 key, u64* scratch) {
  const Argmax& p = s.choice;
  __syncthreads();
  key = largest_key<W>(key, scratch);
  u64* keys = (u64*)p.keys;
  if (threadIdx.x == 0) {
    store_fresh(keys + blockIdx.x, key);
    scratch[W] = take_ticket((u32*)p.tickets) == gridDim.x - 1;
  }
  __syncthreads();
  if (!scratch[W]) return;
  if (threadIdx.x < WARP) {
    key = largest_of_blocks(keys, (int)gridDim.x);
    if (threadIdx.x == 0) scratch[0] = (u64)record_choice(p, 0, key);
  }
  __syncthreads();
  const i32 id = (i32)scratch[0];
  float* u = (float*)s.next.u;
  for (int c = threadIdx.x; c < (int)s.next.m.cols; c += W * WARP) u[c] = embedding_entry(s.next.m, id, c);
}
