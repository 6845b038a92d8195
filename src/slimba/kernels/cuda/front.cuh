// The first two kernels of a layer in one, for one sequence: in_proj as in dot.cuh and the recurrence as in quick.cuh, whose unit of
// 32 channels needs of in_proj its own rows of x, z and dt, which the block computes itself, and all of B and C: these the 16 or 8 blocks of a
// cluster share out among them and write into each other's shared memory. So clusters compute B and C again, and no kernel waits for another in between.
//
// One group of B and C, d_inner / 32 blocks; rows of in_proj in the order z, x, B, C, dt, all signs but dt, which is int8 (cuda_front.py).
// Naive twin: tests/runtime/numpy_reference.py (mixer2). Tests: tests/runtime/test_cuda_engine.py.
struct Front {
  Product p;  // out.mode IN_PROJ; nothing but the ring is written
  Recurrence r;
};

struct FrontShared {
  QuickShared quick;
  float gate[QUICK_SPAN], dt;
};

// A block's tiles: two of x, BC of B and C, two of z; the int8 row is dt of its head.
template <int BC>
struct FrontRows {
  int unit, inner, headdim;
  static constexpr int CLUSTER = 16 / BC;
  DEV_MEMBER int tile(int i) const {
    const int own = unit * (QUICK_SPAN / TILE);
    if (i < 2) return inner / TILE + own + i;
    if (i < 2 + BC) return inner / TILE * 2 + unit % CLUSTER * BC + i - 2;
    return own + i - 2 - BC;
  }
  DEV_MEMBER int code(int) const { return unit * QUICK_SPAN / headdim; }
};

template <int CW, int X, int BC, int P, int PM>
DEV void front(const Front& s, u8* smem) {
  constexpr int TW = 4 + BC, CLUSTER = 16 / BC, K = 4 * (TW * TILE + 1) <= CW * WARP ? 4 : 2;  // K: as in dot.cuh
  typedef DotShared<CW, X, TW, 1, P, 0> Products;
  FrontShared& v = *(FrontShared*)(smem + (sizeof(Products) + 15) / 16 * 16);
  const Recurrence& r = s.r;
  const int unit = blockIdx.x, inner = (int)r.inner, row = (int)threadIdx.x / K, bc = row - QUICK_SPAN;
  const bool of_x = row < QUICK_SPAN, of_bc = !of_x && bc < BC * TILE;
  const int place = unit % CLUSTER * BC * TILE + bc;  // among B and C
  const int channel = of_x ? unit * QUICK_SPAN + row : of_bc ? inner + place : 0;
  cluster_arrive();
  QuickTaps conv;
  const QuickUnit o = quick_open(r, unit, 0, channel, conv);
  auto put = [&](int at, int, float y, float, i64) {
    if (at < QUICK_SPAN + BC * TILE) {
      const float value = silu(fmaf(conv.tap, y, conv.sum));
      if (of_x || unit < CLUSTER) o.newest[channel] = y;
      if (of_x) {
        v.quick.x[at] = value;
      } else {
#pragma unroll
        for (int k = 0; k < CLUSTER; ++k) store_in_cluster(v.quick.b + place, k, value);  // c lies behind b
      }
    } else if (at < TW * TILE) {
      v.gate[at - (QUICK_SPAN + BC * TILE)] = y;
    } else {
      v.dt = y;
    }
  };
  auto ready = [] {
    await_previous();
    cluster_wait();  // the others have begun, so that their shared memory is there
  };
  dot_rows<CW, X, TW, 1, P, PM, 0>(s.p, smem, ready, FrontRows<BC>{unit, inner, (int)r.headdim}, put);
  cluster_arrive();
  cluster_wait();
  const float z = r.gated && o.finishes ? v.gate[o.mine] : 0.0f;
  quick_close(r, v.quick, o, quick_time(r, o, v.dt), z, 0);
}
