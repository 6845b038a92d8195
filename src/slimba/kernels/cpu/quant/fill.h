// The table of kernels with int8 activations, for AVX2, AVX-VNNI and AVX-512 VNNI; included by the file of each.
#pragma once

#include "quantize.h"
#include "sizes.h"
#if defined(__AVX512F__)
#include "rows.h"
#include "subsets.h"
#else
#include "lookup_many.h"
#endif

namespace slimba {
namespace {

constexpr QuantInput kNothing = {no_bytes, no_prepare};

template <int kSixes>
int64_t sign_scratch_bytes(int64_t cols) {
#if defined(__AVX512F__)
  const int64_t rest = many_scratch_bytes(cols);
#else
  const int64_t rest = unprepared_bytes(cols) + lookup_scratch_bytes(cols);
#endif
  const int64_t subsets = SubsetScratch<kSixes>::bytes(cols);
  return rest > subsets ? rest : subsets;
}

template <int kSixes>
QuantFormat signs() {
#if defined(__AVX512F__)
  return {{sign_prepared_bytes, sign_prepare}, kNothing, sign_scratch_bytes<kSixes>, sign_few,
          subset_many<kSixes, many_whole<SignPanel>>, kFew, kSubsetRows};
#else
  return {{lookup_bytes, lookup_prepare}, kNothing, sign_scratch_bytes<kSixes>, lookup_some,
          subset_many<kSixes, lookup_unprepared>, kLeastTokens - 1, kSubsetRows};
#endif
}

void fill(Kernels& k) {
  static const QuantFormat narrow = signs<0>(), wide = signs<kMostSixes>();
  static const QuantFormat int8 = {kNothing, kNothing, many_scratch_bytes, few_rows<Int8Rows>,
                                   many_whole<Int8Panel>, kFew, kPanelRows};
  static const QuantFormat int4 = {{int4_prepared_bytes, int4_prepare}, kNothing, many_scratch_bytes,
                                   int4_few, many_int4, kFew, kPanelRows};
  k.quantize = quantize;
  k.quant[kSign] = k.near_bytes < kWideCache ? &narrow : &wide;
  k.quant[kInt8] = &int8;
  k.quant[kInt4] = &int4;
}

}  // namespace
}  // namespace slimba
