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
constexpr std::int64_t kChunkTokens = 128;   // tokens of all sequences together in one chunk
constexpr std::int64_t kConvBlock = 512;     // channels per task
constexpr std::int64_t kChannelBlock = 128;  // Mamba-1 channels per task

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

std::int64_t Model::chunk_tokens(std::int64_t sequences) { return std::max<std::int64_t>(1, kChunkTokens / sequences); }

const float* Model::hidden(const std::int32_t* ids, std::int64_t n, std::int64_t length, const std::int64_t* slots,
                           State& state, const Poll& poll) {
  if (state.interrupted)
    throw std::invalid_argument("this state was interrupted in the middle of a step: reset() it first");
  state.interrupted = true;
  const Chunk c = {n, length, n * length, slots, state};
  const std::int64_t d = config.d_model;
  float* u = residual_.at_least(c.tokens * d);
  float* x = normed_.at_least(c.tokens * d);
  for (auto& buffer : scratch_) buffer.at_least(d);
  share(c.tokens, c.tokens * d,
        [&](std::int64_t t, int thread) { embedding.row(ids[t], u + t * d, scratch_[std::size_t(thread)].data()); });
  const auto norm = [&](const std::vector<float>& weight) {
    share(c.tokens, c.tokens * d,
          [&](std::int64_t t, int) { kernels_.rms_norm(u + t * d, weight.data(), d, config.norm_eps, x + t * d); });
  };
  for (std::int64_t i = 0; i < config.n_layer; ++i) {
    const Layer& layer = layers[std::size_t(i)];
    poll();
    norm(layer.norm);
    float* p = projected_.at_least(c.tokens * layer.in_proj.rows);
    matmul(layer.in_proj, x, d, c.tokens, p, layer.in_proj.rows, false);
    if (config.mamba2) mixer2(layer, i, c);
    else mixer1(layer, i, c);
    matmul(layer.out_proj, y_.data(), config.d_inner, c.tokens, u, d, true);
  }
  norm(norm_f);
  state.interrupted = false;
  return x;
}

void Model::conv(const Layer& layer, std::int64_t index, const Chunk& c, const float* in, std::int64_t in_stride) {
  const std::int64_t channels = config.channels(), blocks = (channels + kConvBlock - 1) / kConvBlock;
  float* out = conv_out_.at_least(c.tokens * channels);
  share(c.sequences * blocks, c.tokens * channels * 16, [&](std::int64_t task, int) {
    const std::int64_t s = task / blocks, first = task % blocks * kConvBlock;
    const std::int64_t row = s * c.length, width = std::min(kConvBlock, channels - first);
    kernels_.conv_silu({in + row * in_stride + first, in_stride, c.length, width,
                        layer.conv_weight.data() + first, channels,
                        layer.conv_bias.empty() ? nullptr : layer.conv_bias.data() + first, int(config.d_conv),
                        c.state.conv(index, c.slots[s]) + first, out + row * channels + first, channels});
    if (layer.conv_scale.empty() || !config.int8_activations) return;
    for (std::int64_t t = 0; t < c.length; ++t)
      round_to_scale(layer.conv_scale.data() + first, width, out + (row + t) * channels + first);
  });
}

// In: projected_ [T, z | x | B | C | dt]. Out: y_ [T, I], ready for out_proj.
void Model::mixer2(const Layer& layer, std::int64_t index, const Chunk& c) {
  const std::int64_t inner = config.d_inner, heads = config.heads(), n = config.d_state, p = config.headdim;
  const std::int64_t stride = layer.in_proj.rows, channels = config.channels(), per_group = heads / config.n_groups;
  const float* projected = projected_.data();
  conv(layer, index, c, projected + inner, stride);
  float* dt = dt_.at_least(c.tokens * heads);
  float* decay = decay_.at_least(c.tokens * heads);
  share(c.tokens, c.tokens * heads * 64, [&](std::int64_t t, int) {
    kernels_.softplus(projected + t * stride + inner + channels, layer.dt_bias.data(), heads, config.dt_low,
                      config.dt_high, dt + t * heads);
    kernels_.decay(dt + t * heads, layer.a.data(), heads, decay + t * heads);
  });
  float* y = y_.at_least(c.tokens * inner);
  const std::int64_t state_bytes = config.ssm_bytes() / heads;
  for (auto& buffer : scratch_) buffer.at_least((n + 15) / 16 * 16);
  share(c.sequences * heads, c.tokens * inner * n, [&](std::int64_t task, int thread) {
    const std::int64_t s = task / heads, h = task % heads, row = s * c.length;
    const float* x = conv_out_.data() + row * channels;
    const float* b = x + inner + h / per_group * n;
    kernels_.ssm2({c.length, p, n, x + h * p, b, b + config.n_groups * n, channels, dt + row * heads + h,
                   decay + row * heads + h, heads, layer.d.data() + (config.d_has_hdim ? h * p : h), config.d_has_hdim,
                   config.state_type, c.state.ssm(index, c.slots[s]) + h * state_bytes,
                   c.state.scales(index, c.slots[s]) + h * p, y + row * inner + h * p, inner,
                   scratch_[std::size_t(thread)].data()});
  });
  gate2(layer, c);
}

// y_ = norm(y * silu(z)), norm(y) * silu(z) or y * silu(z), one RMS per norm_group_size channels.
void Model::gate2(const Layer& layer, const Chunk& c) {
  const std::int64_t inner = config.d_inner, group = config.norm_group_size, stride = layer.in_proj.rows;
  share(c.tokens, c.tokens * inner * 16, [&](std::int64_t t, int) {
    float* y = y_.data() + t * inner;
    const float* z = projected_.data() + t * stride;
    const auto norm = [&] {
      for (std::int64_t g = 0; g < inner; g += group) {
        kernels_.rms_norm(y + g, layer.gated_norm.data() + g, group, config.norm_eps, y + g);
      }
    };
    if (config.gated_norm && config.norm_before_gate) norm();
    kernels_.gate(y, z, inner, y);
    if (config.gated_norm && !config.norm_before_gate) norm();
  });
}

// In: projected_ [T, x | z]. Out: y_ [T, I].
void Model::mixer1(const Layer& layer, std::int64_t index, const Chunk& c) {
  const std::int64_t inner = config.d_inner, n = config.d_state, rank = config.dt_rank, stride = layer.in_proj.rows;
  const std::int64_t width = rank + 2 * n;
  conv(layer, index, c, projected_.data(), stride);
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
  const std::int64_t state_bytes = config.ssm_bytes() / inner;
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
                   layer.d.data() + first, config.state_type, c.state.ssm(index, c.slots[s]) + first * state_bytes,
                   c.state.scales(index, c.slots[s]) + first, y + row * inner + first, inner,
                   scratch_[std::size_t(thread)].data()});
    for (std::int64_t t = row; t < row + c.length; ++t) {
      kernels_.gate(y + t * inner + first, projected_.data() + t * stride + inner + first, count,
                    y + t * inner + first);
    }
  });
}

}  // namespace slimba
