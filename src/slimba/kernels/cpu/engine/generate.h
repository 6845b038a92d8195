// The decode loop: sample, feed back, stop. Runs any number of tokens without Python.
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"
#include "sampler.h"

namespace slimba {

class Generation {
 public:
  // first_logits [B, V] after the prompts; prompts [B, L] feed the repetition penalty. The state is the one that the
  // prompts went through; it will have consumed every new id but the last one of each sequence.
  Generation(Model& model, State& state, const float* first_logits, const std::int32_t* prompts, std::int64_t length,
             const SampleParams& params, std::vector<std::int32_t> stop_ids, std::int64_t max_new_tokens);

  // Up to `count` more ids of every sequence as [B, returned] in `out` (row stride `count`); -1 pads finished
  // sequences. Returns 0 when all are finished or max_new_tokens is reached. The caller holds model.mutex().
  std::int64_t next(std::int64_t count, std::int32_t* out, const Poll& poll);

 private:
  bool step(std::int32_t* out, std::int64_t stride, const Poll& poll);

  Model& model_;
  State& state_;
  SampleParams params_;
  std::vector<std::int32_t> stop_ids_, last_;
  std::vector<std::int64_t> active_;  // sequences not finished
  std::vector<std::uint8_t> seen_;    // [B, V]
  std::vector<float> logits_;         // [active, V]
  Sampler sampler_;
  std::int64_t made_ = 0, max_new_tokens_;
};

}  // namespace slimba
