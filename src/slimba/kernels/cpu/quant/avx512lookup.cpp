// Products of signs with many tokens by look-ups, over the kernels of AVX-512 VNNI.
#include "lookup_wide.h"

namespace slimba {

void avx512lookup_quant(Kernels& k) {
  static QuantFormat sign = *k.quant[kSign];
  sign.many_input = {wide_bytes, wide_prepare};
  sign.scratch_bytes = wide_scratch_bytes;
  sign.many = wide_many;
  sign.many_rows = kWideRows;
  k.quant[kSign] = &sign;
}

}  // namespace slimba
