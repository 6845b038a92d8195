// The float kernels compiled for AVX2.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx2Float32 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmul32};
const FormatKernels kAvx2Float16 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmul16};
const FormatKernels kAvx2Bfloat16 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmulbf};

}  // namespace slimba
