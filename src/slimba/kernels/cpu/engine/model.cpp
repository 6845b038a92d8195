// Embedding rows and states; matrix products are in matmul.cpp, the layers in forward.cpp.
#include "model.h"

#include <algorithm>
#include <utility>

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

State::State(const Config& config, std::int64_t batch)
    : n_layer_(config.n_layer),
      ssm_bytes_(config.ssm_bytes()),
      ssm_scales_(config.ssm_scales()),
      conv_floats_(config.conv_floats()),
      batch_(batch) {
  const std::int64_t copies = n_layer_ * batch_;
  ssm_.at_least(std::max<std::int64_t>(1, (copies * ssm_bytes_ + 3) / 4));
  scales_.at_least(std::max<std::int64_t>(1, copies * ssm_scales_));
  conv_.at_least(std::max<std::int64_t>(1, copies * conv_floats_));
  reset();
}

State State::clone() const {
  State copy;
  copy.n_layer_ = n_layer_;
  copy.ssm_bytes_ = ssm_bytes_;
  copy.ssm_scales_ = ssm_scales_;
  copy.conv_floats_ = conv_floats_;
  copy.batch_ = batch_;
  copy.interrupted = interrupted;
  for (auto [to, from] : {std::pair{&copy.ssm_, &ssm_}, {&copy.scales_, &scales_}, {&copy.conv_, &conv_}})
    std::memcpy(to->at_least(from->size()), from->data(), std::size_t(from->size()) * 4);
  return copy;
}

void State::reset() {
  for (Buffer* part : {&ssm_, &scales_, &conv_}) std::memset(part->data(), 0, std::size_t(part->size()) * 4);
  interrupted = false;
}

Model::Model(const Config& c, const Kernels& kernels, int threads) : config(c), kernels_(kernels), pool_(threads) {
  layers.resize(std::size_t(c.n_layer));
  scratch_.resize(std::size_t(pool_.threads()));
}

void Model::logits(const float* hidden, std::int64_t tokens, float* out) {
  matmul(head(), hidden, config.d_model, tokens, out, config.vocab, false);
}

}  // namespace slimba
