// The int8 kernels compiled for AVX2.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx2Int8 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmul};

}  // namespace slimba
