// The model as the engine sees it: shape, matrices as pointers into the mapped file, small vectors in float32.
//
// Filled by bindings.cpp from a Checkpoint; whoever fills it keeps the arrays alive. Legend: B batch, L length, D
// d_model, I d_inner, H heads, P headdim, N d_state, G groups, K d_conv, V vocabulary rows, R rank, T tokens in a
// chunk.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "../kernels.h"
#include "buffer.h"
#include "threads.h"

namespace slimba {

struct Segment {
  Format format;
  std::int64_t first_row, rows;
  const std::uint8_t* data;
  const std::uint8_t* scale;
};

// W = (segments stacked; rows lowrank_start.. += A B; rows plane_start.., columns plane_index += plane) * col_scale *
// Hadamard, see docs/file-format.md.
struct Matrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<Segment> segments;
  std::int64_t rank = 0, lowrank_start = 0, lowrank_stop = 0;
  Segment a = {}, b = {};        // int8 factors with their scales, when rank > 0
  std::int64_t plane_cols = 0, plane_start = 0, plane_stop = 0;
  Segment plane = {};                     // signs, when plane_cols > 0
  std::vector<std::int32_t> plane_index;  // [plane_cols]; empty: all columns
  std::vector<float> col_scale;  // empty: none
  std::vector<float> bias;       // empty: none
  std::int64_t hadamard = 0;     // block of the transform of the input; 0: none
  float input_scale = 0;         // of int8 inputs, the same for all tokens; 0: one a token
  bool float_input = false;      // whatever the model's activations are
  std::vector<ThreadPool::Span> first;  // what each thread reads first of it in decode; made at its first use

  bool present() const { return rows > 0; }
  // Whether int8 activations, where the model asks for them, apply: not to a matrix of floats alone.
  bool takes_int8() const {
    if (float_input) return false;
    for (const Segment& s : segments)
      if (s.format == kInt8 || s.format == kInt4 || s.format == kSign) return true;
    return false;
  }
  // Row r dequantised, corrections included (embedding look-up); temp holds `cols` floats.
  void row(std::int64_t r, float* out, float* temp) const;
  std::int64_t bytes() const;  // of all codes, without their scales
};

struct Layer {
  Matrix in_proj, x_proj, dt_proj, out_proj;
  std::vector<float> norm;         // [D]
  std::vector<float> conv_weight;  // [K, channels], tap-major
  std::vector<float> conv_bias;    // [channels] or empty
  std::vector<float> conv_scale;   // [channels] or empty: x, B and C become int8 where activations are
  std::vector<float> a;            // -exp(A_log): [H] or [I, N]
  std::vector<float> d;            // [H] or [I]
  std::vector<float> dt_bias;      // [H] or [I]
  std::vector<float> gated_norm;   // [I] or empty
};

struct Config {
  bool mamba2 = true;
  StateType state_type = kStateFloat32;
  bool int8_activations = false;  // the input of every matrix that is not all floats is rounded, see QuantArgs
  std::int64_t n_layer = 0, d_model = 0, d_inner = 0, d_state = 0, vocab = 0, d_conv = 0;
  float norm_eps = 1e-5f;
  // Mamba-2
  std::int64_t headdim = 0, n_groups = 1, norm_group_size = 0;
  bool gated_norm = true, norm_before_gate = false, d_has_hdim = false;
  float dt_low = 0, dt_high = 0;
  // Mamba-1
  std::int64_t dt_rank = 0;
  bool bcdt_norm = false;
  float bcdt_norm_eps = 0;

  std::int64_t heads() const { return d_inner / headdim; }
  std::int64_t channels() const { return d_inner + (mamba2 ? 2 * n_groups * d_state : 0); }
  std::int64_t held_bytes() const { return state_type == kStateFloat32 ? 4 : 2; }  // of a number in the buffer
};

