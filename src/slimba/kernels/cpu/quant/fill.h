// The table of kernels with int8 activations, for AVX2, AVX-VNNI and AVX-512 VNNI; included by the file of each.
#pragma once

#include "quantize.h"
#if defined(__AVX512F__)
#include "rows.h"
#else
#include "lookup_many.h"
#endif

namespace slimba {
namespace {

void fill(Kernels& k) {
  constexpr int64_t kFew = 4, kPanelRows = 64;
  constexpr QuantInput kNothing = {no_bytes, no_prepare};
#if defined(__AVX512F__)
  static const QuantFormat sign = {{sign_prepared_bytes, sign_prepare}, kNothing, many_scratch_bytes, sign_few,
                                   many_whole<SignPanel>, kFew, kPanelRows};
#else
  static const QuantFormat sign = {{lookup_bytes, lookup_prepare}, {lookup_bytes, lookup_prepare}, lookup_scratch_bytes,
                                   lookup_few, lookup_many, kFew, kTaskRows};
#endif
  static const QuantFormat int8 = {kNothing, kNothing, many_scratch_bytes, few_rows<Int8Rows>,
                                   many_whole<Int8Panel>, kFew, kPanelRows};
  static const QuantFormat int4 = {{int4_prepared_bytes, int4_prepare}, kNothing, many_scratch_bytes,
                                   int4_few, many_int4, kFew, kPanelRows};
  k.quantize = quantize;
  k.quant[kSign] = &sign;
  k.quant[kInt8] = &int8;
  k.quant[kInt4] = &int4;
}

}  // namespace
}  // namespace slimba
