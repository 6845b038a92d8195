// Random models of any shape for the C++ tests and the C++ benchmark: no file, no Python.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/model.h"

namespace slimba {

inline std::uint16_t to_half(float x) {  // normal numbers only, rounded towards zero
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::uint16_t((bits >> 16 & 0x8000u) | (((bits >> 23 & 255u) - 112u) << 10) | (bits >> 13 & 0x3ffu));
}

// A model and the memory that its matrices point into. `layout`: "published" (signs and the correction in every row,
// int8 embedding), "dfssm" (no correction, dt rows at int8, a second sign plane over a third of the columns of x, B, C and
// out_proj, int4 embedding), "ranked" (B, C and dt rows at int8, the correction), or "mixed" (every format, the plane and
// the correction overlapping).
class RandomModel {
 public:
  RandomModel(const Config& config, const std::string& layout, const Kernels& kernels, int threads, int rank = 16)
      : model(config, kernels, threads), layout_(layout), rank_(rank) {
    const std::int64_t d = config.d_model, inner = config.d_inner, n = config.d_state;
    const std::string table = layout == "published" ? "int8" : "int4";
    fill(model.embedding, config.vocab, d, {{format(table), config.vocab}});
    model.norm_f.assign(std::size_t(d), 1.0f);
    for (Layer& l : model.layers) {
      const std::int64_t rows = config.mamba2 ? 2 * inner + 2 * config.n_groups * n + config.heads() : 2 * inner;
      const std::int64_t tail = !config.mamba2 || layout == "published" ? 0 : layout == "dfssm" ? config.heads() : rows - 2 * inner;
      project(l.in_proj, rows, d, tail, config.mamba2 ? inner : 0);
      project(l.out_proj, d, inner, 0, 0);
      if (!config.mamba2) {
        fill(l.x_proj, config.dt_rank + 2 * n, inner, {{kInt8, config.dt_rank + 2 * n}});
        fill(l.dt_proj, inner, config.dt_rank, {{kInt8, inner}});
      }
      const std::int64_t steps = config.mamba2 ? config.heads() : inner;
      l.norm.assign(std::size_t(d), 1.0f);
      l.conv_weight = numbers(config.d_conv * config.channels(), -0.8f, 0.8f);
      l.conv_bias = numbers(config.channels(), -0.1f, 0.1f);
      l.a = numbers(config.mamba2 ? steps : inner * n, -16, -1);
      l.d.assign(std::size_t(config.mamba2 && !config.d_has_hdim ? steps : inner), 1.0f);
      l.dt_bias = numbers(steps, -5, -2);
      if (config.mamba2 && config.gated_norm) l.gated_norm.assign(std::size_t(inner), 1.0f);
    }
  }

  Model model;
  std::int64_t weight_bytes = 0;  // of the matrices

 private:
  using Part = std::pair<Format, std::int64_t>;  // rows in one format

  static Format format(const std::string& name) { return name == "int8" ? kInt8 : kInt4; }

  std::vector<float> numbers(std::int64_t count, float low, float high) {
    std::uniform_real_distribution<float> draw(low, high);
    std::vector<float> out(static_cast<std::size_t>(count));
    for (float& x : out) x = draw(random_);
    return out;
  }

  const std::uint8_t* bytes(std::int64_t count) {
    memory_.emplace_back(new std::uint64_t[std::size_t(count / 8 + 1)]);
    for (std::int64_t i = 0; i < count / 8 + 1; ++i) memory_.back()[std::size_t(i)] = random_();
    weight_bytes += count;
    return reinterpret_cast<const std::uint8_t*>(memory_.back().get());
  }

  const std::uint8_t* scales(std::int64_t count, float typical) {
    memory_.emplace_back(new std::uint64_t[std::size_t(count / 4 + 1)]);
    auto* out = reinterpret_cast<std::uint16_t*>(memory_.back().get());
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_half(typical * (0.75f + 0.5f * float(random_() % 1024) / 1024));
    weight_bytes += 2 * count;
    return reinterpret_cast<const std::uint8_t*>(out);
  }

