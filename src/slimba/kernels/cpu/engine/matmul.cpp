// Matrix products over row segments in their formats, with float32 or int8 activations: what the parts of a matrix want of
// its input is prepared once, then threads share panels of rows.
#include <algorithm>
#include <thread>

#include "model.h"

namespace slimba {

namespace {

constexpr std::int64_t kFewTokens = 4;     // up to which the bytes of a matrix are what takes the time
constexpr std::int64_t kPlaneAhead = 1 << 14;  // bytes of a plane; from there on its kernel fetches ahead
constexpr std::int64_t kExpected = 1 << 17;  // bytes, a good part of a second-level cache
constexpr std::int64_t kBytesOfEight[kFormats] = {32, 16, 16, 8, 4, 1};  // columns
constexpr std::int64_t kFactorRows = 16;  // of a low-rank correction's B, per task

std::int64_t padded(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }
std::int64_t sums_of(std::int64_t cols) { return (cols + 127) / 128 + 1; }  // see QuantArgs
const QuantInput& input_of(const QuantFormat& k, std::int64_t tokens) {
  return tokens <= k.few_tokens ? k.few_input : k.many_input;
}
bool quantised(Format f) { return f == kInt8 || f == kInt4 || f == kSign; }

// Kernels::quantize with a scale that is given: codes saturate at +-127. Returns the scale, NaN for a damaged token.
float quantize_fixed(const float* x, std::int64_t n, float scale, std::int8_t* q, std::int32_t* sums) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to nearest, ties to even
  const float inverse = 1.0f / scale;
  float poison = 0;
  std::int32_t total = 0;
  for (std::int64_t first = 0; first < n; first += 128) {
    std::int32_t sum = 0;
    for (std::int64_t i = first; i < std::min(n, first + 128); ++i) {
      poison += x[i] - x[i];
      const float v = std::clamp(x[i] * inverse, -127.0f, 127.0f);
      q[i] = std::int8_t(poison == 0 ? (v + kToInteger) - kToInteger : 0.0f);
      sum += q[i];
    }
    total += *sums++ = sum;
  }
  std::fill(q + n, q + padded(n, 64), std::int8_t(0));
  *sums = total;
  return poison == 0 ? scale : __builtin_nanf("");
}

template <class T>
T* elements(Buffer& b, std::int64_t count) {
  return reinterpret_cast<T*>(b.at_least((count * std::int64_t(sizeof(T)) + 3) / 4));
}

}  // namespace

std::int64_t Matrix::bytes() const {
  std::int64_t sum = rank * cols + (lowrank_stop - lowrank_start) * rank + (plane_stop - plane_start) * padded(plane_cols, 64) / 8;
  for (const Segment& s : segments) sum += s.rows * cols * kBytesOfEight[s.format] / 8;
  return sum;
}

void Model::weigh() {
  if (bytes_ >= 0) return;
  bytes_ = embedding.bytes() + lm_head.bytes();
  for (const Layer& l : layers) bytes_ += l.in_proj.bytes() + l.x_proj.bytes() + l.dt_proj.bytes() + l.out_proj.bytes();
  once_ = kernels_.cached_bytes && bytes_ > kernels_.cached_bytes;
}

// Room for what `wanted` formats need of `tokens` inputs.
Model::Input Model::make_input(InputBuffers& b, const bool (&wanted)[kFormats], std::int64_t cols, std::int64_t tokens,
                               bool int8) {
  Input in = {};
  in.tokens = tokens;
  in.int8 = int8;
  if (int8) {
    in.q_stride = padded(cols, 64) + 64;  // not a power of two, or tokens would fight for the same cache sets
    in.q = elements<std::int8_t>(b.q, padded(tokens, kQuantBlock) * in.q_stride);
    in.q_scale = b.scale.at_least(tokens);
    in.q_sums = elements<std::int32_t>(b.sums, tokens * sums_of(cols));
  }
  for (int f = 0; f < kFormats; ++f) {
    if (!wanted[f]) continue;
    if (int8 && quantised(Format(f))) {
      const QuantFormat& k = *kernels_.quant[f];
      const std::int64_t bytes = input_of(k, tokens).bytes(cols);
      if (bytes) in.q_prepared[f] = elements<std::uint8_t>(b.prepared[f], tokens * bytes);
    } else {
      in.floats[f] = b.floats[f].at_least(tokens * kernels_.format[f]->prepared_floats(cols));
    }
  }
  return in;
}

