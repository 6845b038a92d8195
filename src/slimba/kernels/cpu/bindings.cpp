// The extension module slimba._core: Model, State, Generation and the sampler; kernels for tests are in
// bindings_kernels.cpp.
//
// runtime/backends/cpu.py is its only user outside tests and checks what a person may get wrong; this file checks what
// would read out of bounds. The model holds references to the arrays whose memory it reads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "engine/generate.h"
#include "engine/sequence.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace slimba;
using std::int32_t;
using std::int64_t;

void bind_kernels(nb::module_& m);  // bindings_kernels.cpp

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Numbers = std::map<std::string, double>;
using SegmentTuple = std::tuple<std::string, int64_t, Bytes, std::optional<Bytes>>;  // format, rows, data, scale
using LowRankTuple =
    std::tuple<int64_t, int64_t, int64_t, Bytes, Bytes, Bytes, Bytes>;  // rank, start, stop, a, its scale, b, its scale
using PlaneTuple =
    std::tuple<int64_t, int64_t, int64_t, Bytes, Bytes, std::optional<Integers>>;  // cols, start, stop, signs, scale, index

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument(what); }

struct FormatShape {
  Format format;
  int64_t row_bytes, scales_per_row;
};

FormatShape format_shape(const std::string& name, int64_t cols) {
  if (name == "float32") return {kFloat32, cols * 4, 0};
  if (name == "float16") return {kFloat16, cols * 2, 0};
  if (name == "bfloat16") return {kBfloat16, cols * 2, 0};
  if (name == "int8") return {kInt8, cols, 1};
  if (name == "int4") return {kInt4, (cols + 1) / 2, (cols + 127) / 128};
  if (name == "sign") return {kSign, (cols + 63) / 64 * 8, 1};
  bad("the CPU engine does not know the weight format " + name);
}

Segment make_segment(const std::string& format, int64_t first_row, int64_t rows, int64_t cols, const Bytes& data,
                     const std::optional<Bytes>& scale) {
  const FormatShape shape = format_shape(format, cols);
  if (int64_t(data.nbytes()) != rows * shape.row_bytes)
    bad("a segment in format " + format + " has the wrong number of bytes");
  if (int64_t(scale ? scale->nbytes() : 0) != rows * shape.scales_per_row * 2)
    bad("a segment in format " + format + " has the wrong number of scales");
  return {shape.format, first_row, rows, data.data(), scale ? scale->data() : nullptr};
}

const Kernels& choose_kernels(const std::string& isa) {
  const Kernels* k = kernels_for(isa.c_str());
  if (!k) {
    bad("this machine cannot run the instruction set '" + isa +
        "', known are portable, avx2, avxvnni, avx512, avx512vnni, avx512lookup, amx and neon");
  }
  return *k;
}

// Handles Ctrl-C: takes the interpreter lock now and then and lets a pending signal raise.
Poll signal_poll() {
  return [last = std::chrono::steady_clock::now()]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(20)) return;
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    last = std::chrono::steady_clock::now();
  };
}

Config make_config(const Numbers& numbers) {
  Numbers n = numbers;
  const auto integer = [&](const char* key) { return int64_t(n.at(key)); };
  Config c;
  c.mamba2 = n.at("mamba2") != 0;
  c.state_type = StateType(integer("state_type"));
  c.int8_activations = n.at("int8_activations") != 0;
  c.n_layer = integer("n_layer");
  c.d_model = integer("d_model");
  c.d_inner = integer("d_inner");
  c.d_state = integer("d_state");
  c.vocab = integer("vocab_size");
  c.d_conv = integer("d_conv");
  c.norm_eps = float(n.at("norm_eps"));
  c.headdim = integer("headdim");
  c.n_groups = integer("n_groups");
  c.norm_group_size = integer("norm_group_size");
  c.gated_norm = n.at("gated_norm") != 0;
  c.norm_before_gate = n.at("norm_before_gate") != 0;
  c.d_has_hdim = n.at("d_has_hdim") != 0;
  c.dt_low = float(n.at("dt_low"));
  c.dt_high = float(n.at("dt_high"));
  c.dt_rank = integer("dt_rank");
  c.bcdt_norm = n.at("bcdt_norm") != 0;
  c.bcdt_norm_eps = float(n.at("bcdt_norm_eps"));
  return c;
}

// The model, with the Python objects whose memory it reads.
class BoundModel {
 public:
  BoundModel(const Numbers& config, int threads, const std::string& isa)
      : model(make_config(config), choose_kernels(isa), threads) {}

