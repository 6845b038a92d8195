// The element-wise kernels compiled for AVX-512.
#include "simd.h"

namespace slimba {

void avx512_norm(Kernels& k) { fill(k); }

}  // namespace slimba
