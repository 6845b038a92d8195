// See generate.h.
#include "generate.h"

#include <algorithm>

namespace slimba {

Generation::Generation(Model& model, State& state, const float* first_logits, const std::int32_t* prompts,
                       std::int64_t length, const SampleParams& params, std::vector<std::int32_t> stop_ids,
                       std::int64_t max_new_tokens)
    : model_(model), state_(state), params_(params), stop_ids_(std::move(stop_ids)), max_new_tokens_(max_new_tokens) {
  const std::int64_t vocab = model.config.vocab, batch = state.batch();
  seen_.assign(std::size_t(batch * vocab), 0);
  for (std::int64_t b = 0; b < batch; ++b) {
    active_.push_back(b);
    for (std::int64_t i = 0; i < length; ++i) seen_[std::size_t(b * vocab + prompts[b * length + i])] = 1;
  }
  logits_.assign(first_logits, first_logits + batch * vocab);
}

std::int64_t Generation::next(std::int64_t count, std::int32_t* out, const Poll& poll) {
  std::int64_t made = 0;
  while (made < count && step(out + made, count, poll)) ++made;
  return made;
}

// One id for every unfinished sequence, written to out[b * stride]; false when there is nothing left to do.
bool Generation::step(std::int32_t* out, std::int64_t stride, const Poll& poll) {
  if (active_.empty() || made_ == max_new_tokens_) return false;
  const std::int64_t vocab = model_.config.vocab;
  if (made_ > 0) {  // the ids of the step before move the state on
    const float* hidden = model_.hidden(last_.data(), std::int64_t(active_.size()), 1, active_.data(), state_, poll);
    model_.logits(hidden, std::int64_t(active_.size()), logits_.data());
  }
  for (std::int64_t b = 0; b < state_.batch(); ++b) out[b * stride] = -1;
  std::vector<std::int64_t> still;
  last_.clear();
  for (std::size_t k = 0; k < active_.size(); ++k) {
    const std::int64_t b = active_[k];
    std::uint8_t* seen = seen_.data() + b * vocab;
    const std::int32_t id = sampler_.sample(logits_.data() + std::int64_t(k) * vocab, vocab, seen, params_,
                                            std::uint64_t(b), std::uint64_t(made_));
    out[b * stride] = id;
    seen[id] = 1;
    if (std::find(stop_ids_.begin(), stop_ids_.end(), id) != stop_ids_.end()) continue;
    still.push_back(b);
    last_.push_back(id);
  }
  active_ = std::move(still);
  ++made_;
  return true;
}

}  // namespace slimba
