// One token from the logits of each sequence, as SamplingParams in runtime/engine.py lays it down, without a repetition penalty.
//
// Naive twin: `sample` in runtime/sampling.py. Tests: tests/kernels/test_cuda_sample.py. Probabilities and their sums are
// float64, sums in a fixed order. The CANDIDATES most likely ids are sorted; where the draw falls among the others, as it
// may with hardly a preference among ids, the result is ASK: the caller then samples this token with the twin.
#define CANDIDATES 4096
#define SAMPLE_THREADS 1024
#define EACH (CANDIDATES / SAMPLE_THREADS)
#define BINS 2048  // of 1/64 below the largest logit, in units of the temperature
#define ASK (-3)

struct SampleSettings {  // of a sequence
  double temperature, top_p, min_p;
  u64 seed;
  i64 top_k, sequence, first;  // sequence: its number in the draws; first: the number of its next token when count is 0
};
struct Sample {
  StateRef state;
  i64 batch, logits, stride, n_valid, ids, out, out_stride, count, settings;  // as in Argmax; SampleSettings [B]
};
struct SampleShared {
  u64 key[CANDIDATES];
  double sum[SAMPLE_THREADS];
  u32 bin[BINS], taken, kept[2], limit;
  u64 warp_key[SAMPLE_THREADS / WARP];
  double total;
};

