// Chooses the kernel table at run time by what the processor has; the environment variable SLIMBA_CPU_ISA forces one (see
// bindings.cpp). A table is made of the widest vectors for float32 work and the best kernels for int8 activations.
#include <cstring>

#include "kernels.h"

#if defined(SLIMBA_X86)
#include <cpuid.h>
#endif
#if defined(SLIMBA_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(SLIMBA_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace slimba {

const DequantRow kDequantRow[kFormats] = {naive_dequant_float32, naive_dequant_float16, naive_dequant_bfloat16,
                                          naive_dequant_int8,    naive_dequant_int4,    naive_dequant_sign};

namespace {

Kernels make_portable() {
  Kernels k = {};
  k.isa = "portable";
  const FormatKernels* formats[kFormats] = {&kNaiveFloat32, &kNaiveFloat16, &kNaiveBfloat16,
                                            &kNaiveInt8,    &kNaiveInt4,    &kNaiveSign};
  std::memcpy(k.format, formats, sizeof formats);
  naive_norm(k);
  naive_ssm(k);
  naive_quant(k);
  return k;
}

#if defined(SLIMBA_X86)
std::int64_t cached_bytes() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") ? std::int64_t(128) << 20 : 0;
}

std::int64_t near_bytes() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kLeaves[] = {4, 0x8000001d};  // Intel's, AMD's
  for (const unsigned leaf : kLeaves) {
    if (!__get_cpuid_count(leaf, 0, &a, &b, &c, &d) || (a & 31) != 1 || (a >> 5 & 7) != 1) continue;
    return std::int64_t((b >> 22) + 1) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * (std::int64_t(c) + 1);
  }
  return 0;
}

Kernels make_avx2(const char* isa) {
  Kernels k = {};
  k.isa = isa;
  k.cached_bytes = cached_bytes();
  k.near_bytes = near_bytes();
  const FormatKernels* formats[kFormats] = {&kAvx2Float32, &kAvx2Float16, &kAvx2Bfloat16,
                                            &kAvx2Int8,    &kAvx2Int4,    &kAvx2Sign};
  std::memcpy(k.format, formats, sizeof formats);
  avx2_norm(k);
  avx2_ssm(k);
  avx2_quant(k);
  return k;
}

Kernels make_avxvnni() {
  Kernels k = make_avx2("avxvnni");
  avxvnni_quant(k);
  return k;
}

Kernels make_avx512(const char* isa) {
  Kernels k = {};
  k.isa = isa;
  k.cached_bytes = cached_bytes();
  k.near_bytes = near_bytes();
  const FormatKernels* formats[kFormats] = {&kAvx512Float32, &kAvx512Float16, &kAvx512Bfloat16,
                                            &kAvx512Int8,    &kAvx512Int4,    &kAvx512Sign};
  std::memcpy(k.format, formats, sizeof formats);
  avx512_norm(k);
  avx512_ssm(k);
  avx2_quant(k);
  return k;
}

Kernels make_avx512vnni(const char* isa) {
  Kernels k = make_avx512(isa);
  avx512vnni_quant(k);
  return k;
}

Kernels make_avx512lookup() {
  Kernels k = make_avx512vnni("avx512lookup");
  avx512lookup_quant(k);
  return k;
}

// Whether a look-up in a register of 32 words is one operation: on Intel it is more, and multiplying bytes is faster.
bool fast_lookups() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
}

Kernels make_amx() {
  Kernels k = make_avx512vnni("amx");
  amx_quant(k);
  return k;
}

// __builtin_cpu_supports also checks that the operating system saves the wider registers.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

#if defined(SLIMBA_SIMDE)  // built in plain C++, for tests
bool has_avx512() { return has_avx2(); }
bool has_avx512vnni() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// Linux gives a process the tile registers when it asks for them.
bool has_amx() {
#if defined(SLIMBA_EMULATE_AMX)
  return has_avx512vnni();
#elif defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(SLIMBA_NEON)
Kernels make_neon() {
  Kernels k = make_portable();
  k.isa = "neon";
  neon_quant(k);
  return k;
}

bool has_neon() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct;
#else
  return true;  // every Apple processor of this kind
#endif
}
#endif

}  // namespace

const Kernels* kernels_for(const char* isa) {
  static const Kernels portable = make_portable();
  const auto wanted = [&](const char* name) { return !*isa || !std::strcmp(isa, name); };
  // The makers themselves are compiled with wide registers: not even they may run on a machine without them.
#if defined(SLIMBA_X86)
  if (wanted("amx") && has_amx()) {
    static const Kernels table = make_amx();
    return &table;
  }
  if (wanted("avx512lookup") && has_avx512vnni() && (*isa || fast_lookups())) {
    static const Kernels table = make_avx512lookup();
    return &table;
  }
  if (wanted("avx512vnni") && has_avx512vnni()) {
    static const Kernels table = make_avx512vnni("avx512vnni");
    return &table;
  }
  if (wanted("avx512") && has_avx512()) {
    static const Kernels table = make_avx512("avx512");
    return &table;
  }
  if (wanted("avxvnni") && has_avxvnni()) {
    static const Kernels table = make_avxvnni();
    return &table;
  }
  if (wanted("avx2") && has_avx2()) {
    static const Kernels table = make_avx2("avx2");
    return &table;
  }
#endif
#if defined(SLIMBA_NEON)
  if (wanted("neon") && has_neon()) {
    static const Kernels table = make_neon();
    return &table;
  }
#endif
  return wanted("portable") ? &portable : nullptr;
}

}  // namespace slimba
