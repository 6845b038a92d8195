// The kernels with int8 activations compiled for AVX-512 VNNI.
#include "fill.h"

namespace slimba {

void avx512vnni_quant(Kernels& k) { fill(k); }

}  // namespace slimba