  void set_matrix(const std::string& name, int64_t layer, int64_t rows, int64_t cols,
                  const std::vector<SegmentTuple>& segments, const std::optional<LowRankTuple>& lowrank,
                  const std::optional<PlaneTuple>& plane, const std::optional<Floats>& col_scale,
                  const std::optional<Floats>& bias, int64_t hadamard, float input_scale, bool float_input) {
    Matrix m;
    m.rows = rows;
    m.cols = cols;
    int64_t row = 0;
    for (const auto& [format, n, data, scale] : segments) {
      m.segments.push_back(make_segment(format, row, n, cols, data, scale));
      keep_.push_back(nb::cast(data));
      if (scale) keep_.push_back(nb::cast(*scale));
      row += n;
    }
    if (row != rows) bad(name + ": the segments do not add up to its rows");
    if (lowrank) {
      const auto& [rank, start, stop, a, a_scale, b, b_scale] = *lowrank;
      if (rank < 1 || start < 0 || start >= stop || stop > rows) bad(name + ": the low-rank rows do not fit");
      m.rank = rank;
      m.lowrank_start = start;
      m.lowrank_stop = stop;
      m.a = make_segment("int8", 0, stop - start, rank, a, a_scale);
      m.b = make_segment("int8", 0, rank, cols, b, b_scale);
      for (const Bytes& part : {a, a_scale, b, b_scale}) keep_.push_back(nb::cast(part));
    }
    if (plane) set_plane(m, name, *plane);
    if (col_scale) m.col_scale.assign(col_scale->data(), col_scale->data() + col_scale->size());
    if (bias) m.bias.assign(bias->data(), bias->data() + bias->size());
    if ((col_scale && int64_t(col_scale->size()) != cols) || (bias && int64_t(bias->size()) != rows))
      bad(name + ": wrong column scale or bias");
    if (hadamard < 0 || (hadamard & (hadamard - 1)) || (hadamard && cols % hadamard))
      bad(name + ": the Hadamard transform does not fit its columns");
    if (!(input_scale >= 0)) bad(name + ": the scale of its input is no positive number");
    m.hadamard = hadamard;
    m.input_scale = input_scale;
    m.float_input = float_input;
    slot(name, layer) = std::move(m);
  }

  void set_vector(const std::string& name, int64_t layer, const Floats& values) {
    std::vector<float>* target = nullptr;
    if (name == "norm_f") {
      target = &model.norm_f;
    } else {
      Layer& l = model.layers.at(std::size_t(layer));
      const std::map<std::string, std::vector<float>*> by_name = {
          {"norm", &l.norm}, {"conv_weight", &l.conv_weight}, {"conv_bias", &l.conv_bias}, {"conv_scale", &l.conv_scale},  {"a", &l.a},
          {"d", &l.d},       {"dt_bias", &l.dt_bias},         {"gated_norm", &l.gated_norm}};
      target = by_name.at(name);
    }
    target->assign(values.data(), values.data() + values.size());
  }

  // Every tensor there with the size that the shape implies, so that no kernel reads past an end.
  void finish() {
    const Config& c = model.config;
    const auto need = [](bool good, const char* what) {
      if (!good) bad(std::string("the model's ") + what + " is missing or has the wrong size");
    };
    const auto shaped = [&](const Matrix& m, int64_t rows, int64_t cols, const char* what) {
      need(m.rows == rows && m.cols == cols, what);
    };
    const auto sized = [&](const std::vector<float>& v, int64_t n, const char* what) {
      need(int64_t(v.size()) == n, what);
    };
    shaped(model.embedding, c.vocab, c.d_model, "embedding");
    if (model.lm_head.present()) shaped(model.lm_head, c.vocab, c.d_model, "head");
    sized(model.norm_f, c.d_model, "final norm");
    for (const Layer& l : model.layers) {
      shaped(l.in_proj, c.mamba2 ? 2 * c.d_inner + 2 * c.n_groups * c.d_state + c.heads() : 2 * c.d_inner, c.d_model,
             "in_proj");
      shaped(l.out_proj, c.d_model, c.d_inner, "out_proj");
      sized(l.norm, c.d_model, "norm");
      sized(l.conv_weight, c.d_conv * c.channels(), "conv1d.weight");
      if (!l.conv_bias.empty()) sized(l.conv_bias, c.channels(), "conv1d.bias");
      if (!l.conv_scale.empty()) sized(l.conv_scale, c.channels(), "conv1d.out_scale");
      sized(l.d, c.mamba2 && !c.d_has_hdim ? c.heads() : c.d_inner, "D");
      sized(l.dt_bias, c.mamba2 ? c.heads() : c.d_inner, "dt bias");
      sized(l.a, c.mamba2 ? c.heads() : c.d_inner * c.d_state, "A_log");
      if (c.mamba2 && c.gated_norm) sized(l.gated_norm, c.d_inner, "gated norm");
      if (!c.mamba2) {
        shaped(l.x_proj, c.dt_rank + 2 * c.d_state, c.d_inner, "x_proj");
        shaped(l.dt_proj, c.d_inner, c.dt_rank, "dt_proj");
      }
    }
  }

