// Whole sequences in chunks of bounded memory: all logits, the last logits, or negative log-likelihoods.
//
// ids are [B, L] for the B sequences of the state, which moves on by L tokens. The caller holds model.mutex().
#pragma once

#include "model.h"

namespace slimba {

// out [B, L, V]
void forward(Model& model, const std::int32_t* ids, std::int64_t length, State& state, float* out, const Poll& poll);
// out [B, V]: logits of the last position; length >= 1
void prefill(Model& model, const std::int32_t* ids, std::int64_t length, State& state, float* out, const Poll& poll);
// out [B, L]: -log softmax(logits)[targets] in nats; std::domain_error when logits are not finite
void nll(Model& model, const std::int32_t* ids, const std::int32_t* targets, std::int64_t length, State& state,
         double* out, const Poll& poll);

}  // namespace slimba
