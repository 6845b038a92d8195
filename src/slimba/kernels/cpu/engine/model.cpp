// Embedding rows and states; matrix products are in matmul.cpp, the layers in forward.cpp.
#include "model.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace slimba {

void Matrix::row(std::int64_t r, float* out, float* temp) const {
  for (const Segment& s : segments) {
    if (r < s.first_row || r >= s.first_row + s.rows) continue;
    kDequantRow[s.format](s.data, s.scale, cols, r - s.first_row, out);
  }
  if (rank && r >= lowrank_start && r < lowrank_stop) {
    std::vector<float> factors(static_cast<std::size_t>(rank));
    kDequantRow[kInt8](a.data, a.scale, rank, r - lowrank_start, factors.data());
    for (std::int64_t k = 0; k < rank; ++k) {
      kDequantRow[kInt8](b.data, b.scale, cols, k, temp);
      for (std::int64_t c = 0; c < cols; ++c) out[c] += factors[std::size_t(k)] * temp[c];
    }
  }
  if (plane_cols && r >= plane_start && r < plane_stop) {
    kDequantRow[kSign](plane.data, plane.scale, plane_cols, r - plane_start, temp);
    for (std::int64_t k = 0; k < plane_cols; ++k)
      out[plane_index.empty() ? k : plane_index[std::size_t(k)]] += temp[k];
  }
  if (!col_scale.empty())
    for (std::int64_t c = 0; c < cols; ++c) out[c] *= col_scale[std::size_t(c)];
}

State::Sizes::Sizes(const Config& c) : bytes{} {
  bytes[kSsm] = c.d_inner * c.d_state * (c.state_type == kStateFloat32 ? 4 : c.state_type == kStateBfloat16 ? 2 : 1);
  bytes[kScales] = c.state_type == kStateInt8 ? c.d_inner * 4 : 0;
  bytes[kConv] = (c.d_conv - 1) * c.channels() * 4;
  if (!c.mamba2) return;
  bytes[kHeldU] = kStateBlock * c.d_inner * c.held_bytes();
  bytes[kHeldB] = kStateBlock * c.n_groups * c.d_state * c.held_bytes();
  bytes[kLogs] = kStateBlock * c.heads() * 4;
}

State::State(const Config& config, std::int64_t batch) : n_layer_(config.n_layer), batch_(batch), sizes_(config) {
  for (int p = 0; p < kParts; ++p) parts_[p].at_least(std::max<std::int64_t>(1, (n_layer_ * batch_ * sizes_.bytes[p] + 3) / 4));
  reset();
}

State State::clone() const {
  State copy(*this, Empty());
  for (int p = 0; p < kParts; ++p)
    std::memcpy(copy.parts_[p].at_least(parts_[p].size()), parts_[p].data(), std::size_t(parts_[p].size()) * 4);
  return copy;
}

void State::reset() {
  for (Buffer& part : parts_) std::memset(part.data(), 0, std::size_t(part.size()) * 4);
  filled_.assign(std::size_t(batch_), 0);
  interrupted = false;
}

std::int64_t State::bytes(const Config& c, std::int64_t batch) {
  const Sizes sizes(c);
  return c.n_layer * batch * std::accumulate(sizes.bytes, sizes.bytes + kParts, std::int64_t(0));
}

std::int64_t State::saved_bytes() const {
  return 8 + n_layer_ * std::accumulate(sizes_.bytes, sizes_.bytes + kParts, std::int64_t(0));
}

void State::save(std::int64_t b, std::uint8_t* out) {
  std::memcpy(out, &filled_[std::size_t(b)], 8);
  out += 8;
  for (std::int64_t layer = 0; layer < n_layer_; ++layer) {
    for (int p = 0; p < kParts; ++p) {
      std::memcpy(out, part(Part(p), layer, b), std::size_t(sizes_.bytes[p]));
      out += sizes_.bytes[p];
    }
  }
}

void State::load(std::int64_t b, const std::uint8_t* from) {
  std::int64_t filled;
  std::memcpy(&filled, from, 8);
  if (filled < 0 || filled >= kStateBlock) throw std::invalid_argument("this is not a saved state");
  filled_[std::size_t(b)] = filled;
  from += 8;
  for (std::int64_t layer = 0; layer < n_layer_; ++layer) {
    for (int p = 0; p < kParts; ++p) {
      std::memcpy(part(Part(p), layer, b), from, std::size_t(sizes_.bytes[p]));
      from += sizes_.bytes[p];
    }
  }
}

Model::Model(const Config& c, const Kernels& kernels, int threads) : config(c), kernels_(kernels), pool_(threads) {
  layers.resize(std::size_t(c.n_layer));
  scratch_.resize(std::size_t(pool_.threads()));
}

void Model::logits(const float* hidden, std::int64_t tokens, float* out) {
  matmul(head(), hidden, config.d_model, tokens, out, config.vocab, false);
}

}  // namespace slimba