  // Shared by forward, prefill and nll: bounds are checked, the interpreter lock is released, the model is locked.
  template <class Work>
  void locked(const Ids& ids, const State& state, Work work) {
    check_ids(ids, state);
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(model.mutex());
    work();
  }

  void check_ids(const Ids& ids, const State& state) const {
    if (!state.fits(model.config)) bad("the state belongs to a model of another shape");
    if (int64_t(ids.shape(0)) != state.batch()) bad("the ids are for another batch size than the state");
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids.data()[i] < 0 || ids.data()[i] >= model.config.vocab) {
        bad("token id " + std::to_string(ids.data()[i]) + " is outside 0.." + std::to_string(model.config.vocab - 1));
      }
    }
  }

  Model model;

 private:
  void set_plane(Matrix& m, const std::string& name, const PlaneTuple& plane) {
    const auto& [cols, start, stop, data, scale, index] = plane;
    if (cols < 1 || cols > m.cols || start < 0 || start >= stop || stop > m.rows)
      bad(name + ": the second sign plane does not fit");
    m.plane_cols = cols;
    m.plane_start = start;
    m.plane_stop = stop;
    m.plane = make_segment("sign", 0, stop - start, cols, data, scale);
    if (int64_t(index ? index->size() : m.cols) != cols) bad(name + ": the second sign plane has the wrong index");
    if (index) m.plane_index.assign(index->data(), index->data() + index->size());
    for (const int32_t column : m.plane_index)
      if (column < 0 || column >= m.cols) bad(name + ": the second sign plane names a column that is not there");
    for (const Bytes& part : {data, scale}) keep_.push_back(nb::cast(part));
  }

  Matrix& slot(const std::string& name, int64_t layer) {
    if (name == "embeddings") return model.embedding;
    if (name == "lm_head") return model.lm_head;
    Layer& l = model.layers.at(std::size_t(layer));
    const std::map<std::string, Matrix*> by_name = {
        {"in_proj", &l.in_proj}, {"x_proj", &l.x_proj}, {"dt_proj", &l.dt_proj}, {"out_proj", &l.out_proj}};
    return *by_name.at(name);
  }

  std::vector<nb::object> keep_;
};

SampleParams make_params(const Numbers& n, std::uint64_t seed) {
  SampleParams p;
  p.temperature = n.at("temperature");
  p.top_k = int64_t(n.at("top_k"));
  p.top_p = n.at("top_p");
  p.min_p = n.at("min_p");
  p.repetition_penalty = n.at("repetition_penalty");
  p.n_valid = int64_t(n.at("n_valid"));
  p.seed = seed;
  return p;
}

class BoundGeneration {
 public:
  BoundGeneration(BoundModel& model, State& state, const Out<const float, 2>& logits, const Ids& prompts,
                  const Numbers& params, std::uint64_t seed, std::vector<int32_t> stop_ids, int64_t max_new_tokens)
      : model_(model.model), batch_(state.batch()) {
    model.check_ids(prompts, state);
    if (int64_t(logits.shape(0)) != batch_ || int64_t(logits.shape(1)) != model_.config.vocab)
      bad("the logits do not fit the state");
    generation_.emplace(model_, state, logits.data(), prompts.data(), int64_t(prompts.shape(1)),
                        make_params(params, seed), std::move(stop_ids), max_new_tokens);
  }

  // int32 [B, count] to fill -> columns filled
  int64_t next(const Out<int32_t, 2>& out) {
    if (int64_t(out.shape(0)) != batch_) bad("the output is for another batch size");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(model_.mutex());
    return generation_->next(int64_t(out.shape(1)), out.data(), signal_poll());
  }

 private:
  Model& model_;
  int64_t batch_;
  std::optional<Generation> generation_;
};

