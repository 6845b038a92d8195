// Choosing one token from a row of logits, in the order that runtime/engine.py:SamplingParams documents.
//
// runtime/sampling.py is the NumPy twin; tests compare the two.
#pragma once

#include <cstdint>
#include <vector>

namespace slimba {

struct SampleParams {
  double temperature = 0, top_p = 1, min_p = 0, repetition_penalty = 1;
  std::int64_t top_k = 0, n_valid = 0;
  std::uint64_t seed = 0;
};

// u in [0, 1) for token i of sequence b: SplitMix64 (Steele, Lea & Flood 2014) at seed + golden * (1 + i + b 2^32).
double uniform(std::uint64_t seed, std::uint64_t b, std::uint64_t i);

class Sampler {
 public:
  // logits [vocab]; seen [vocab] is non-zero for ids of prompt and output. std::domain_error when a logit is not
  // finite.
  std::int32_t sample(const float* logits, std::int64_t vocab, const std::uint8_t* seen, const SampleParams& p,
                      std::uint64_t b, std::uint64_t i);

 private:
  void sort_front(std::size_t from, std::size_t count);  // ranks [from, from + count) of order_ into place

  std::vector<double> logit_, weight_;
  std::vector<std::int32_t> order_;
};

}  // namespace slimba
