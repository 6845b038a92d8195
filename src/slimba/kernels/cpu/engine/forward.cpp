// One chunk of tokens through all layers: embedding, Mamba-1 or Mamba-2 mixers, final norm.
//
// Sequences lie side by side as [n, length] tokens; the recurrence runs over the tokens of a sequence in order and
// threads share heads and sequences. Equations: docs of models/mamba1.py and models/mamba2.py, which are the ground
// truth.
#include <algorithm>
#include <stdexcept>

#include "model.h"

namespace slimba {

namespace {
constexpr std::int64_t kChunkTokens = 128;   // tokens of all sequences together in one chunk, whose look-ups stay in a cache
constexpr std::int64_t kLongChunk = 256;     // with many threads, which each have a cache
constexpr std::int64_t kConvBlock = 128, kConvFine = 32;  // channels per task; with many threads
constexpr std::int64_t kChannelBlock = 128;  // Mamba-1 channels per task
constexpr std::int64_t kHeadTasks = 2;       // tasks of heads, a thread; half of it where there are many threads
constexpr std::int64_t kPromptTasks = 4;     // the same in a prompt

// To int8 and back with a scale a channel; codes saturate at +-127, NaN stays NaN.
void round_to_scale(const float* scale, std::int64_t n, float* x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to nearest, ties to even
  for (std::int64_t i = 0; i < n; ++i) {
    float v = x[i] * (1.0f / scale[i]);
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    x[i] = ((v + kToInteger) - kToInteger) * scale[i];
  }
}
}  // namespace

std::int64_t Model::chunk_tokens(std::int64_t sequences) const {
  return std::max<std::int64_t>(1, (many_threads() ? kLongChunk : kChunkTokens) / sequences);
}

const float* Model::hidden(const std::int32_t* ids, std::int64_t n, std::int64_t length, const std::int64_t* slots,
                           State& state, const Poll& poll) {
  if (state.interrupted)
    throw std::invalid_argument("this state was interrupted in the middle of a step: reset() it first");
  state.interrupted = true;
  weigh();
  const ThreadPool::Burst burst(pool_, length > 1);
  const Chunk c = {n, length, n * length, slots, state};
  const std::int64_t d = config.d_model;
  float* u = residual_.at_least(c.tokens * d);
  float* x = normed_.at_least(c.tokens * d);
  for (auto& buffer : scratch_) buffer.at_least(d);
  share(c.tokens, c.tokens * d,
        [&](std::int64_t t, int thread) { embedding.row(ids[t], u + t * d, scratch_[std::size_t(thread)].data()); });
  const auto norm = [&](const std::vector<float>& weight, std::int64_t t) {
    kernels_.rms_norm(u + t * d, weight.data(), d, config.norm_eps, x + t * d);
    return x + t * d;
  };
  for (std::int64_t i = 0; i < config.n_layer; ++i) {
    Layer& layer = layers[std::size_t(i)];
    poll();
    if (config.mamba2) expect_states(i, c);
    else pool_.expect(nullptr);
    float* p = projected_.at_least(c.tokens * layer.in_proj.rows);
    matmul(layer.in_proj, [&](std::int64_t t) { return norm(layer.norm, t); }, c.tokens, p, layer.in_proj.rows, false);
    if (config.mamba2) mixer2(layer, i, c);
    else mixer1(layer, i, c);
    expect(i + 1 < config.n_layer ? layers[std::size_t(i + 1)].in_proj : head(), c.tokens);
    matmul(layer.out_proj, [&](std::int64_t t) { return norm2(layer, t); }, c.tokens, u, d, true);
  }
  pool_.expect(nullptr);
  share(c.tokens, c.tokens * d, [&](std::int64_t t, int) { norm(norm_f, t); });
  for (std::int64_t s = 0; s < n; ++s) state.advance(slots[s], length);
  state.interrupted = false;
  return x;
}

// Channels first .. first + count of sequence s, to out [T, out_stride]; `keep`: the convolution's state moves on.
void Model::conv_channels(const Layer& layer, std::int64_t index, const Chunk& c, std::int64_t s, std::int64_t first,
                          std::int64_t count, float* out, std::int64_t out_stride, bool keep) {
  const std::int64_t channels = config.channels(), stride = layer.in_proj.rows, row = s * c.length;
  const float* in = projected_.data() + (config.mamba2 ? config.d_inner : 0);
  kernels_.conv_silu({in + row * stride + first, stride, c.length, count, layer.conv_weight.data() + first, channels,
                      layer.conv_bias.empty() ? nullptr : layer.conv_bias.data() + first, int(config.d_conv),
                      c.state.floats(State::kConv, index, c.slots[s]) + first, out, out_stride, keep});
  if (layer.conv_scale.empty() || !config.int8_activations) return;
  for (std::int64_t t = 0; t < c.length; ++t) round_to_scale(layer.conv_scale.data() + first, count, out + t * out_stride);
}

void Model::conv(const Layer& layer, std::int64_t index, const Chunk& c) {
  const std::int64_t channels = config.channels(), width = many_threads() ? kConvFine : kConvBlock;
  const std::int64_t blocks = (channels + width - 1) / width;
  share(c.sequences * blocks, c.tokens * channels * 16, [&](std::int64_t task, int) {
    const std::int64_t s = task / blocks, first = task % blocks * width;
    float* out = conv_out_.data() + s * c.length * channels + first;
    conv_channels(layer, index, c, s, first, std::min(width, channels - first), out, channels, true);
  });
}

// In: projected_ [T, z | x | B | C | dt]. Out: y_ [T, I], ready for out_proj.
void Model::mixer2(Layer& layer, std::int64_t index, const Chunk& c) {
  const std::int64_t heads = config.heads(), groups = config.n_groups, per_group = heads / groups;
  conv_out_.at_least(c.tokens * config.channels());
  if (c.length > 1) conv(layer, index, c);  // a single token's is computed by those who need it, one job less
  y_.at_least(c.tokens * config.d_inner);
  for (auto& buffer : scratch_) buffer.at_least(ssm2_work_floats(config.d_state) + 2 * config.d_state + kStateBlock * heads);
  const std::int64_t count = heads_a_task(c.tokens, c.sequences), parts = (per_group + count - 1) / count;
  expect(layer.out_proj, c.tokens);
  share(c.sequences * groups * parts, c.tokens * config.d_inner * config.d_state, [&](std::int64_t task, int thread) {
    const std::int64_t s = task / (groups * parts), g = task / parts % groups, first = task % parts * count;
    heads2(layer, index, c, {s, g * per_group + first, std::min(count, per_group - first)},
           scratch_[std::size_t(thread)].data());
  });
  hold2(layer, index, c);
}

// A task shares the products of B and C between its heads, so it has more than one where there are enough.
std::int64_t Model::heads_a_task(std::int64_t tokens, std::int64_t sequences) const {
  const std::int64_t per_group = config.heads() / config.n_groups;
  const std::int64_t each = (tokens > sequences ? kPromptTasks : kHeadTasks) / (many_threads() ? 2 : 1);
  const std::int64_t tasks = each * pool_.threads() / sequences / config.n_groups;
  return std::clamp<std::int64_t>(per_group / std::max<std::int64_t>(1, tasks), 1, per_group);
}

void Model::expect_states(std::int64_t index, const Chunk& c) {
  if (c.tokens > 1 || pool_.threads() == 1) return pool_.expect(nullptr);
  const std::int64_t heads = config.heads(), groups = config.n_groups, per_group = heads / groups, n = pool_.threads();
  const std::int64_t count = heads_a_task(1, 1), parts = (per_group + count - 1) / count, tasks = groups * parts;
  const std::int64_t head_bytes = State::Sizes(config).bytes[State::kSsm] / heads;
  states_first_.resize(std::size_t(n));
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t task = std::min(tasks - 1, tasks * i / n), h = task / parts * per_group + task % parts * count;
    states_first_[std::size_t(i)] = {c.state.part(State::kSsm, index, c.slots[0]) + h * head_bytes, count * head_bytes,
                                       nullptr, 0};
  }
  pool_.expect(states_first_.data());
}