int32_t sample(const Floats& logits, const Integers& history, const Numbers& params, std::uint64_t seed,
               std::uint64_t b, std::uint64_t i) {
  std::vector<std::uint8_t> seen(logits.size(), 0);
  for (std::size_t k = 0; k < history.size(); ++k) seen.at(std::size_t(history.data()[k])) = 1;
  return Sampler().sample(logits.data(), int64_t(logits.size()), seen.data(), make_params(params, seed), b, i);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "C++ engine of slimba for CPUs; use slimba.load(..., backend='cpu')";
  m.def(
      "isa", [](const std::string& isa) { return std::string(choose_kernels(isa).isa); }, nb::arg("isa") = "",
      "Name of the kernels that '' (best for this machine) or a forced instruction set selects.");
  m.def("sample", sample, "logits"_a, "history"_a, "params"_a, "seed"_a, "b"_a, "i"_a, "One draw, for tests.");
  m.def("uniform", uniform);

  nb::class_<State>(m, "State")
      .def("clone", &State::clone, nb::call_guard<nb::gil_scoped_release>())
      .def("reset", &State::reset, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("batch", &State::batch)
      .def_prop_ro("saved_bytes", &State::saved_bytes)
      .def("save", [](State& s, int64_t b, const Out<std::uint8_t, 1>& out) {
        if (b < 0 || b >= s.batch() || int64_t(out.size()) != s.saved_bytes()) bad("no such sequence, or wrong size");
        s.save(b, out.data());
      })
      .def("load", [](State& s, int64_t b, const Bytes& from) {
        if (b < 0 || b >= s.batch()) bad("the state holds no sequence " + std::to_string(b));
        if (int64_t(from.size()) != s.saved_bytes()) bad("the saved state is of another model or state type");
        s.load(b, from.data());
      });

  nb::class_<BoundModel>(m, "Model")
      .def(nb::init<const Numbers&, int, const std::string&>(), "config"_a, "threads"_a, "isa"_a = "")
      .def("set_matrix", &BoundModel::set_matrix, "name"_a, "layer"_a, "rows"_a, "cols"_a, "segments"_a,
           "lowrank"_a.none(), "plane"_a.none(), "col_scale"_a.none(), "bias"_a.none(), "hadamard"_a = 0,
           "input_scale"_a = 0.0f, "float_input"_a = false)
      .def("set_vector", &BoundModel::set_vector)
      .def("finish", &BoundModel::finish)
      .def("state_bytes", [](BoundModel& b, int64_t batch) { return State::bytes(b.model.config, batch); })
      .def("new_state", [](BoundModel& b, int64_t batch) { return State(b.model.config, batch); })
      .def("forward",
           [](BoundModel& b, const Ids& ids, State& state, const Out<float, 3>& out) {
             if (out.shape(0) != ids.shape(0) || out.shape(1) != ids.shape(1) ||
                 int64_t(out.shape(2)) != b.model.config.vocab)
               bad("wrong output shape");
             b.locked(ids, state,
                      [&] { forward(b.model, ids.data(), int64_t(ids.shape(1)), state, out.data(), signal_poll()); });
           })
      .def("prefill",
           [](BoundModel& b, const Ids& ids, State& state, const Out<float, 2>& out) {
             if (out.shape(0) != ids.shape(0) || int64_t(out.shape(1)) != b.model.config.vocab || ids.shape(1) < 1)
               bad("wrong output shape");
             b.locked(ids, state,
                      [&] { prefill(b.model, ids.data(), int64_t(ids.shape(1)), state, out.data(), signal_poll()); });
           })
      .def("nll",
           [](BoundModel& b, const Ids& ids, const Ids& targets, State& state, const Out<double, 2>& out) {
             b.check_ids(targets, state);
             if (out.shape(0) != ids.shape(0) || out.shape(1) != ids.shape(1) || targets.shape(1) != ids.shape(1))
               bad("wrong output shape");
             b.locked(ids, state, [&] {
               nll(b.model, ids.data(), targets.data(), int64_t(ids.shape(1)), state, out.data(), signal_poll());
             });
           })
      .def_prop_ro("isa", [](const BoundModel& b) { return std::string(b.model.kernels().isa); })
      .def_prop_ro("threads", [](BoundModel& b) { return b.model.pool().threads(); });

  nb::class_<BoundGeneration>(m, "Generation")
      .def(nb::init<BoundModel&, State&, const Out<const float, 2>&, const Ids&, const Numbers&, std::uint64_t,
                    std::vector<int32_t>, int64_t>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("next", &BoundGeneration::next);

  bind_kernels(m);
}
