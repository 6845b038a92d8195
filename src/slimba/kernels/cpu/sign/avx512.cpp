// The sign kernels compiled for AVX-512.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx512Sign = {sign_prepared_floats, sign_prepare, sign_scratch_floats, sign_matmul};

}  // namespace slimba