// ssm [layer][B][H, P, N] or [layer][B][I, N] in the state's type, scales [layer][B][I] (int8); conv [layer][B][K - 1,
// channels] float32, oldest first. Mamba-2's buffer, see Ssm2Args: u [layer][B][H, 16, P], b [layer][B][G, 16, N], logs
// [layer][B][H, 16], and how many tokens of it are filled, for each sequence.
class State {
 public:
  enum Part : int { kSsm, kScales, kConv, kHeldU, kHeldB, kLogs, kParts };
  struct Sizes {
    std::int64_t bytes[kParts];  // of one sequence and layer
    explicit Sizes(const Config& c);
  };

  State(const Config& config, std::int64_t batch);
  State clone() const;
  void reset();

  std::uint8_t* part(Part p, std::int64_t layer, std::int64_t b) {
    return reinterpret_cast<std::uint8_t*>(parts_[p].data()) + (layer * batch_ + b) * sizes_.bytes[p];
  }
  float* floats(Part p, std::int64_t layer, std::int64_t b) { return reinterpret_cast<float*>(part(p, layer, b)); }
  std::int64_t filled(std::int64_t b) const { return filled_[std::size_t(b)]; }
  void advance(std::int64_t b, std::int64_t tokens) { filled_[std::size_t(b)] = (filled(b) + tokens) % kStateBlock; }
  std::int64_t batch() const { return batch_; }
  bool fits(const Config& c) const {
    const Sizes other(c);
    return c.n_layer == n_layer_ && std::equal(other.bytes, other.bytes + kParts, sizes_.bytes);
  }
  static std::int64_t bytes(const Config& c, std::int64_t batch);

  // One sequence as bytes, from whose first token on everything is remembered; `load` takes what `save` gave for a model of
  // the same shape and state type.
  std::int64_t saved_bytes() const;
  void save(std::int64_t b, std::uint8_t* out);
  void load(std::int64_t b, const std::uint8_t* from);

  bool interrupted = false;  // an exception left some layers ahead of others; reset() makes it usable again

 private:
  struct Empty {};
  State(const State& like, Empty)
      : interrupted(like.interrupted), n_layer_(like.n_layer_), batch_(like.batch_), sizes_(like.sizes_), filled_(like.filled_) {}

  std::int64_t n_layer_, batch_;
  Sizes sizes_;
  Buffer parts_[kParts];
  std::vector<std::int64_t> filled_;
};

// Called between layers; throws to stop the work (Ctrl-C).
using Poll = std::function<void()>;

class Model {
 public:
  Model(const Config& config, const Kernels& kernels, int threads);

  Config config;
  std::vector<Layer> layers;
  Matrix embedding, lm_head;  // lm_head absent: tied
  std::vector<float> norm_f;

