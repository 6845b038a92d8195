// The kernels with int8 activations compiled for AVX2.
#include "fill.h"

namespace slimba {

void avx2_quant(Kernels& k) { fill(k); }

}  // namespace slimba
