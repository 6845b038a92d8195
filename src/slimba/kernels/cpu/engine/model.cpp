// Matrix products over a model's row segments, embedding rows and states; the layers are in forward.cpp.
#include "model.h"

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <utility>

namespace slimba {

namespace {
constexpr std::int64_t kTokenBlock = 16, kFactorRows = 8;  // of the low-rank factors, per task
}  // namespace

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

// Activations of every token in the form that each format of this matrix wants, column scale applied.
void Model::prepare(const Matrix& m, const float* x, std::int64_t x_stride, std::int64_t tokens) {
  bool wanted[kFormats] = {};
  for (const Segment& s : m.segments) wanted[s.format] = true;
  if (m.rank) wanted[kInt8] = true;  // B is int8
  float* out[kFormats] = {};
  for (int f = 0; f < kFormats; ++f) {
    if (wanted[f]) out[f] = prepared_[f].at_least(tokens * kernels_.format[f]->prepared_floats(m.cols));
  }
  const FormatKernels& sign = *kernels_.format[kSign];
  const std::int64_t plane_stride = m.plane_cols ? sign.prepared_floats(m.plane_cols) : 0;
  float* plane = plane_prepared_.at_least(tokens * plane_stride);
  for (auto& buffer : scratch_) buffer.at_least(m.cols + m.plane_cols);
  share(tokens, tokens * m.cols * 4, [&](std::int64_t t, int thread) {
    const float* row = x + t * x_stride;
    if (!m.col_scale.empty()) {
      float* scaled = scratch_[std::size_t(thread)].data();
      for (std::int64_t c = 0; c < m.cols; ++c) scaled[c] = row[c] * m.col_scale[std::size_t(c)];
      row = scaled;
    }
    for (int f = 0; f < kFormats; ++f) {
      const FormatKernels& k = *kernels_.format[f];
      if (wanted[f]) k.prepare(row, m.cols, out[f] + t * k.prepared_floats(m.cols));
    }
    if (!m.plane_cols) return;
    if (!m.plane_index.empty()) {
      float* gathered = scratch_[std::size_t(thread)].data() + m.cols;
      for (std::int64_t k = 0; k < m.plane_cols; ++k) gathered[k] = row[m.plane_index[std::size_t(k)]];
      row = gathered;
    }
    sign.prepare(row, m.plane_cols, plane + t * plane_stride);
  });
}

// One block of t = B x, the factors of the low-rank rows; whoever does the last block prepares t for A's product.
void Model::factor_block(const Matrix& m, std::int64_t tokens, std::int64_t block, Factors& f, float* scratch) {
  const FormatKernels& int8 = *kernels_.format[kInt8];
  const std::int64_t row_blocks = (m.rank + kFactorRows - 1) / kFactorRows;
  const std::int64_t first = block / row_blocks * kTokenBlock, n = std::min(kTokenBlock, tokens - first);
  const std::int64_t begin = block % row_blocks * kFactorRows, end = std::min(begin + kFactorRows, m.rank);
  float* t = factor_.data();
  const float* x = prepared_[kInt8].data() + first * int8.prepared_floats(m.cols);
  int8.matmul({m.b.data, m.b.scale, m.rank, m.cols, begin, end, x, n, t + first * m.rank, m.rank, false, scratch});
  if (f.left.fetch_sub(1) > 1) return;
  for (std::int64_t i = 0; i < tokens; ++i)
    int8.prepare(t + i * m.rank, m.rank, factor_prepared_.data() + i * int8.prepared_floats(m.rank));
  f.ready.store(true);
}

// Rows begin .. end of the product: the segments, then the second sign plane, then the low-rank correction once its
// factors are there, then the bias.
void Model::panel(const Matrix& m, std::int64_t tokens, std::int64_t begin, std::int64_t end, const Output& out,
                  const Factors& factors, float* scratch) {
  for (const Segment& s : m.segments) {
    const std::int64_t from = std::max(begin, s.first_row), to = std::min(end, s.first_row + s.rows);
    if (from >= to) continue;
    kernels_.format[s.format]->matmul({s.data, s.scale, s.rows, m.cols, from - s.first_row, to - s.first_row,
                                       prepared_[s.format].data(), tokens, out.y + s.first_row, out.stride, out.add,
                                       scratch});
  }
  const std::int64_t first = std::max(begin, m.plane_start), last = std::min(end, m.plane_stop);
  if (m.plane_cols && first < last) {
    kernels_.format[kSign]->matmul({m.plane.data, m.plane.scale, m.plane.rows, m.plane_cols, first - m.plane_start,
                                    last - m.plane_start, plane_prepared_.data(), tokens, out.y + m.plane_start,
                                    out.stride, true, scratch});
  }
  const std::int64_t from = std::max(begin, m.lowrank_start), to = std::min(end, m.lowrank_stop);
  if (m.rank && from < to) {
    while (!factors.ready.load()) std::this_thread::yield();
    kernels_.format[kInt8]->matmul({m.a.data, m.a.scale, m.a.rows, m.rank, from - m.lowrank_start, to - m.lowrank_start,
                                    factor_prepared_.data(), tokens, out.y + m.lowrank_start, out.stride, true,
                                    scratch});
  }
  if (m.bias.empty()) return;
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t r = begin; r < end; ++r) out.y[t * out.stride + r] += m.bias[std::size_t(r)];
}