  Matrix& head() { return lm_head.present() ? lm_head : embedding; }
  const Matrix& head() const { return lm_head.present() ? lm_head : embedding; }
  const Kernels& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }
  std::mutex& mutex() { return mutex_; }  // held by whoever runs the model: buffers are shared

  // Tokens of one sequence that one chunk takes, for B sequences side by side.
  std::int64_t chunk_tokens(std::int64_t sequences) const;

  // ids [n, length] for the sequences slots[0..n) of the state -> hidden states after the final norm [n * length, D].
  const float* hidden(const std::int32_t* ids, std::int64_t n, std::int64_t length, const std::int64_t* slots,
                      State& state, const Poll& poll);
  // logits [tokens, V] of `tokens` hidden states.
  void logits(const float* hidden, std::int64_t tokens, float* out);
  // y [T, y_stride] = x [T, x_stride] W^T (+ bias), or y += when add.
  void matmul(const Matrix& m, const float* x, std::int64_t x_stride, std::int64_t tokens, float* y,
              std::int64_t y_stride, bool add);
  // Gives token t's input [cols]; asked once a token, by the thread that prepares it.
  using Row = std::function<const float*(std::int64_t t)>;
  void matmul(const Matrix& m, const Row& row, std::int64_t tokens, float* y, std::int64_t y_stride, bool add);

 private:
  // One chunk's worth of bookkeeping for the layer functions.
  struct Chunk {
    std::int64_t sequences, length, tokens;
    const std::int64_t* slots;
    State& state;
  };
  struct Output {
    float* y;
    std::int64_t stride;
    bool add;
  };
  // The tokens that a matrix meets, in every form that its parts want; pointers into the buffers below.
  struct Input {
    std::int64_t tokens;
    bool int8;
    const float* floats[kFormats];
    const std::int8_t* q;
    std::int64_t q_stride;
    const float* q_scale;
    const std::int32_t* q_sums;
    const std::uint8_t* q_prepared[kFormats];
  };
  struct Inputs {
    Input whole, plane;  // of the matrix, and of the columns of its second sign plane
  };
  // How far the factors of a low-rank correction are.
  struct Factors {
    std::atomic<std::int64_t> left{0};  // blocks
    std::atomic<bool> ready{false};
  };
  Inputs prepare(const Matrix& m, const Row& row, std::int64_t tokens);
  void prepare_token(const Matrix& m, const Inputs& in, const float* row, std::int64_t t, float* scratch);
  void rows(const Segment& s, std::int64_t cols, std::int64_t begin, std::int64_t end, const Input& in,
            const Output& out, float* scratch);
  void factor_block(const Matrix& m, const Input& in, std::int64_t block, Factors& f, float* scratch);
  void panel(const Matrix& m, const Inputs& in, std::int64_t begin, std::int64_t end, const Output& out,
             const Factors& factors, float* scratch);
  std::int64_t scratch_floats(const Matrix& m, const Inputs& in) const;
  void split(const Matrix& m, std::int64_t tokens, std::int64_t work);
  // Says what comes after the next job: a matrix, or the states of a layer.
  void expect(Matrix& m, std::int64_t tokens);
  void expect_states(std::int64_t index, const Chunk& c);
  std::int64_t heads_a_task(std::int64_t tokens, std::int64_t sequences) const;
  void mixer2(Layer& layer, std::int64_t index, const Chunk& c);
  void mixer1(const Layer& layer, std::int64_t index, const Chunk& c);
  void conv(const Layer& layer, std::int64_t index, const Chunk& c);
  void conv_channels(const Layer& layer, std::int64_t index, const Chunk& c, std::int64_t s, std::int64_t first,
                     std::int64_t count, float* out, std::int64_t out_stride, bool keep);
  // Some heads of one group of a sequence, as one task
  struct Heads {
    std::int64_t sequence, first, count;
  };
  void heads2(const Layer& layer, std::int64_t index, const Chunk& c, const Heads& heads, float* scratch);
  void hold2(const Layer& layer, std::int64_t index, const Chunk& c);
  const float* norm2(const Layer& layer, std::int64_t t);
  // Calls f(task, thread) for every task, on this thread alone when `work` (multiplications and the like, all tasks
  // together) is so little that waking the others would take longer.
  template <class F>
  void share(std::int64_t tasks, std::int64_t work, F&& f) {
    if (work >= kShareFrom) return pool_.run(tasks, f);
    for (std::int64_t task = 0; task < tasks; ++task) f(task, 0);
  }
  static constexpr std::int64_t kShareFrom = 16384;  // about two microseconds
  bool many_threads() const { return pool_.threads() >= 8; }  // tasks must be small for them to end together

  const Kernels& kernels_;
  ThreadPool pool_;
  std::mutex mutex_;
  std::vector<Buffer> scratch_;  // per thread
  // Decode reads what will not be in a cache the next time; found at the first use, when all matrices are there.
  bool once_ = false;
  std::int64_t bytes_ = -1;
  void weigh();
  // Of one matrix and the columns of its second plane
  struct InputBuffers {
    Buffer floats[kFormats], q, scale, sums, prepared[kFormats];
  };
  Input make_input(InputBuffers& b, const bool (&wanted)[kFormats], std::int64_t cols, std::int64_t tokens, bool int8);
  InputBuffers whole_, plane_;
  struct Range {
    std::int64_t begin, end;
  };
  std::vector<Range> panels_;  // rows of the matrix at hand, a task each
  std::vector<ThreadPool::Span> states_first_;  // what each thread reads first of a layer's states
  Buffer factor_, factor_prepared_;
  Buffer residual_, normed_, projected_, conv_out_, dt_, y_, bcdt_;
};

}  // namespace slimba
