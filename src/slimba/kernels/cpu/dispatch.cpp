// Chooses the kernel table at run time by cpuid; the environment variable SLIMBA_CPU_ISA forces one (see bindings.cpp).
#include <cstring>

#include "kernels.h"

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
  return k;
}

#if defined(SLIMBA_X86)
// __builtin_cpu_supports also checks that the operating system saves the wider registers.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

Kernels make_avx2() {
  Kernels k = {};
  k.isa = "avx2";
  const FormatKernels* formats[kFormats] = {&kAvx2Float32, &kAvx2Float16, &kAvx2Bfloat16,
                                            &kAvx2Int8,    &kAvx2Int4,    &kAvx2Sign};
  std::memcpy(k.format, formats, sizeof formats);
  avx2_norm(k);
  avx2_ssm(k);
  return k;
}

Kernels make_avx512() {
  Kernels k = {};
  k.isa = "avx512";
  const FormatKernels* formats[kFormats] = {&kAvx512Float32, &kAvx512Float16, &kAvx512Bfloat16,
                                            &kAvx512Int8,    &kAvx512Int4,    &kAvx512Sign};
  std::memcpy(k.format, formats, sizeof formats);
  avx512_norm(k);
  avx512_ssm(k);
  return k;
}
#endif

}  // namespace

const Kernels* kernels_for(const char* isa) {
  static const Kernels portable = make_portable();
  const bool any = !std::strcmp(isa, "");
#if defined(SLIMBA_X86)
  // The makers themselves are compiled with wide registers: not even they may run on a machine without them.
  if ((any || !std::strcmp(isa, "avx512")) && has_avx512()) {
    static const Kernels avx512 = make_avx512();
    return &avx512;
  }
  if ((any || !std::strcmp(isa, "avx2")) && has_avx2()) {
    static const Kernels avx2 = make_avx2();
    return &avx2;
  }
#endif
  return any || !std::strcmp(isa, "portable") ? &portable : nullptr;
}

}  // namespace slimba