// One job for everything: first the factor blocks, which wait for nobody, then the panels, which are claimed after
// them. The last rows go first: in a mixed matrix they are the int8 ones, which take longest.
void Model::matmul(const Matrix& m, const float* x, std::int64_t x_stride, std::int64_t tokens, float* y,
                   std::int64_t y_stride, bool add) {
  prepare(m, x, x_stride, tokens);
  const FormatKernels& int8 = *kernels_.format[kInt8];
  std::int64_t scratch = 0, work = 0;
  for (const Segment& s : m.segments) {
    scratch = std::max(scratch, kernels_.format[s.format]->scratch_floats(m.cols));
    work += s.rows * m.cols / (s.format == kSign ? 4 : 1) * tokens;
  }
  if (m.plane_cols) {
    scratch = std::max(scratch, kernels_.format[kSign]->scratch_floats(m.plane_cols));
    work += m.plane.rows * m.plane_cols / 4 * tokens;
  }
  Factors factors;
  std::int64_t blocks = 0;
  if (m.rank) {
    scratch = std::max({scratch, int8.scratch_floats(m.cols), int8.scratch_floats(m.rank)});
    factor_.at_least(tokens * m.rank);
    factor_prepared_.at_least(tokens * int8.prepared_floats(m.rank));
    blocks = (tokens + kTokenBlock - 1) / kTokenBlock * ((m.rank + kFactorRows - 1) / kFactorRows);
    factors.left = blocks;
  }
  for (auto& buffer : scratch_) buffer.at_least(scratch);

  // Panels: enough of them to share the work evenly, large enough to amortise what is set up per panel.
  const std::int64_t even = (m.rows / (4 * pool_.threads()) + 63) / 64 * 64;
  const std::int64_t rows = work < kShareFrom ? m.rows : std::clamp<std::int64_t>(even, 64, tokens > 4 ? 256 : 1024);
  const std::int64_t panels = (m.rows + rows - 1) / rows;
  share(blocks + panels, work, [&](std::int64_t task, int thread) {
    float* own = scratch_[std::size_t(thread)].data();
    if (task < blocks) return factor_block(m, tokens, task, factors, own);
    const std::int64_t begin = (blocks + panels - 1 - task) * rows;
    panel(m, tokens, begin, std::min(begin + rows, m.rows), {y, y_stride, add}, factors, own);
  });
}

void Model::logits(const float* hidden, std::int64_t tokens, float* out) {
  matmul(head(), hidden, config.d_model, tokens, out, config.vocab, false);
}

}  // namespace slimba
