// The kernels of decode.cu for any shape, described at run time.

KERNEL(slimba_product_1, Product, THREADS, 2) {
  SHARED(smem);
  product<1>(p, smem, 0, blockIdx.x, gridDim.x, InOrder());
}
KERNEL(slimba_product_8, Product, THREADS) {
  SHARED(smem);
  product<8>(p, smem, 8 * blockIdx.y, blockIdx.x, gridDim.x, InOrder());
}

KERNEL(slimba_recur_1, Recurrence, THREADS) {
  SHARED(smem);
  recur<1, false>(p, smem, blockIdx.x, gridDim.x, InOrder());
}
KERNEL(slimba_recur_quad, Recurrence, THREADS) {
  SHARED(smem);
  recur<1, true>(p, smem, blockIdx.x, gridDim.x, InOrder());
}
KERNEL(slimba_recur_2, Recurrence, THREADS) {
  SHARED(smem);
  recur<2, false>(p, smem, blockIdx.x, gridDim.x, InOrder());
}
