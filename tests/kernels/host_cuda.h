// Runs the CUDA kernels of src/slimba/kernels/cuda on a processor, for tests: every thread of a grid is a fibre, and
// __syncthreads, warp operations and tensor-core products wait for the others. Included by common.cuh in
// place of its DEVICE part. Compiled and called by tests/kernels/cuda_host.py. x86-64 and gcc or clang only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct Dim3 {
  unsigned x, y, z;
};
#define DEV static inline
#define DEV_MEMBER inline

namespace host {
struct Fibre {
  void* stack_pointer = nullptr;
  Dim3 thread = {0, 0, 0}, block = {0, 0, 0};
  int block_index = 0, warp = 0, lane = 0, exchanges = 0;
  bool done = false;
};
struct Gate {  // a barrier of `size` fibres
  int size = 0, arrived = 0;
  unsigned generation = 0;
};
struct Warp {
  Gate gate;
  u32 slot[2][32][8];  // of one exchange and the next: no lane can be further ahead than that
};
struct Block {
  Gate gate;
  std::vector<Warp> warps;
  std::vector<u8> shared;
};
inline Fibre* current = nullptr;
inline void* scheduler = nullptr;
inline std::vector<Block>* blocks = nullptr;
constexpr std::size_t kStack = 48 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept: making them costs more than running on them
inline Dim3 grid_size, block_size;
inline const std::function<void()>* body = nullptr;

extern "C" void host_switch(void** save, void* load);
asm(R"(
.text
.globl host_switch
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void yield() { host_switch(&current->stack_pointer, scheduler); }
inline void wait(Gate& g) {
  const unsigned mine = g.generation;
  if (++g.arrived == g.size) {
    g.arrived = 0;
    ++g.generation;
    return;
  }
  while (g.generation == mine) yield();
}
inline Block& own_block() { return (*blocks)[current->block_index]; }
inline Warp& own_warp() { return own_block().warps[current->warp]; }
inline void enter() {
  (*body)();
  current->done = true;
  for (;;) yield();
}

// Runs one block after another.
inline void run(Dim3 grid, int threads, i64 shared_bytes, const std::function<void()>& f) {
  grid_size = grid;
  block_size = {unsigned(threads), 1, 1};
  body = &f;
  const int total = int(grid.x * grid.y * grid.z), step = 1;
  for (int from = 0; from < total; from += step) {
    const int count = step < total - from ? step : total - from;
    std::vector<Block> group(count);
    std::vector<Fibre> fibres(std::size_t(count) * threads);
    blocks = &group;
    for (int b = 0; b < count; ++b) {
      const int at = from + b;
      group[b].gate = {threads, 0, 0};
      group[b].warps.resize((threads + 31) / 32);
      for (auto& w : group[b].warps) w.gate = {32, 0, 0};
      group[b].shared.assign(std::size_t(shared_bytes) + 64, 0xA5);  // poison, and a guard behind the end
      for (int t = 0; t < threads; ++t) {
        Fibre& fibre = fibres[std::size_t(b) * threads + t];
        if (stacks.size() <= std::size_t(b) * threads + t) stacks.emplace_back(new char[kStack]);
        fibre.thread = {unsigned(t), 0, 0};
        fibre.block = {unsigned(at) % grid.x, unsigned(at) / grid.x % grid.y, unsigned(at) / grid.x / grid.y};
        fibre.block_index = b;
        fibre.warp = t / 32;
        fibre.lane = t % 32;
        auto top = (std::uintptr_t(stacks[std::size_t(b) * threads + t].get()) + kStack) & ~std::uintptr_t(15);
        void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and no return
        for (int i = 0; i < 6; ++i) frame[i] = nullptr;
        frame[6] = reinterpret_cast<void*>(&enter);
        frame[7] = nullptr;
        fibre.stack_pointer = frame;
      }
    }
    for (bool alive = true; alive;) {
      alive = false;
      for (auto& fibre : fibres) {
        if (fibre.done) continue;
        alive = true;
        current = &fibre;
        host_switch(&scheduler, fibre.stack_pointer);
      }
    }
    for (auto& b : group)
      for (std::size_t i = 0; i < 64; ++i)
        if (b.shared[std::size_t(shared_bytes) + i] != 0xA5) {
          std::fprintf(stderr, "a kernel wrote behind its %lld bytes of shared memory\n", (long long)shared_bytes);
          std::abort();
        }
  }
}
// Lanes exchange words: everyone puts, then everyone may read all.
struct Exchange {
  u32 (&slot)[32][8];
  template <typename... Words>
  explicit Exchange(Words... words) : slot(own_warp().slot[current->exchanges++ & 1]) {
    int i = 0;
    ((slot[current->lane][i++] = words), ...);
    wait(own_warp().gate);
  }
  u32 at(int lane, int i) const { return slot[lane][i]; }
};
}  // namespace host

#define threadIdx (host::current->thread)
#define blockIdx (host::current->block)
#define gridDim (host::grid_size)
#define blockDim (host::block_size)
#define SHARED(name) u8* name = host::own_block().shared.data()
#define KERNEL(name, Params, ...)                                                                                  \
  static void name##_body(const Params& p);                                                                       \
  extern "C" void name(int gx, int gy, int gz, i64 shared, const void* fields, i64 bytes, int n) { \
    if (bytes != (i64)sizeof(Params)) {                                                                            \
      std::fprintf(stderr, #name ": %lld bytes of fields for a struct of %lld\n", (long long)bytes,              \
                   (long long)sizeof(Params));                                                                     \
      std::abort();                                                                                                \
    }                                                                                                              \
    const Params& p = *static_cast<const Params*>(fields);                                                         \
    host::run({unsigned(gx), unsigned(gy), unsigned(gz)}, n, shared, [&] { name##_body(p); });    \
  }                                                                                                                \
  static void name##_body(const Params& p)

inline void sync_warp() { host::wait(host::own_warp().gate); }
inline void __syncthreads() { host::wait(host::own_block().gate); }
DEV float __uint_as_float(u32 u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
DEV u32 __float_as_uint(float f) {
  u32 u;
  std::memcpy(&u, &f, 4);
  return u;
}
DEV int __float2int_rn(float f) { return int(std::nearbyint(f)); }
DEV float half_bits_to_float(u16 h) {
  const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = std::ldexp(float(fraction), -24);
  return sign ? -small : small;
}
DEV u16 float_to_half_bits(float f) {
  const u32 bits = __float_as_uint(f);
  const u16 sign = u16(bits >> 16 & 0x8000);
  const float a = std::fabs(f);
  if (!(a == a)) return u16(sign | 0x7e00);
  if (a >= 65520.0f) return u16(sign | 0x7c00);
  if (a < 6.103515625e-5f) return u16(sign | int(std::nearbyint(std::ldexp(a, 24))));
  const u32 m = __float_as_uint(a);
  return u16(sign | ((m + 0xfffu + (m >> 13 & 1)) >> 13) - (112u << 10));
}
DEV u32 pack_halves(float lo, float hi) { return (u32)float_to_half_bits(lo) | (u32)float_to_half_bits(hi) << 16; }
DEV u16 float_to_bfloat(float f) {
  const u32 bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
DEV u32 two_bfloats(float lo, float hi) { return u32(float_to_bfloat(lo)) | u32(float_to_bfloat(hi)) << 16; }
DEV float larger_magnitude(float a, float b) { return a != a || b != b ? a + b : std::fabs(a) > std::fabs(b) ? a : b; }
DEV int dot4(u32 a, u32 b, int c) {
  for (int i = 0; i < 4; ++i) c += int(i8(a >> 8 * i)) * int(i8(b >> 8 * i));
  return c;
}
DEV int count_bits(u32 v) { return __builtin_popcount(v); }
DEV u32 byte_perm(u32 a, u32 b, u32 pick) {
  const u64 both = u64(b) << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= u32(both >> (pick >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
DEV int warp_sum(int v) {
  host::Exchange e{u32(v)};
  int sum = 0;
  for (int l = 0; l < 32; ++l) sum += int(e.at(l, 0));
  return sum;
}
DEV u32 warp_max_bits(u32 v) {
  host::Exchange e{v};
  u32 most = 0;
  for (int l = 0; l < 32; ++l) most = e.at(l, 0) > most ? e.at(l, 0) : most;
  return most;
}
DEV float shuffle_xor(float v, int mask) {
  host::Exchange e{__float_as_uint(v)};
  return __uint_as_float(e.at(host::current->lane ^ mask, 0));
}
DEV int shuffle_xor(int v, int mask) {
  host::Exchange e{u32(v)};
  return int(e.at(host::current->lane ^ mask, 0));
}
DEV u64 shuffle_xor(u64 v, int mask) {
  host::Exchange e{u32(v), u32(v >> 32)};
  return u64(e.at(host::current->lane ^ mask, 1)) << 32 | e.at(host::current->lane ^ mask, 0);
}
DEV float shuffle(float v, int from) {
  host::Exchange e{__float_as_uint(v)};
  return __uint_as_float(e.at(from, 0));
}
// Element (r, k) of A: lane r % 8 * 4 + k % 16 / 4, register r / 8 + k / 16 * 2, byte k % 4; (k, n) of B alike.
template <typename A>
DEV void host_mma(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  host::Exchange e(a0, a1, a2, a3, b0, b1);
  const int g = host::current->lane / 4, t = host::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const u32 a = e.at(row % 8 * 4 + k % 16 / 4, row / 8 + k / 16 * 2) >> k % 4 * 8;
      const u32 b = e.at(col * 4 + k % 16 / 4, 4 + k / 16) >> k % 4 * 8;
      d[i] += int(A(a)) * int(i8(b));
    }
  }
}
DEV void mma_u8s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { host_mma<u8>(d, a0, a1, a2, a3, b0, b1); }
DEV void mma_s8s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { host_mma<i8>(d, a0, a1, a2, a3, b0, b1); }
DEV u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 d = 0;
  for (int s = 0; s < 32; s += 16)
    d |= u32(float_to_half_bits(half_bits_to_float(u16(a >> s)) * half_bits_to_float(u16(b >> s)) +
                                half_bits_to_float(u16(c >> s)))) << s;
  return d;
}
DEV u32 add_halves(u32 a, u32 b) { return fma_halves(a, 0x3c003c00u, b); }
DEV u32 mul_halves(u32 a, u32 b) { return fma_halves(a, b, 0x80008000u); }
DEV void copy_async(void* to, const void* from) {
  if ((std::uintptr_t(to) | std::uintptr_t(from)) % 16) std::abort();
  std::memcpy(to, from, 16);
}
DEV void commit_copies() {}
template <int N>
DEV void wait_copies() {}
DEV float shuffle_up(float v, int by) {
  host::Exchange e{__float_as_uint(v)};
  return host::current->lane < by ? v : __uint_as_float(e.at(host::current->lane - by, 0));
}
DEV float fast_exp(float v) { return std::exp(v); }
DEV float fast_rsqrt(float v) { return 1.0f / std::sqrt(v); }
DEV void refresh(u32&) {}
DEV float fast_reciprocal(float v) { return 1.0f / v; }
// Element (r, k) of A: lane r % 8 * 4 + k % 8 / 2, register r / 8 + k / 8 * 2, half k % 2; (k, n) of B alike.
template <typename Value>
DEV void host_mma16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Value value) {
  host::Exchange e(a0, a1, a2, a3, b0, b1);
  const int g = host::current->lane / 4, t = host::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const u32 a = e.at(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2) >> k % 2 * 16;
      const u32 b = e.at(col * 4 + k % 8 / 2, 4 + k / 8) >> k % 2 * 16;
      d[i] += value(u16(a)) * value(u16(b));
    }
  }
}
DEV void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  host_mma16(d, a0, a1, a2, a3, b0, b1, [](u16 h) { return half_bits_to_float(h); });
}
DEV void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  host_mma16(d, a0, a1, a2, a3, b0, b1, [](u16 h) { return __uint_as_float(u32(h) << 16); });
}
DEV void mma_f16_8(float (&d)[4], u32 a0, u32 a1, u32 b, float c) {
  for (float& v : d) v = c;
  mma_f16(d, a0, a1, 0, 0, b, 0);
}
DEV void host_matrices(u32 (&r)[4], const u16* row, bool transposed) {
  if (std::uintptr_t(row) % 16) std::abort();
  host::Exchange e(u32(std::uintptr_t(row)), u32(std::uintptr_t(row) >> 32));
  const int g = host::current->lane / 4, t = host::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto entry = [&](int a, int b) {
      const int lane = 8 * i + a;
      return u32(reinterpret_cast<const u16*>(std::uintptr_t(e.at(lane, 0)) | std::uintptr_t(e.at(lane, 1)) << 32)[b]);
    };
    r[i] = transposed ? entry(2 * t, g) | entry(2 * t + 1, g) << 16 : entry(g, 2 * t) | entry(g, 2 * t + 1) << 16;
  }
}
DEV void load_matrices(u32 (&r)[4], const u16* row) { host_matrices(r, row, false); }
DEV void load_transposed(u32 (&r)[4], const u16* row) { host_matrices(r, row, true); }
DEV uint4 load_weights(const void* p) {
  uint4 v;
  if (std::uintptr_t(p) % 16) std::abort();  // the GPU would fault
  std::memcpy(&v, p, 16);
  return v;
}
DEV uint2 load_pair(const void* p) {
  uint2 v;
  if (std::uintptr_t(p) % 8) std::abort();
  std::memcpy(&v, p, 8);
  return v;
}
DEV u64 load_fresh(const u64* p) { return *p; }
DEV void store_fresh(u64* p, u64 v) { *p = v; }
DEV u32 take_ticket(u32* p) { return (*p)++; }
DEV u32 add_shared(u32* p, u32 v) {
  const u32 before = *p;
  *p += v;
  return before;
}
DEV float2 load_fresh_pair(const float* p) { return float2{p[0], p[1]}; }
DEV uint4 load_fresh_four(const void* p) { return load_weights(p); }
DEV float4 load_fresh_quad(const float* p) { return float4{p[0], p[1], p[2], p[3]}; }
DEV uint4 load_state(const void* p) { return load_weights(p); }
DEV float load_fresh(const float* p) { return *p; }
#define ASSUME(what) ((void)0)
DEV void prefetch(const void* p) { volatile char touched = *static_cast<const char*>(p); (void)touched; }
DEV void await_previous() {}
DEV void release_next() {}
DEV void seen_by_all() {}