// One output of SplitMix64 (Steele, Lea and Flood 2014) in [0, 1): `uniform` in runtime/sampling.py.
DEV double sample_uniform(u64 seed, u64 b, u64 i) {
  u64 z = seed + 0x9E3779B97F4A7C15ull * (1 + i + (b << 32));
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return (double)(z >> 11) * 1.1102230246251565e-16;
}
DEV float key_logit(u64 key) {
  const u32 ordered = (u32)(key >> 32);
  return bits_to_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
// Sum over the block in a fixed order; every thread gets it. Ends with a barrier.
DEV double sample_sum(double v, double* scratch) {
  __syncthreads();
  scratch[threadIdx.x] = v;
  __syncthreads();
  for (int half = SAMPLE_THREADS / 2; half; half /= 2) {
    if ((int)threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  v = scratch[0];
  __syncthreads();
  return v;
}

// The id, -2 where a logit is not finite, or ASK; in thread 0.
DEV i32 sample_one(const float* x, int n, const SampleSettings& s, u64 token, SampleShared& m) {
  const int t = threadIdx.x, lane = t % WARP;
  u64 top_key = 0;
#pragma unroll 4
  for (int i = t; i < n; i += SAMPLE_THREADS) {
    const u64 key = choice_key(load_fresh(x + i), i);
    top_key = key > top_key ? key : top_key;
  }
  top_key = largest_of_warp(top_key);
  if (lane == 0) m.warp_key[t / WARP] = top_key;
  for (int i = t; i < BINS; i += SAMPLE_THREADS) m.bin[i] = 0;
  for (int i = t; i < CANDIDATES; i += SAMPLE_THREADS) m.key[i] = 0;
  if (t == 0) m.taken = 0, m.kept[0] = 0, m.kept[1] = 0, m.limit = 0;
  __syncthreads();
  for (int w = 0; w < SAMPLE_THREADS / WARP; ++w) top_key = m.warp_key[w] > top_key ? m.warp_key[w] : top_key;
  if (top_key == ~0ull) return -2;
  if (s.temperature == 0) return key_id(top_key);

  const double top = (double)key_logit(top_key) / s.temperature;
  const float per_bin = (float)(64.0 / s.temperature);
  auto bin_of = [&](float v) {
    const float d = (key_logit(top_key) - v) * per_bin;
    return d < (float)(BINS - 1) ? (int)d : BINS - 1;
  };
  double all = 0;
  for (int i = t; i < n; i += SAMPLE_THREADS) {
    const float v = load_fresh(x + i);
    all += exp((double)v / s.temperature - top);
    add_shared(m.bin + bin_of(v), 1u);
  }
  all = sample_sum(all, m.sum);
  if (t == 0) {  // the first bins that are not more than CANDIDATES together
    u32 count = 0, bin = 0;
    while (bin < BINS - 1 && count + m.bin[bin] <= CANDIDATES) count += m.bin[bin++];
    if (bin == BINS - 1 && count + m.bin[bin] <= CANDIDATES) ++bin;  // all of them
    m.limit = bin;
  }
  __syncthreads();
  for (int i = t; i < n; i += SAMPLE_THREADS) {
    const float v = load_fresh(x + i);
    if (bin_of(v) < (int)m.limit) m.key[add_shared(&m.taken, 1u)] = choice_key(v, i);
  }
  __syncthreads();
  const int count = (int)m.taken;
  int size = 1;
  while (size < count) size *= 2;
  for (int k = 2; k <= size; k *= 2)  // bitonic, largest first; the places beyond count hold 0
    for (int j = k / 2; j; j /= 2) {
      for (int i = t; i < size; i += SAMPLE_THREADS) {
        const int other = i ^ j;
        const u64 a = m.key[i], b = m.key[other];
        if (other > i && ((i & k) == 0 ? a < b : a > b)) m.key[i] = b, m.key[other] = a;
      }
      __syncthreads();
    }

  double p[EACH], cumulative[EACH], own = 0;
  for (int k = 0; k < EACH; ++k) {
    const int r = t * EACH + k;
    p[k] = r < count ? exp((double)key_logit(m.key[r]) / s.temperature - top) : 0.0;
    own += p[k];
    cumulative[k] = own;
  }
  m.sum[t] = own;
  __syncthreads();
  for (int by = 1; by < SAMPLE_THREADS; by *= 2) {
    const double before = t >= by ? m.sum[t - by] : 0.0;
    __syncthreads();
    m.sum[t] += before;
    __syncthreads();
  }
  const double before = t ? m.sum[t - 1] : 0.0;
  for (int k = 0; k < EACH; ++k) cumulative[k] += before;

  const bool cut = s.top_k > 0 && s.top_k < n;
  if (cut && s.top_k > count) return ASK;
  auto at = [&](int r) {  // cumulative sum of rank r, for every thread
    __syncthreads();
    if (t == r / EACH) m.total = cumulative[r % EACH];
    __syncthreads();
    return m.total;
  };
  double total = all;
  if (cut) total = at((int)s.top_k - 1);
  u32 below[2] = {0, 0};  // ranks before top_p is reached; ranks that min_p keeps
  for (int k = 0; k < EACH; ++k) {
    if (t * EACH + k >= count) break;
    below[0] += cumulative[k] / total < s.top_p;
    below[1] += p[k] >= s.min_p;
  }
  for (int k = 0; k < 2; ++k)
    if (below[k]) add_shared(m.kept + k, below[k]);
  __syncthreads();
  i64 keep = cut ? s.top_k : n;
  if (s.top_p < 1) keep = least(keep, (i64)m.kept[0] + 1);
  if (s.min_p > 0 && (int)m.kept[1] < count) keep = least(keep, m.kept[1]);
  const bool whole = keep >= n;
  if (!whole && (keep > count || (s.min_p > 0 && (int)m.kept[1] == count && count < n))) return ASK;
  const double mass = whole ? all : at((int)keep - 1), draw = sample_uniform(s.seed, (u64)s.sequence, token) * mass;
  __syncthreads();
  if (t == 0) m.taken = 0;
  __syncthreads();
  u32 passed = 0;
  for (int k = 0; k < EACH; ++k) passed += t * EACH + k < count && cumulative[k] <= draw;
  if (passed) add_shared(&m.taken, passed);
  __syncthreads();
  const i64 rank = least((i64)m.taken, keep - 1);
  return rank < count ? key_id(m.key[rank]) : ASK;
}

KERNEL(slimba_sample, Sample, SAMPLE_THREADS) {
  SHARED(smem);
  await_previous();
  release_next();
  const int b = blockIdx.x;
  const SampleSettings s = ((const SampleSettings*)p.settings)[b];
  i32* count = (i32*)p.count + b;
  const i32 token = *count;
  const i32 chosen =
      sample_one((const float*)p.logits + b * p.stride, *(const i32*)p.n_valid, s, (u64)(s.first + token), *(SampleShared*)smem);
  if (threadIdx.x) return;
  ((i32*)p.ids)[b] = chosen < 0 ? 0 : chosen;
  ((i32*)p.out)[b * p.out_stride + token] = chosen;
  *count = token + 1;
  ++((i32*)state_array(p.state, 3))[slot_of(p.state, b)];
}
