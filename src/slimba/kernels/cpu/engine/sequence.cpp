// See sequence.h.
#include "sequence.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace slimba {

namespace {

constexpr std::int64_t kLogitTokens = 64;  // logits kept at once when only their log-likelihood is wanted

// Calls use(first, count, hidden) for every chunk: `count` tokens of every sequence, from position `first` of the call
// on.
template <class Use>
void for_chunks(Model& model, const std::int32_t* ids, std::int64_t length, State& state, const Poll& poll, Use use) {
  const std::int64_t batch = state.batch(), step = model.chunk_tokens(batch);
  std::vector<std::int64_t> slots(static_cast<std::size_t>(batch));
  std::iota(slots.begin(), slots.end(), 0);
  std::vector<std::int32_t> chunk;
  for (std::int64_t first = 0; first < length; first += step) {
    const std::int64_t count = std::min(step, length - first);
    chunk.clear();
    for (std::int64_t b = 0; b < batch; ++b) {
      chunk.insert(chunk.end(), ids + b * length + first, ids + b * length + first + count);
    }
    use(first, count, model.hidden(chunk.data(), batch, count, slots.data(), state, poll));
  }
}

}  // namespace

void forward(Model& model, const std::int32_t* ids, std::int64_t length, State& state, float* out, const Poll& poll) {
  const std::int64_t d = model.config.d_model, vocab = model.config.vocab, batch = state.batch();
  for_chunks(model, ids, length, state, poll, [&](std::int64_t first, std::int64_t count, const float* hidden) {
    if (count == length) return model.logits(hidden, batch * count, out);  // one pass over the head's weights
    for (std::int64_t b = 0; b < batch; ++b) {
      model.logits(hidden + b * count * d, count, out + (b * length + first) * vocab);
    }
  });
}

void prefill(Model& model, const std::int32_t* ids, std::int64_t length, State& state, float* out, const Poll& poll) {
  const std::int64_t d = model.config.d_model, batch = state.batch();
  std::vector<float> last(static_cast<std::size_t>(batch * d));
  for_chunks(model, ids, length, state, poll, [&](std::int64_t first, std::int64_t count, const float* hidden) {
    if (first + count < length) return;
    for (std::int64_t b = 0; b < batch; ++b) {
      std::copy_n(hidden + (b * count + count - 1) * d, d, last.data() + b * d);
    }
  });
  model.logits(last.data(), batch, out);
}

void nll(Model& model, const std::int32_t* ids, const std::int32_t* targets, std::int64_t length, State& state,
         double* out, const Poll& poll) {
  const std::int64_t d = model.config.d_model, vocab = model.config.vocab, batch = state.batch();
  const Kernels& k = model.kernels();
  Buffer logits;
  for_chunks(model, ids, length, state, poll, [&](std::int64_t first, std::int64_t count, const float* hidden) {
    const std::int64_t tokens = batch * count;
    for (std::int64_t from = 0; from < tokens; from += kLogitTokens) {
      const std::int64_t n = std::min(kLogitTokens, tokens - from);
      float* rows = logits.at_least(n * vocab);
      model.logits(hidden + from * d, n, rows);
      std::atomic<std::int64_t> bad{-1};
      model.pool().run(n, [&](std::int64_t i, int) {
        const std::int64_t b = (from + i) / count, at = b * length + first + (from + i) % count;
        const float* row = rows + i * vocab;
        const float top = k.max(row, vocab);
        out[at] = std::log(k.sum_exp(row, vocab, top)) + double(top) - double(row[targets[at]]);
        if (!std::isfinite(out[at])) bad = at;
      });
      if (bad >= 0) {
        throw std::domain_error("the logits of sequence " + std::to_string(bad / length) + " at position " +
                                std::to_string(bad % length) +
                                " hold NaN or infinity: the weights are damaged or the state has overflowed");
      }
    }
  });
}

}  // namespace slimba
