// The int4 kernels compiled for AVX-512.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx512Int4 = {int4_prepared_floats, prepare, dot_scratch_floats, matmul};

}  // namespace slimba
