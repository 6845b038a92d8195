// Activations to int8, for AVX2 and AVX-512. The sums are exact, so the order of their additions is free.
#pragma once

#include "lanes.h"

namespace slimba {
namespace {

void quantize(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sums) {
  vf top = vzero(), poison = vzero();  // x - x is NaN for NaN and infinity, else 0
  int64_t whole = 0;
  for (; whole + W <= n; whole += W) {
    const vf v = vload(x + whole);
    top = vmax(top, vabs(v));
    poison = vadd(poison, vsub(v, v));
  }
  if (whole < n) {
    const vf v = vload_n(x + whole, n - whole);
    top = vmax(top, vabs(v));
    poison = vadd(poison, vsub(v, v));
  }
  const float most = max_lane(top);
  const bool damaged = any_nan(poison), zero = damaged || most < 1e-30f;
  *scale = damaged ? __builtin_nanf("") : zero ? 0.0f : most / 127.0f;
  const int64_t groups = groups_of(n), end = round_up(n, 64);
  if (zero) {
    for (int64_t i = 0; i < end; ++i) q[i] = 0;
    for (int64_t g = 0; g <= groups; ++g) sums[g] = 0;
    return;
  }
  const vf inverse = vset(127.0f / most);
  for (int64_t i = 0; i < whole; i += W) store_bytes(q + i, vround(vmul(vload(x + i), inverse)));
  for (int64_t i = whole; i < end; i += W)
    store_bytes(q + i, vround(vmul(i < n ? vload_n(x + i, n - i) : vzero(), inverse)));
  int32_t total = 0;
  for (int64_t g = 0; g < groups; ++g) {
    vi sum = izero();
    for (int64_t i = g * kGroup; i < min64((g + 1) * kGroup, end); i += 4 * W) {
      if (i + 4 * W <= end) sum = dot4(sum, ibytes(1), iload(q + i));
    }
    alignas(64) int32_t lane[W];
    istore(lane, sum);
    int32_t s = 0;
    for (int k = 0; k < W; ++k) s += lane[k];
    sums[g] = s;
    total += s;
  }
  sums[groups] = total;
}

}  // namespace
}  // namespace slimba
