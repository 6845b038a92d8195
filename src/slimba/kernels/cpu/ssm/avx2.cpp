// The sequence kernels compiled for AVX2.
#include "simd.h"

namespace slimba {

void avx2_ssm(Kernels& k) { fill(k); }

}  // namespace slimba