Model::Inputs Model::prepare(const Matrix& m, const Row& row, std::int64_t tokens) {
  bool wanted[kFormats] = {}, plane[kFormats] = {};
  for (const Segment& s : m.segments) wanted[s.format] = true;
  if (m.rank) wanted[kInt8] = true;  // B is int8
  const bool int8 = config.int8_activations && m.takes_int8();
  Inputs in = {make_input(whole_, wanted, m.cols, tokens, int8), {}};
  if (m.plane_cols) {
    plane[kSign] = true;
    in.plane = make_input(plane_, plane, m.plane_cols, tokens, int8);
    in.plane.q_scale = in.whole.q_scale;
  }
  for (auto& buffer : scratch_) buffer.at_least(m.cols + m.plane_cols);
  share(tokens, tokens * m.cols * 4, [&](std::int64_t t, int thread) {
    prepare_token(m, in, row(t), t, scratch_[std::size_t(thread)].data());
  });
  return in;
}

// One token: transform, column scale, rounding, and every form that was asked for; scratch holds cols + plane_cols floats.
void Model::prepare_token(const Matrix& m, const Inputs& in, const float* row, std::int64_t t, float* scratch) {
  const Input &whole = in.whole, &plane = in.plane;
  if (m.hadamard) {
    std::copy(row, row + m.cols, scratch);
    kernels_.hadamard(scratch, m.cols, m.hadamard);
    row = scratch;
  }
  if (!m.col_scale.empty()) {
    for (std::int64_t c = 0; c < m.cols; ++c) scratch[c] = row[c] * m.col_scale[std::size_t(c)];
    row = scratch;
  }
  const auto for_few = [&](const Input& i, int f, const std::int8_t* q, std::int64_t cols) {
    const QuantInput& k = input_of(*kernels_.quant[f], i.tokens);
    if (i.q_prepared[f]) k.prepare(q, cols, const_cast<std::uint8_t*>(i.q_prepared[f]) + t * k.bytes(cols));
  };
  std::int8_t* q = const_cast<std::int8_t*>(whole.q) + t * whole.q_stride;
  if (whole.int8) {
    float* scale = const_cast<float*>(whole.q_scale) + t;
    std::int32_t* sums = const_cast<std::int32_t*>(whole.q_sums) + t * sums_of(m.cols);
    if (m.input_scale > 0) *scale = quantize_fixed(row, m.cols, m.input_scale, q, sums);
    else kernels_.quantize(row, m.cols, q, scale, sums);
    for (const int f : {kInt8, kInt4, kSign}) for_few(whole, f, q, m.cols);
    if (whole.floats[kFloat32] || whole.floats[kFloat16] || whole.floats[kBfloat16]) {  // they see the rounded input
      for (std::int64_t c = 0; c < m.cols; ++c) scratch[c] = float(q[c]) * *scale;
      row = scratch;
    }
  }
  for (int f = 0; f < kFormats; ++f) {
    const FormatKernels& k = *kernels_.format[f];
    if (whole.floats[f]) k.prepare(row, m.cols, const_cast<float*>(whole.floats[f]) + t * k.prepared_floats(m.cols));
  }
  if (!m.plane_cols) return;
  const auto column = [&](std::int64_t k) { return m.plane_index.empty() ? k : m.plane_index[std::size_t(k)]; };
  if (plane.int8) {
    std::int8_t* chosen = const_cast<std::int8_t*>(plane.q) + t * plane.q_stride;
    std::int32_t* sums = const_cast<std::int32_t*>(plane.q_sums) + t * sums_of(m.plane_cols);
    std::int32_t total = 0;
    for (std::int64_t k = 0; k < m.plane_cols; ++k) total += chosen[k] = q[column(k)];
    std::fill(chosen + m.plane_cols, chosen + padded(m.plane_cols, 64), std::int8_t(0));
    sums[sums_of(m.plane_cols) - 1] = total;  // all that signs look at
    for_few(plane, kSign, chosen, m.plane_cols);
  } else {
    const FormatKernels& k = *kernels_.format[kSign];
    float* chosen = scratch + m.cols;
    for (std::int64_t i = 0; i < m.plane_cols; ++i) chosen[i] = row[column(i)];
    k.prepare(chosen, m.plane_cols, const_cast<float*>(plane.floats[kSign]) + t * k.prepared_floats(m.plane_cols));
  }
}

// Rows begin .. end of a segment, into the columns of out.y that are its own.
void Model::rows(const Segment& s, std::int64_t cols, std::int64_t begin, std::int64_t end, const Input& in,
                 const Output& out, float* scratch) {
  if (!in.int8 || !quantised(s.format)) {
    return kernels_.format[s.format]->matmul({s.data, s.scale, s.rows, cols, begin, end, in.floats[s.format], in.tokens,
                                              out.y, out.stride, out.add, scratch});
  }
  const QuantFormat& k = *kernels_.quant[s.format];
  const auto product = in.tokens <= k.few_tokens ? k.few : k.many;
  product({s.data, s.scale, s.rows, cols, begin, end, in.q, in.q_stride, in.q_scale, in.q_sums,
           in.q_prepared[s.format], in.tokens, out.y, out.stride, out.add, reinterpret_cast<std::uint8_t*>(scratch),
           once_});
}

