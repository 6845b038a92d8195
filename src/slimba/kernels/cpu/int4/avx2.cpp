// The int4 kernels compiled for AVX2.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx2Int4 = {int4_prepared_floats, prepare, dot_scratch_floats, matmul};

}  // namespace slimba
