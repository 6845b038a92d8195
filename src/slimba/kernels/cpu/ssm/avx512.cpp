// The sequence kernels compiled for AVX-512.
#include "simd.h"

namespace slimba {

void avx512_ssm(Kernels& k) { fill(k); }

}  // namespace slimba
