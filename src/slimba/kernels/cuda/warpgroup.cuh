// What sm_90 has for whole warpgroups: copies of blocks of memory that count bytes on a barrier, and products whose right
// operand lies in shared memory. tests/kernels/host_warpgroup.h replaces it on a processor.
//
// A right operand is N vectors of 64 columns of float16, 128 bytes each, whose 16-byte piece q lies at q ^ (vector % 8): the
// 128-byte swizzle. It begins at a multiple of 1024 bytes.
#ifdef SLIMBA_HOST
#include "host_warpgroup.h"
#else
DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV u8* align_shared(u8* p, int to) { return p + ((to - (int)(shared_address(p) % (u32)to)) & (to - 1)); }

// Barriers of `count` arrivals, in phases; after barrier_start all threads have to meet once.
DEV void barrier_start(u64* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
DEV void barriers_started() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void barrier_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
DEV void barrier_expect(u64* bar, int bytes) {  // arrives, and this phase lasts until so many bytes have been copied
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
DEV void barrier_wait(u64* bar, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni over;\n"
      "bra.uni again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(bar)), "r"(parity) : "memory");
}
DEV void copy_block(void* to, const void* from, int bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
// What ordinary stores have written may be read by copy_block.
DEV void see_stores() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same of stores to shared memory alone, for products: the fence above waits for all memory, microseconds.
DEV void see_shared_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Sums that a product will add to are in their registers from here on: set between two products, they make it wait.
template <int HALF>
DEV void settle(float (&d)[HALF]) {
#pragma unroll
  for (int i = 0; i < HALF; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Two instructions where fast_exp takes six and fast_reciprocal five: numbers below 1e-38 count as zeros.
DEV float short_exp2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEV float short_reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

DEV void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEV void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Of a right operand at x, without the address's last bits: rows of 128 bytes, eights of them 1024 apart.
DEV u64 operand_at(const u8* x) { return (u64)(shared_address(x) >> 4 & 0x3fffu) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// Of one that lies across, its second 64 numbers a row `panel` bytes after the first.
DEV u64 across_at(const u8* x, int panel) {
  return (u64)(shared_address(x) >> 4 & 0x3fffu) | (u64)(panel >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define WGMMA_OF(name, TURNED, N, HALF, LIST, A0, A1, A2, A3, B, ...)                                                   \
  DEV void name(float (&d)[HALF], const u32 (&a)[4], u64 b) {                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\nwgmma.mma_async.sync.aligned.m64n" #N                      \
                 "k16.f32.f16.f16 {" LIST "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, " #TURNED     \
                 ";\n}\n"                                                                                           \
                 : __VA_ARGS__                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
  }
#define WGMMA(...) WGMMA_OF(product_16, 0, __VA_ARGS__)
#define WGMMA_ACROSS(...) WGMMA_OF(product_across, 1, __VA_ARGS__)
#define L4 "%0, %1, %2, %3"
#define L8 L4 ", %4, %5, %6, %7"
#define L16 L8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define L32 L16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define L64                                                                                                            \
  L32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
      "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d += a b: a [64, 16], rows 16 w + lane / 4 and 8 below in warp w, as of mma_f16; b [16, N]; d as of mma_f16, eight vectors
// after eight. Registers of a and d belong to the product until products_wait.
WGMMA(8, 4, L4, 4, 5, 6, 7, 8, D4(0))
WGMMA(16, 8, L8, 8, 9, 10, 11, 12, D4(0), D4(4))
WGMMA(32, 16, L16, 16, 17, 18, 19, 20, D16(0))
WGMMA(64, 32, L32, 32, 33, 34, 35, 36, D16(0), D16(16))
WGMMA(128, 64, L64, 64, 65, 66, 67, 68, D16(0), D16(16), D16(32), D16(48))
// The same with the right operand lying across: 16 rows of 64 of the N numbers each, as of operand_at but for across_at.
WGMMA_ACROSS(64, 32, L32, 32, 33, 34, 35, 36, D16(0), D16(16))
WGMMA_ACROSS(128, 64, L64, 64, 65, 66, 67, 68, D16(0), D16(16), D16(32), D16(48))
// Both operands in shared memory: 64 rows of the left one and N vectors, as of operand_at.
#define WGMMA_SHARED(N, HALF, LIST, A, B, ...)                                                                         \
  DEV void product_shared(float (&d)[HALF], u64 a, u64 b) {                                                           \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\nwgmma.mma_async.sync.aligned.m64n" #N                      \
                 "k16.f32.f16.f16 {" LIST "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n"                                  \
                 : __VA_ARGS__                                                                                      \
                 : "l"(a), "l"(b));                                                                                 \
  }
WGMMA_SHARED(64, 32, L32, 32, 33, D16(0), D16(16))
#undef WGMMA_SHARED
#undef D4
#undef D16
#undef WGMMA
#undef WGMMA_ACROSS
#undef WGMMA_OF
#undef L4
#undef L8
#undef L16
#undef L32
#undef L64
// Columns 16 step .. of the 64 at b.
template <int HALF>
DEV void product_at(float (&d)[HALF], const u32 (&a)[4], u64 b, int step) {
  product_16(d, a, b + (u64)(2 * step));
}
template <int HALF>
DEV void product_both(float (&d)[HALF], u64 a, u64 b, int step) {
  product_shared(d, a + (u64)(2 * step), b + (u64)(2 * step));
}
#endif

#define LOG2E 1.4426950408889634f
DEV float short_silu(float v) { return v * short_reciprocal(1.0f + short_exp2(v * -LOG2E)); }
DEV int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }  // where 16 bytes of an operand lie