// Step sizes, recurrence in blocks of the buffer, gate.
void Model::heads2(const Layer& layer, std::int64_t index, const Chunk& c, const Heads& part, float* scratch) {
  const std::int64_t inner = config.d_inner, heads = config.heads(), n = config.d_state, p = config.headdim;
  const std::int64_t h = part.first, g = h / (heads / config.n_groups), channels = config.channels();
  const std::int64_t slot = c.slots[part.sequence], row = part.sequence * c.length, stride = layer.in_proj.rows;
  float* own = scratch + ssm2_work_floats(n);
  float* dt = own + 2 * n;  // [kStateBlock, count] of a block; in one array, threads would write to the same cache lines
  const float *b = conv_out_.data() + row * channels + inner + g * n, *after = b + config.n_groups * n;
  if (c.length == 1) {
    conv_channels(layer, index, c, part.sequence, h * p, part.count * p, conv_out_.data() + row * channels + h * p,
                  channels, true);
    conv_channels(layer, index, c, part.sequence, inner + g * n, n, own, channels, false);  // everybody makes B and C
    conv_channels(layer, index, c, part.sequence, inner + (config.n_groups + g) * n, n, own + n, channels, false);
    b = own, after = own + n;
  }
  const std::int64_t width = config.held_bytes(), head_bytes = State::Sizes(config).bytes[State::kSsm] / heads;
  const bool gated = !config.gated_norm || !config.norm_before_gate;
  std::int64_t filled = c.state.filled(slot);
  for (std::int64_t t = row; t < row + c.length;) {
    const std::int64_t tokens = std::min(kStateBlock - filled, row + c.length - t);
    const float* z = projected_.data() + t * stride + h * p;
    for (std::int64_t i = 0; i < tokens; ++i) {
      kernels_.softplus(projected_.data() + (t + i) * stride + inner + channels + h, layer.dt_bias.data() + h, part.count,
                        config.dt_low, config.dt_high, dt + i * part.count);
    }
    for (std::int64_t i = 0; i < tokens && tokens > 1; ++i) {  // what the gate reads, and the next block's steps
      for (std::int64_t k = 0; k < part.count * p && gated; k += 16) __builtin_prefetch(z + i * stride + k, 0, 2);
      __builtin_prefetch(z + (kStateBlock + i) * stride + inner - h * p + channels + h, 0, 2);
    }
    const std::int64_t skip = (t - row) * channels;
    const float* x = conv_out_.data() + row * channels + h * p;
    kernels_.ssm2({tokens, part.count, p, n, x + skip, b + skip, after + skip, channels, dt, part.count,
                   layer.a.data() + h, layer.d.data() + (config.d_has_hdim ? h * p : h), config.d_has_hdim,
                   config.state_type, c.state.part(State::kSsm, index, slot) + h * head_bytes,
                   c.state.floats(State::kScales, index, slot) + h * p, filled,
                   c.state.part(State::kHeldU, index, slot) + h * kStateBlock * p * width,
                   c.state.part(State::kHeldB, index, slot) + g * kStateBlock * n * width,
                   c.state.floats(State::kLogs, index, slot) + h * kStateBlock, y_.data() + t * inner + h * p, inner,
                   scratch, once_});
    for (std::int64_t i = 0; i < tokens && gated; ++i) {
      float* y = y_.data() + (t + i) * inner + h * p;
      kernels_.gate(y, z + i * stride, part.count * p, y);
    }
    t += tokens;
    filled = (filled + tokens) % kStateBlock;
  }
}