  Segment segment(Format f, std::int64_t first, std::int64_t rows, std::int64_t cols, float size) {
    switch (f) {
      case kSign: return {f, first, rows, bytes(rows * ((cols + 63) / 64 * 8)), scales(rows, size)};
      case kInt8: return {f, first, rows, bytes(rows * cols), scales(rows, size / 74)};
      case kInt4: return {f, first, rows, bytes(rows * ((cols + 1) / 2)), scales(rows * ((cols + 127) / 128), size / 4.6f)};
      default: {  // float16, the only float format that is made here
        const std::uint8_t* data = scales(rows * cols, size);
        return {kFloat16, first, rows, data, nullptr};
      }
    }
  }

  void fill(Matrix& m, std::int64_t rows, std::int64_t cols, const std::vector<Part>& parts, std::int64_t plane_start = 0) {
    const float size = 1 / std::sqrt(float(cols));
    m.rows = rows;
    m.cols = cols;
    std::int64_t first = 0, signs = 0;
    for (const auto& [f, count] : parts) {
      m.segments.push_back(segment(f, first, count, cols, size));
      if (f == kSign) signs = first + count;
      first += count;
    }
    if (!signs) return;
    if (layout_ != "dfssm") {
      m.rank = rank_;
      m.lowrank_start = layout_ == "mixed" ? rows / 5 : 0;
      m.lowrank_stop = signs;
      m.a = segment(kInt8, 0, m.lowrank_stop - m.lowrank_start, m.rank, 0.1f);
      m.b = segment(kInt8, 0, m.rank, cols, size);
    }
    if (layout_ != "dfssm" && layout_ != "mixed") return;
    m.plane_cols = std::max<std::int64_t>(1, layout_ == "dfssm" ? cols * 33 / 100 : cols / 8);
    m.plane_start = layout_ == "mixed" ? rows / 7 : plane_start;
    m.plane_stop = signs;
    m.plane = segment(kSign, 0, m.plane_stop - m.plane_start, m.plane_cols, size / 2);
    for (std::int64_t i = 0; i < m.plane_cols; ++i) m.plane_index.push_back(std::int32_t(i * (cols / m.plane_cols)));
  }

  // in_proj or out_proj: signs, the last `tail` rows at int8
  void project(Matrix& m, std::int64_t rows, std::int64_t cols, std::int64_t tail, std::int64_t plane_start) {
    if (layout_ == "mixed") {
      const std::int64_t part = rows / 5;
      return fill(m, rows, cols, {{kInt8, part}, {kInt4, part}, {kFloat16, part}, {kSign, rows - 3 * part}});
    }
    std::vector<Part> parts = {{kSign, rows - tail}};
    if (tail) parts.push_back({kInt8, tail});
    fill(m, rows, cols, parts, plane_start);
  }

  std::string layout_;
  int rank_;
  std::mt19937_64 random_{1};
  std::vector<std::unique_ptr<std::uint64_t[]>> memory_;
};

inline Config mamba2_shape(std::int64_t layers, std::int64_t d_model, std::int64_t d_state, std::int64_t headdim,
                           std::int64_t vocab) {
  Config c;
  c.n_layer = layers;
  c.d_model = d_model;
  c.d_inner = 2 * d_model;
  c.d_state = d_state;
  c.headdim = headdim;
  c.vocab = vocab;
  c.d_conv = 4;
  c.norm_group_size = c.d_inner;
  c.dt_high = std::numeric_limits<float>::infinity();
  return c;
}

inline Config mamba1_shape(std::int64_t layers, std::int64_t d_model, std::int64_t d_state, std::int64_t vocab) {
  Config c = mamba2_shape(layers, d_model, d_state, 1, vocab);
  c.mamba2 = false;
  c.dt_rank = (d_model + 15) / 16;
  return c;
}

}  // namespace slimba
