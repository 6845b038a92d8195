// Decoding one sequence: the whole step of decode.cu as one kernel, with barriers of the whole grid in place of launches.
// Its blocks must all be resident at once. `arrived` must be 0 at the start.

// `products`: in_proj and out_proj of every layer, then the head.
struct Persistent {
  Embed embed;
  i64 layers, products, recurrences, arrived;
};

// Copies a description to shared memory, where reading it costs nothing.
template <typename P>
DEV void fetch(const P* from, P* to) {
  __syncthreads();  // a slower warp may still be reading the one before
  for (int i = threadIdx.x; i < (int)(sizeof(P) / 8); i += THREADS) ((i64*)to)[i] = ((const i64*)from)[i];
  __syncthreads();
}

DEV void persistent(const Persistent& p, u8* smem) {
  Product* product1 = (Product*)smem;
  Recurrence* recurrence = (Recurrence*)(smem + sizeof(Product));
  u8* work = smem + (sizeof(Product) + sizeof(Recurrence) + 15) / 16 * 16;
  const int block = blockIdx.x, blocks = gridDim.x;
  u32 target = 0;
  auto barrier = [&] { grid_barrier((u32*)p.arrived, target, blocks); };
  const Product* products = (const Product*)p.products;
  embed(p.embed, block, blocks);
  for (int layer = 0; layer <= (int)p.layers; ++layer) {
    fetch(products + 2 * layer, product1);
    product<1>(*product1, work, 0, block, blocks, barrier);
    if (layer == (int)p.layers) return;
    fetch((const Recurrence*)p.recurrences + layer, recurrence);
    if (recurrence->d_state == 128) recur<1, true>(*recurrence, work, block, blocks, barrier);
    else recur<2, false>(*recurrence, work, block, blocks, barrier);
    fetch(products + 2 * layer + 1, product1);
    product<1>(*product1, work, 0, block, blocks, barrier);
  }
}

KERNEL(slimba_persistent, Persistent, THREADS) {
  SHARED(smem);
  persistent(p, smem);
}
