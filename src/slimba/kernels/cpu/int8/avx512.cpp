// The int8 kernels compiled for AVX-512.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx512Int8 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmul};

}  // namespace slimba
