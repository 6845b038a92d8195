// The kernels with int8 activations compiled for AVX-VNNI.
#include "fill.h"

namespace slimba {

void avxvnni_quant(Kernels& k) { fill(k); }

}  // namespace slimba