// B of the tokens after the last multiple of kStateBlock, for the next call.
void Model::hold2(const Layer& layer, std::int64_t index, const Chunk& c) {
  const std::int64_t n = config.d_state, channels = config.channels(), width = config.held_bytes();
  for (std::int64_t s = 0; s < c.sequences; ++s) {
    if (c.length == 1) {  // nobody needs the old state of B and C any more
      float* out = conv_out_.data() + s * channels + config.d_inner;
      conv_channels(layer, index, c, s, config.d_inner, channels - config.d_inner, out, channels, true);
    }
    const std::int64_t end = c.state.filled(c.slots[s]) + c.length, left = end % kStateBlock;
    for (std::int64_t t = std::max<std::int64_t>(0, c.length - left); t < c.length; ++t) {
      const std::int64_t j = (c.state.filled(c.slots[s]) + t) % kStateBlock;
      const float* b = conv_out_.data() + (s * c.length + t) * channels + config.d_inner;
      for (std::int64_t g = 0; g < config.n_groups; ++g) {
        kernels_.hold(config.state_type, b + g * n, n,
                      c.state.part(State::kHeldB, index, c.slots[s]) + (g * kStateBlock + j) * n * width);
      }
    }
  }
}

// Token t's row of y_, out_proj's input. Mamba-2's, gated already, becomes norm(y * silu(z)); or norm(y) * silu(z): one RMS
// per norm_group_size channels.
const float* Model::norm2(const Layer& layer, std::int64_t t) {
  const std::int64_t inner = config.d_inner, group = config.norm_group_size;
  float* y = y_.data() + t * inner;
  if (!config.mamba2 || !config.gated_norm) return y;
  for (std::int64_t g = 0; g < inner; g += group)
    kernels_.rms_norm(y + g, layer.gated_norm.data() + g, group, config.norm_eps, y + g);
  if (config.norm_before_gate) kernels_.gate(y, projected_.data() + t * layer.in_proj.rows, inner, y);
  return y;
}

