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
  key = largest_of_warp(key);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = key;
  __syncthreads();
  u64* keys = (u64*)p.keys;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < W; ++w) key = scratch[w] > key ? scratch[w] : key;
    store_fresh(keys + blockIdx.x, key);
    scratch[W] = take_ticket((u32*)p.tickets) == gridDim.x - 1;
  }
  __syncthreads();
  if (!scratch[W]) return;
  if (threadIdx.x < WARP) {
    i32* count = (i32*)p.count;
    const i32 token = *count;
    key = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < (int)gridDim.x; i += WARP) {
      const u64 other = load_fresh(keys + i);
      key = other > key ? other : key;
    }
    key = largest_of_warp(key);
    if (threadIdx.x == 0) {
      const i32 chosen = key == ~0ull ? -2 : (i32)(0x7fffffffu - (u32)key), id = chosen < 0 ? 0 : chosen;
      scratch[0] = (u64)id;
      *(u32*)p.tickets = 0;
      *(i32*)p.ids = id;
      ((i32*)p.out)[token] = chosen;
      *count = token + 1;
    }
  }
  __syncthreads();
  const i32 id = (i32)scratch[0];
  float* u = (float*)s.next.u;
  for (int c = threadIdx.x; c < (int)s.next.m.cols; c += W * WARP) u[c] = embedding_entry(s.next.m, id, c);
}
