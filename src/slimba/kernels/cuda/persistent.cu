// Decoding one sequence: the whole step of decode.cu as one kernel, with barriers of the whole grid in place of launches.
// Its blocks must all be resident at once. `arrived` must be 0 at the start.

// `products`: in_proj and out_proj of every layer, then the head.
struct Persistent {
  Embed embed;
  i64 layers, products, recurrences, arrived;
};

// Copies a description to shared memory, to be read after a barrier.
template <typename P>
DEV void fetch(const P* from, P* to) {
  for (int i = threadIdx.x; i < (int)(sizeof(P) / 8); i += THREADS) ((i64*)to)[i] = ((const i64*)from)[i];
}

// The last arguments overwrite what is known at compile time (runtime/backends/cuda_bake.py). Descriptions are fetched a
// phase ahead, and each thread copies them before it passes the phase's first barrier, so that they may be fetched over.
template <int VEC, bool QUAD, typename In, typename Recur, typename Out, typename Head>
DEV void persistent(const Persistent& p, u8* smem, In fix_in, Recur fix_recur, Out fix_out, Head fix_head) {
  Product *shared_in = (Product*)smem, *shared_out = shared_in + 1;
  Recurrence* shared_recur = (Recurrence*)(smem + 2 * sizeof(Product));
  u8* work = smem + (2 * sizeof(Product) + sizeof(Recurrence) + 15) / 16 * 16;
  const int block = blockIdx.x, blocks = gridDim.x;
  u32 target = 0;
  auto barrier = [&] { grid_barrier((u32*)p.arrived, target, blocks); };
  const Product* products = (const Product*)p.products;
  fetch(products, shared_in);
  embed(p.embed, block, blocks);
  __syncthreads();
#pragma unroll 1
  for (int layer = 0; layer < (int)p.layers; ++layer) {
    fetch((const Recurrence*)p.recurrences + layer, shared_recur);
    fetch(products + 2 * layer + 1, shared_out);
    Product in = *shared_in;
    fix_in(in);
    product<1>(in, work, 0, block, blocks, barrier);
    Recurrence r = *shared_recur;
    fix_recur(r);
    recur<VEC, QUAD>(r, work, block, blocks, barrier);
    fetch(products + 2 * layer + 2, shared_in);
    Product out = *shared_out;
    fix_out(out);
    product<1>(out, work, 0, block, blocks, barrier);
  }
  Product head = *shared_in;
  fix_head(head);
  product<1>(head, work, 0, block, blocks, barrier);
}
