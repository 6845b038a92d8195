// What kernels/cuda/warpgroup.cuh has, on a processor: copies are there at once, products exchange within their warp.
#pragma once

DEV u8* align_shared(u8* p, int to) { return p + ((to - int(std::uintptr_t(p) % to)) & (to - 1)); }

// A barrier: phases passed, arrivals that are missing, arrivals of a phase.
DEV void barrier_start(u64* bar, int count) { *bar = u64(count) << 48 | u64(count) << 32; }
DEV void barriers_started() {}
DEV void barrier_arrive(u64* bar) {
  const u64 count = *bar >> 48, left = (*bar >> 32 & 0xffff) - 1;
  if (left > 0xffff) std::abort();
  *bar = left ? count << 48 | left << 32 | u32(*bar) : count << 48 | count << 32 | u32(*bar + 1);
}
DEV void barrier_expect(u64* bar, int bytes) {
  if (bytes % 16 || bytes <= 0) std::abort();
  barrier_arrive(bar);
}
DEV void barrier_wait(u64* bar, int parity) {
  while (int(u32(*bar) & 1) == parity) host::yield();
}
DEV void copy_block(void* to, const void* from, int bytes, u64*) {
  if ((std::uintptr_t(to) | std::uintptr_t(from) | unsigned(bytes)) % 16) std::abort();
  std::memcpy(to, from, bytes);
}
DEV void see_stores() {}
DEV void see_shared_stores() {}
DEV float short_exp2(float v) { return std::exp2(v); }
DEV float short_reciprocal(float v) { return 1.0f / v; }
template <int HALF>
DEV void settle(float (&)[HALF]) {}
DEV void products_begin() {}
DEV void products_commit() {}
template <int LEFT>
DEV void products_wait() {  // for the whole warp: who goes on may give away what other lanes have read
  sync_warp();
}
DEV u64 operand_at(const u8* x) {
  if (std::uintptr_t(x) % 1024) std::abort();
  return u64(std::uintptr_t(x));
}
template <int HALF>
DEV void product_at(float (&d)[HALF], const u32 (&a)[4], u64 b, int step) {
  host::Exchange e(a[0], a[1], a[2], a[3]);
  const int g = host::current->lane / 4, t = host::current->lane % 4;
  for (int i = 0; i < HALF; ++i) {
    const int row = g + i / 2 % 2 * 8, vector = i / 4 * 8 + 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const u32 left = e.at(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2) >> k % 2 * 16;
      const int piece = (2 * step + k / 8) ^ (vector & 7);
      const u16 right = reinterpret_cast<const u16*>(std::uintptr_t(b) + vector * 128 + piece * 16)[k % 8];
      d[i] += half_bits_to_float(u16(left)) * half_bits_to_float(right);
    }
  }
}
// A right operand that lies across, with its second panel of 64 numbers a row.
struct Across {
  const u8* at;
  int panel;
};
DEV Across across_at(const u8* x, int panel) {
  if (std::uintptr_t(x) % 1024) std::abort();
  return {x, panel};
}
template <int HALF>
DEV void product_across(float (&d)[HALF], const u32 (&a)[4], Across b) {
  host::Exchange e(a[0], a[1], a[2], a[3]);
  const int g = host::current->lane / 4, t = host::current->lane % 4;
  for (int i = 0; i < HALF; ++i) {
    const int row = g + i / 2 % 2 * 8, vector = i / 4 * 8 + 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const u32 left = e.at(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2) >> k % 2 * 16;
      const u8* of = b.at + vector / 64 * b.panel + k * 128 + ((vector % 64 / 8 ^ k % 8) << 4) + vector % 8 * 2;
      d[i] += half_bits_to_float(u16(left)) * half_bits_to_float(*reinterpret_cast<const u16*>(of));
    }
  }
}
template <int HALF>
DEV void product_both(float (&d)[HALF], u64 a, u64 b, int step) {
  const int warp = host::current->warp % 4, g = host::current->lane / 4, t = host::current->lane % 4;
  for (int i = 0; i < HALF; ++i) {
    const int row = 16 * warp + g + i / 2 % 2 * 8, vector = i / 4 * 8 + 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int piece = 2 * step + k / 8;
      const auto at = [&](u64 x, int r) {
        return half_bits_to_float(reinterpret_cast<const u16*>(std::uintptr_t(x) + r * 128 + ((piece ^ (r & 7)) << 4))[k % 8]);
      };
      d[i] += at(a, row) * at(b, vector);
    }
  }
}
