// The kernels of mid_norm.cu, mid.cu and batch.cu for any shape, described at run time; cuda_bake.py makes those of a model.

KERNEL(slimba_scatter, Scatter, THREADS) { scatter(p); }

KERNEL(slimba_mid_norm, MidNorm, THREADS) {
  SHARED(smem);
  mid_norm(p, smem);
}

#define MID(NT, R, S) \
  KERNEL(slimba_mid_##NT##_##R##_##S, Mid, THREADS, 2) { \
    SHARED(smem); \
    mid<NT, R, S>(p, smem); \
  }
#define MIDS(NT) MID(NT, 1, 4) MID(NT, 1, 2) MID(NT, 1, 1) MID(NT, 2, 1)
MIDS(1)
MIDS(2)
MIDS(4)

KERNEL(slimba_prepare, BatchRecurrence, THREADS) {
  SHARED(smem);
  prepare(p, smem);
}
#define STATES(TYPE, N, FIT) \
  KERNEL(slimba_states_##TYPE##_##N, BatchRecurrence, THREADS, FIT) { \
    SHARED(smem); \
    states<TYPE, N>(p, *(StatesShared<N>*)smem); \
  }
STATES(0, 64, 2) STATES(0, 128, 2) STATES(1, 64, 2) STATES(1, 128, 2) STATES(2, 64, 3) STATES(2, 128, 3)
