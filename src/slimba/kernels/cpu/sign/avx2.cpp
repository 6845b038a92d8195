// The sign kernels compiled for AVX2.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx2Sign = {sign_prepared_floats, sign_prepare, sign_scratch_floats, sign_matmul};

}  // namespace slimba