// One block of t = B x, the factors of the low-rank rows; whoever does the last block prepares t for A's product.
void Model::factor_block(const Matrix& m, const Input& in, std::int64_t block, Factors& f, float* scratch) {
  const FormatKernels& int8 = *kernels_.format[kInt8];
  const std::int64_t row_blocks = (m.rank + kFactorRows - 1) / kFactorRows;
  const std::int64_t first = block / row_blocks * kQuantBlock, n = std::min(kQuantBlock, in.tokens - first);
  const std::int64_t begin = block % row_blocks * kFactorRows, end = std::min(begin + kFactorRows, m.rank);
  Input some = in;
  some.tokens = n;
  some.q += first * in.q_stride;
  if (in.int8) {
    const QuantFormat& k = *kernels_.quant[kInt8];
    some.q_scale += first;
    some.q_sums += first * sums_of(m.cols);
    if (in.q_prepared[kInt8]) some.q_prepared[kInt8] += first * input_of(k, in.tokens).bytes(m.cols);
  } else {
    some.floats[kInt8] += first * int8.prepared_floats(m.cols);
  }
  float* t = factor_.data();
  rows(m.b, m.cols, begin, end, some, {t + first * m.rank, m.rank, false}, scratch);
  if (f.left.fetch_sub(1) > 1) return;
  for (std::int64_t i = 0; i < in.tokens; ++i)
    int8.prepare(t + i * m.rank, m.rank, factor_prepared_.data() + i * int8.prepared_floats(m.rank));
  f.ready.store(true);
}

// Rows begin .. end of the product: the segments, then the second sign plane, then the low-rank correction once its
// factors are there, then the bias.
void Model::panel(const Matrix& m, const Inputs& in, std::int64_t begin, std::int64_t end, const Output& out,
                  const Factors& factors, float* scratch) {
  const std::int64_t first = std::max(begin, m.plane_start), last = std::min(end, m.plane_stop);
  if (m.plane_cols && in.whole.tokens <= kFewTokens) {  // meanwhile its second plane's beginning is fetched
    const std::int64_t bytes = padded(m.plane_cols, 64) / 8, from = (first - m.plane_start) * bytes;
    for (std::int64_t i = 0; i < std::min((last - first) * bytes, kPlaneAhead); i += 64)
      __builtin_prefetch(m.plane.data + from + i, 0, 2);
  }
  for (const Segment& s : m.segments) {
    const std::int64_t from = std::max(begin, s.first_row), to = std::min(end, s.first_row + s.rows);
    if (from >= to) continue;
    rows(s, m.cols, from - s.first_row, to - s.first_row, in.whole, {out.y + s.first_row, out.stride, out.add}, scratch);
  }
  if (m.plane_cols && first < last) {
    rows(m.plane, m.plane_cols, first - m.plane_start, last - m.plane_start, in.plane,
         {out.y + m.plane_start, out.stride, true}, scratch);
  }
  const std::int64_t from = std::max(begin, m.lowrank_start), to = std::min(end, m.lowrank_stop);
  if (m.rank && from < to) {
    while (!factors.ready.load()) std::this_thread::yield();
    kernels_.format[kInt8]->matmul({m.a.data, m.a.scale, m.a.rows, m.rank, from - m.lowrank_start, to - m.lowrank_start,
                                    factor_prepared_.data(), in.whole.tokens, out.y + m.lowrank_start, out.stride, true,
                                    scratch});
  }
  if (m.bias.empty()) return;
  for (std::int64_t t = 0; t < in.whole.tokens; ++t)
    for (std::int64_t r = begin; r < end; ++r) out.y[t * out.stride + r] += m.bias[std::size_t(r)];
}

std::int64_t Model::scratch_floats(const Matrix& m, const Inputs& in) const {
  const auto of = [&](Format f, std::int64_t cols) {
    const bool int8 = in.whole.int8 && quantised(f);
    return int8 ? (kernels_.quant[f]->scratch_bytes(cols) + 3) / 4 : kernels_.format[f]->scratch_floats(cols);
  };
  std::int64_t most = m.rank ? std::max(of(kInt8, m.cols), kernels_.format[kInt8]->scratch_floats(m.rank)) : 0;
  if (m.plane_cols) most = std::max(most, of(kSign, m.plane_cols));
  for (const Segment& s : m.segments) most = std::max(most, of(s.format, m.cols));
  return most;
}

