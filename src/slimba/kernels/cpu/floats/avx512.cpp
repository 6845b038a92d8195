// The float kernels compiled for AVX-512.
#include "simd.h"

namespace slimba {

const FormatKernels kAvx512Float32 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmul32};
const FormatKernels kAvx512Float16 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmul16};
const FormatKernels kAvx512Bfloat16 = {dot_prepared_floats, dot_prepare, dot_scratch_floats, matmulbf};

}  // namespace slimba
