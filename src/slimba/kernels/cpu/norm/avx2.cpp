// The element-wise kernels compiled for AVX2.
#include "simd.h"

namespace slimba {

void avx2_norm(Kernels& k) { fill(k); }

}  // namespace slimba