// Rows into panels: enough of them to share the work evenly, large enough to amortise what is set up for each. With few
// tokens the work is the bytes to read, of which an int8 row has eight times those of a sign row; with many it is rows.
void Model::split(const Matrix& m, std::int64_t tokens, std::int64_t work) {
  panels_.clear();
  if (work < kShareFrom) return panels_.push_back({0, m.rows});
  std::int64_t bytes = 0;
  for (const Segment& s : m.segments) bytes += s.rows * kBytesOfEight[s.format] * m.cols / 8;
  const std::int64_t share = 4 * pool_.threads();
  for (const Segment& s : m.segments) {
    const QuantFormat* quant = config.int8_activations ? kernels_.quant[s.format] : nullptr;
    std::int64_t height = (quant ? quant->many_rows : 64) / (many_threads() ? 2 : 1);
    if (height > 128) {  // as many for each thread
      const std::int64_t threads = pool_.threads(), tasks = ((s.rows + height - 1) / height + threads - 1) / threads * threads;
      height = padded((s.rows + tasks - 1) / tasks, 32);
    }
    if (tokens <= kFewTokens) {
      const std::int64_t most = std::clamp<std::int64_t>(bytes / share, 1 << 14, 1 << 18);
      height = std::max<std::int64_t>(32, most * 8 / (kBytesOfEight[s.format] * m.cols) / 32 * 32);
    }
    for (std::int64_t r = 0; r < s.rows; r += height)
      panels_.push_back({s.first_row + r, s.first_row + std::min(r + height, s.rows)});
  }
}

// The rows that each thread begins with, as `split` deals them and the pool hands them out.
void Model::expect(Matrix& m, std::int64_t tokens) {
  if (tokens > kFewTokens || pool_.threads() == 1) return pool_.expect(nullptr);
  if (m.first.empty()) {
    split(m, 1, kShareFrom);
    const std::int64_t n = pool_.threads(), panels = std::int64_t(panels_.size());
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t row = panels_[std::size_t(std::min(panels - 1, panels * i / n))].begin;
      for (const Segment& s : m.segments) {
        if (row < s.first_row || row >= s.first_row + s.rows) continue;
        const std::int64_t row_bytes = (m.cols * kBytesOfEight[s.format] + 7) / 8, skip = row - s.first_row;
        ThreadPool::Span span = {s.data + skip * row_bytes, std::min((s.rows - skip) * row_bytes, kExpected), nullptr, 0};
        if (m.plane_cols && row < m.plane_stop) {
          const std::int64_t bytes = padded(m.plane_cols, 64) / 8, from = std::max<std::int64_t>(0, row - m.plane_start);
          span.more = m.plane.data + from * bytes;
          span.more_bytes = std::min((m.plane.rows - from) * bytes, kExpected / 4);
        }
        m.first.push_back(span);
      }
    }
  }
  pool_.expect(m.first.data());
}

// With few tokens one job for everything: the factors of a correction wait for nobody and are claimed before the panels.
void Model::matmul(const Matrix& m, const Row& row, std::int64_t tokens, float* y, std::int64_t y_stride, bool add) {
  const Inputs in = prepare(m, row, tokens);
  const FormatKernels& int8 = *kernels_.format[kInt8];
  std::int64_t work = 0;
  for (const Segment& s : m.segments) work += s.rows * m.cols / (s.format == kSign ? 4 : 1) * tokens;
  if (m.plane_cols) work += m.plane.rows * m.plane_cols / 4 * tokens;
  if (in.whole.int8) work /= 3;
  Factors factors;
  std::int64_t blocks = 0;
  if (m.rank) {
    factor_.at_least(tokens * m.rank);
    factor_prepared_.at_least(tokens * int8.prepared_floats(m.rank));
    blocks = (tokens + kQuantBlock - 1) / kQuantBlock * ((m.rank + kFactorRows - 1) / kFactorRows);
    factors.left = blocks;
  }
  const std::int64_t scratch = scratch_floats(m, in);
  for (auto& buffer : scratch_) buffer.at_least(scratch);

  split(m, tokens, work);
  const std::int64_t panels = std::int64_t(panels_.size());
  const auto own = [&](int thread) { return scratch_[std::size_t(thread)].data(); };
  const auto factor = [&](std::int64_t task, int thread) { factor_block(m, in.whole, task, factors, own(thread)); };
  const bool alone = blocks > 1;  // many tokens: the factors are worth sharing, and a job of their own
  if (alone) share(blocks, work, factor);
  const std::int64_t first = alone ? 0 : blocks;
  share(first + panels, work, [&](std::int64_t task, int thread) {
    if (task < first) return factor(task, thread);
    const Range rows = panels_[std::size_t(task - first)];
    panel(m, in, rows.begin, rows.end, {y, y_stride, add}, factors, own(thread));
  });
}

void Model::matmul(const Matrix& m, const float* x, std::int64_t x_stride, std::int64_t tokens, float* y,
                   std::int64_t y_stride, bool add) {
  matmul(m, [&](std::int64_t t) { return x + t * x_stride; }, tokens, y, y_stride, add);
}

}  // namespace slimba