// In: projected_ [T, x | z]. Out: y_ [T, I].
void Model::mixer1(const Layer& layer, std::int64_t index, const Chunk& c) {
  const std::int64_t inner = config.d_inner, n = config.d_state, rank = config.dt_rank, stride = layer.in_proj.rows;
  const std::int64_t width = rank + 2 * n;
  conv_out_.at_least(c.tokens * inner);
  conv(layer, index, c);
  const float* x = conv_out_.data();
  float* bcdt = bcdt_.at_least(c.tokens * width);  // dt | B | C
  matmul(layer.x_proj, x, inner, c.tokens, bcdt, width, false);
  if (config.bcdt_norm) {  // Falcon-Mamba
    share(c.tokens, c.tokens * width, [&](std::int64_t t, int) {
      float* row = bcdt + t * width;
      kernels_.rms_norm(row, nullptr, rank, config.bcdt_norm_eps, row);
      kernels_.rms_norm(row + rank, nullptr, n, config.bcdt_norm_eps, row + rank);
      kernels_.rms_norm(row + rank + n, nullptr, n, config.bcdt_norm_eps, row + rank + n);
    });
  }
  float* dt = dt_.at_least(c.tokens * inner);
  matmul(layer.dt_proj, bcdt, width, c.tokens, dt, inner, false);
  float* y = y_.at_least(c.tokens * inner);
  const std::int64_t blocks = (inner + kChannelBlock - 1) / kChannelBlock;
  const std::int64_t state_bytes = State::Sizes(config).bytes[State::kSsm] / inner;
  for (auto& buffer : scratch_) buffer.at_least((n + 15) / 16 * 16);
  share(c.sequences * blocks, c.tokens * inner * n * 4, [&](std::int64_t task, int thread) {
    const std::int64_t s = task / blocks, first = task % blocks * kChannelBlock, row = s * c.length;
    const std::int64_t count = std::min(kChannelBlock, inner - first);
    for (std::int64_t t = row; t < row + c.length; ++t) {
      float* v = dt + t * inner + first;
      kernels_.softplus(v, layer.dt_bias.data() + first, count, 0.0f, config.dt_high, v);
    }
    kernels_.ssm1({c.length, count, n, x + row * inner + first, inner, bcdt + row * width + rank,
                   bcdt + row * width + rank + n, width, dt + row * inner + first, inner, layer.a.data() + first * n,
                   layer.d.data() + first, config.state_type, c.state.part(State::kSsm, index, c.slots[s]) + first * state_bytes,
                   c.state.floats(State::kScales, index, c.slots[s]) + first, y + row * inner + first, inner,
                   scratch_[std::size_t(thread)].data()});
    for (std::int64_t t = row; t < row + c.length; ++t) {
      kernels_.gate(y + t * inner + first, projected_.data() + t * stride + inner + first, count,
                    y + t * inner + first);
    }
  });
}

}  // namespace slimba
