// The kernels with int8 activations compiled for AVX-512 VNNI.
#include "quantize.h"
#include "rows.h"

namespace slimba {
namespace {

const QuantFormat kSignRows = {sign_prepared_bytes, sign_prepare, many_scratch_bytes, sign_few, many_whole<SignPanel>, 4};
const QuantFormat kInt8Rows = {no_bytes, no_prepare, many_scratch_bytes, few_rows<Int8Rows>, many_whole<Int8Panel>, 4};
const QuantFormat kInt4Rows = {int4_prepared_bytes, int4_prepare, many_scratch_bytes, int4_few, many_int4, 4};

}  // namespace

void avx512vnni_quant(Kernels& k) {
  k.quantize = quantize;
  k.quant[kSign] = &kSignRows;
  k.quant[kInt8] = &kInt8Rows;
  k.quant[kInt4] = &kInt4Rows;
}

}  // namespace slimba
