// What every kernel stands on: types, float16 and bfloat16 in registers, warp reductions, the tensor-core product.
//
// Compiled by NVRTC without any header. tests/kernels/host_cuda.h replaces the part marked DEVICE, so that the very same
// kernels run on a processor under test, one fibre a thread.
//
// Legend: B sequences of a batch, T tokens, D d_model, I d_inner, H heads, P headdim, N d_state, G groups, K columns of a
// matrix (taps where the text speaks of the convolution), R rank, V vocabulary rows.
#ifdef SLIMBA_HOST
#include "host_cuda.h"
#else  // DEVICE
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
#define DEV static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__
// A kernel takes one struct of 64-bit fields, which lies in constant memory and is called p; then its largest block,
// and how many blocks should fit a multiprocessor.
#define KERNEL(name, Params, ...) \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Params p)
#define SHARED(name) extern __shared__ __align__(16) u8 name[]

DEV float half_bits_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEV u16 float_to_half_bits(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEV u32 pack_halves(float lo, float hi) {
  u32 two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(hi), "f"(lo));
  return two;
}
DEV u16 float_to_bfloat(float f) {  // to the nearest, ties to even; NaN stays NaN
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEV u32 two_bfloats(float lo, float hi) {
  u32 two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(hi), "f"(lo));
  return two;
}
// What is larger in magnitude, with any sign; NaN if one is.
DEV float larger_magnitude(float a, float b) {
  float r;
#if __CUDA_ARCH__ >= 860
  asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
#else
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(fabsf(a)), "f"(fabsf(b)));
#endif
  return r;
}
DEV int dot4(u32 a, u32 b, int c) { return __dp4a((int)a, (int)b, c); }
DEV int count_bits(u32 v) { return __popc(v); }
DEV u32 byte_perm(u32 a, u32 b, u32 pick) { return __byte_perm(a, b, pick); }
DEV int warp_sum(int v) { return __reduce_add_sync(0xffffffffu, v); }
DEV u32 warp_max_bits(u32 v) { return __reduce_max_sync(0xffffffffu, v); }
DEV float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEV u64 shuffle_xor(u64 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEV int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEV float shuffle(float v, int from) { return __shfl_sync(0xffffffffu, v, from); }
// d += a b with a: unsigned bytes [16, 32] by rows, b: signed bytes [32, 8] by columns; fragments as in the PTX manual
DEV void mma_u8s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void mma_s8s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d += a b in float16 with float32 sums: a [16, 16] by rows, b [16, 8] by columns
DEV void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // likewise
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d = c + a b: a [16, 8], b [8, 8] in float16
DEV void mma_f16_8(float (&d)[4], u32 a0, u32 a1, u32 b, float c) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a0), "r"(a1), "r"(b), "f"(c));
}
// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 i + r names row r of matrix i. Lane l gets of each the
// entries (l / 4, 2 (l % 4)) and the one after; transposed: (2 (l % 4), l / 4) and the one below.
DEV void load_matrices(u32 (&r)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(row)));
}
DEV void load_transposed(u32 (&r)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(row)));
}
// Two float16 numbers at once
DEV u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEV u32 add_halves(u32 a, u32 b) {
  u32 d;
  asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEV u32 mul_halves(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// 16 bytes to shared memory, in the background; copies belong to the group that the next commit closes, and wait_copies<N>
// returns when all groups but the last N are there.
DEV void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
DEV void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEV void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEV float shuffle_up(float v, int by) { return __shfl_up_sync(0xffffffffu, v, by); }
DEV float fast_exp(float v) { return __expf(v); }
DEV float fast_rsqrt(float v) {  // within 2 units in the last place
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEV float fast_reciprocal(float v) {  // within 1 unit in the last place; 0 for the largest numbers
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEV void refresh(u32& v) { asm volatile("" : "+r"(v)); }  // what is made of v is made again, not kept in registers
DEV void sync_warp() { __syncwarp(); }
// Weights are read once a step: not kept in L1. Not by ld.global.nc either, which the assembler moves behind the wait for the
// kernel before (`await_previous`), where a weight is no longer in time. Activations come from other blocks: read from L2.
DEV uint4 load_weights(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEV uint2 load_pair(const void* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
DEV u64 load_fresh(const u64* p) { return __ldcg(p); }
DEV void store_fresh(u64* p, u64 v) { __stcg(p, v); }
DEV void seen_by_all() { __threadfence(); }  // what this thread wrote, before what it does next
// How many blocks have come here before; what this thread wrote can be seen by those that come later.
DEV u32 take_ticket(u32* p) {
  __threadfence();
  const u32 ticket = atomicAdd(p, 1u);
  __threadfence();
  return ticket;
}
DEV u32 add_shared(u32* p, u32 v) { return atomicAdd(p, v); }
DEV float2 load_fresh_pair(const float* p) { return __ldcg((const float2*)p); }
DEV uint4 load_fresh_four(const void* p) { return __ldcg((const uint4*)p); }
DEV float4 load_fresh_quad(const float* p) { return __ldcg((const float4*)p); }
// Of a state: neither written in this kernel before it is read nor needed in L1.
DEV uint4 load_state(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
DEV float load_fresh(const float* p) { return __ldcg(p); }
#define ASSUME(what) __builtin_assume(what)
DEV void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
// Programmatic dependent launch: wait until everything the kernel before has written can be seen, then let the kernel
// after begin with what does not depend on this one. Both do nothing in an ordinary launch.
DEV void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

#define WARP 32
#define INF_BITS 0x7f800000u

DEV float bits_to_float(u32 u) { return __uint_as_float(u); }
DEV u32 float_to_bits(float f) { return __float_as_uint(f); }
DEV float bfloat_to_float(u16 b) { return bits_to_float((u32)b << 16); }
DEV float warp_sum(float v) {
  for (int m = 16; m; m >>= 1) v += shuffle_xor(v, m);
  return v;
}
DEV float low_half(u32 two) { return half_bits_to_float((u16)two); }
DEV float high_half(u32 two) { return half_bits_to_float((u16)(two >> 16)); }
DEV float silu(float v) { return v * fast_reciprocal(1.0f + fast_exp(-v)); }
// log(1 + exp(v)) without overflow, clamped
DEV float softplus(float v, float low, float high) {
  const float s = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
  return fminf(fmaxf(s, low), high);
}
DEV float param_float(i64 bits) { return bits_to_float((u32)bits); }
DEV i64 least(i64 a, i64 b) { return a < b ? a : b; }

// Formats of a matrix segment, in the order of FORMAT_CODES in runtime/backends/cuda_weights.py.
enum Format { F32, F16, BF16, INT8, INT4, SIGN };
// Types of a stored state, in the order of STATE_CODES in runtime/backends/cuda_state.py.
enum StateType { STATE_F32, STATE_BF16, STATE_INT8 };
