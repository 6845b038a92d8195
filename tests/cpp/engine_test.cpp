// Tests of the C++ core without Python, to be run under sanitizers, under emulators and on machines that only have a compiler:
//
//     bash scripts/build_cpp.sh engine_test tests/cpp/engine_test.cpp -fsanitize=address,undefined && ./engine_test
//
// Every instruction set of this machine against the portable twin: products with int8 activations bit for bit, float
// kernels within rounding; whole models for batch, chunk and thread invariance. tests/kernels/ compares with NumPy.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "engine/generate.h"
#include "engine/sequence.h"
#include "random_model.h"

using namespace slimba;
using std::int64_t;

namespace {

const char* const kIsas[] = {"portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512lookup", "amx", "neon"};
int checks = 0, failures = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

struct Quantised {
  std::vector<std::int8_t> q;
  std::vector<float> scale;
  std::vector<std::int32_t> sums;
  int64_t stride;
};

Quantised quantise(const Kernels& k, const std::vector<float>& x, int64_t tokens, int64_t cols) {
  Quantised out;
  out.stride = (cols + 63) / 64 * 64 + 64;
  const int64_t sums = (cols + 127) / 128 + 1, room = (tokens + kQuantBlock - 1) / kQuantBlock * kQuantBlock;
  out.q.assign(std::size_t(room * out.stride), 0x55);
  out.scale.resize(std::size_t(tokens));
  out.sums.assign(std::size_t(tokens * sums), 1 << 20);
  for (int64_t t = 0; t < tokens; ++t)
    k.quantize(x.data() + t * cols, cols, out.q.data() + t * out.stride, &out.scale[std::size_t(t)],
               out.sums.data() + t * sums);
  return out;
}

std::vector<float> quant_product(const Kernels& k, Format f, const std::uint8_t* data, const std::uint8_t* scale,
                                 const Quantised& x, int64_t rows, int64_t cols, int64_t tokens, bool many) {
  const QuantFormat& format = *k.quant[f];
  const QuantInput& input = many ? format.many_input : format.few_input;
  const int64_t ready = input.bytes(cols);
  Buffer prepared, scratch;
  auto* made = reinterpret_cast<std::uint8_t*>(prepared.at_least(tokens * ready / 4 + 16));
  for (int64_t t = 0; t < tokens && ready; ++t) input.prepare(x.q.data() + t * x.stride, cols, made + t * ready);
  std::vector<float> y(std::size_t(tokens * rows), NAN);
  auto* room = reinterpret_cast<std::uint8_t*>(scratch.at_least(format.scratch_bytes(cols) / 4 + 16));
  (many ? format.many : format.few)({data, scale, rows, cols, 0, rows, x.q.data(), x.stride, x.scale.data(),
                                     x.sums.data(), made, tokens, y.data(), rows, false, room, tokens % 2 == 1});
  return y;
}

// Every instruction set, few and many tokens, against the portable kernel for few: the same bits.
void test_products(const Kernels& k) {
  const Kernels& portable = *kernels_for("portable");
  const int64_t sizes[][3] = {{1, 1, 1},   {7, 3, 2},     {16, 64, 1},  {19, 40, 5},  {33, 65, 3},    {70, 127, 4},
                              {65, 128, 13}, {130, 129, 7}, {300, 200, 9}, {17, 513, 70}, {64, 1000, 33}, {37, 8300, 2},
                              {40, 1100, 300}, {610, 330, 7}, {545, 256, 261}, {70, 2100, 57}, {131, 1351, 90},
                              {2117, 140, 40}};
  std::mt19937_64 random(7);
  for (const auto& [rows, cols, tokens] : sizes) {
    std::vector<float> x(static_cast<std::size_t>(tokens * cols));
    for (float& v : x) v = float(int(random() % 2001) - 1000) / 250;
    for (int64_t t = 0; t < tokens; ++t)  // and the largest sums that there are
      if (t % 5 > 2) std::fill_n(x.begin() + t * cols, cols, t % 5 == 3 ? 4.0f : -4.0f);
    const Quantised q = quantise(k, x, tokens, cols), want_q = quantise(portable, x, tokens, cols);
    check(q.scale == want_q.scale && q.sums == want_q.sums && q.q == want_q.q, std::string("quantize ") + k.isa);
    std::vector<std::uint8_t> data(std::size_t(rows * (cols + 64) + 1));
    for (auto& b : data) b = std::uint8_t(random());
    std::vector<std::uint16_t> scale(static_cast<std::size_t>(rows * ((cols + 127) / 128)));
    for (auto& s : scale) s = to_half(0.01f + float(random() % 1000) / 1000);
    const auto* halves = reinterpret_cast<const std::uint8_t*>(scale.data());
    for (const Format f : {kSign, kInt8, kInt4}) {
      if (f == kSign) {  // padding bits are 0 in a file
        const int64_t row_bytes = (cols + 63) / 64 * 8;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = cols; c < row_bytes * 8; ++c) data[std::size_t(1 + r * row_bytes + c / 8)] &= std::uint8_t(~(1 << c % 8));
      }
      const auto want = quant_product(portable, f, data.data() + 1, halves, want_q, rows, cols, tokens, false);
      for (const bool many : {false, true}) {
        const auto got = quant_product(k, f, data.data() + 1, halves, q, rows, cols, tokens, many);
        check(got == want, std::string("int8 product ") + k.isa + " format " + std::to_string(f) + " " +
                               std::to_string(rows) + " x " + std::to_string(cols) + " x " + std::to_string(tokens) +
                               (many ? " many" : " few"));
      }
    }
  }
}

// Kernels that are chosen by the size of the first-level cache, whatever it is here
void test_caches(Kernels k) {
#if defined(SLIMBA_X86)
  const std::string isa = k.isa;
  for (const int64_t bytes : {0, 1 << 20}) {
    k.near_bytes = bytes;
    if (isa == "avx2") avx2_quant(k);
    else if (isa == "avxvnni") avxvnni_quant(k);
    else if (isa == "avx512vnni") avx512vnni_quant(k);
    else return;
    test_products(k);
  }
#else
  (void)k;
#endif
}

std::vector<float> logits(Model& model, const std::vector<std::int32_t>& ids, int64_t batch, int64_t piece) {
  const int64_t length = int64_t(ids.size()) / batch, vocab = model.config.vocab;
  State state(model.config, batch);
  std::vector<float> out(std::size_t(batch * length * vocab), NAN);
  for (int64_t first = 0; first < length; first += piece) {
    const int64_t n = std::min(piece, length - first);
    std::vector<std::int32_t> part;
    std::vector<float> some(std::size_t(batch * n * vocab), NAN);
    for (int64_t b = 0; b < batch; ++b)
      part.insert(part.end(), ids.begin() + b * length + first, ids.begin() + b * length + first + n);
    forward(model, part.data(), n, state, some.data(), [] {});
    for (int64_t b = 0; b < batch; ++b)
      std::copy_n(some.data() + b * n * vocab, n * vocab, out.data() + (b * length + first) * vocab);
  }
  return out;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0, most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    worst = std::isfinite(a[i]) ? std::max(worst, double(std::fabs(a[i] - b[i]))) : 1e30;
    most = std::max(most, double(std::fabs(b[i])));
  }
  return worst / most;
}

// Pieces, threads and neighbours leave every bit alone; float32 activations agree with the portable twin.
void test_model(const Kernels& k, const Config& shape, const std::string& layout) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 3 * 41; ++i) ids.push_back(std::int32_t(i * 7919 % shape.vocab));
  for (const bool int8 : {false, true}) {
    Config config = shape;
    config.int8_activations = int8;
    const std::string name = std::string(k.isa) + " " + layout + (int8 ? " int8" : " float32") +
                             (shape.mamba2 ? " mamba2" : " mamba1") + " state " + std::to_string(shape.state_type);
    RandomModel three(config, layout, k, 3, 5), one(config, layout, k, 1, 5);
    const auto whole = logits(three.model, ids, 3, 41);
    check(logits(three.model, ids, 3, 1) == whole, name + ": token by token");
    check(logits(one.model, ids, 3, 6) == whole, name + ": in pieces, one thread");
    const std::vector<std::int32_t> second(ids.begin() + 41, ids.begin() + 82);
    const auto alone = logits(one.model, second, 1, 17);
    const int64_t vocab = config.vocab;
    check(std::equal(alone.begin(), alone.end(), whole.begin() + 41 * vocab), name + ": without neighbours");
    RandomModel naive(config, layout, *kernels_for("portable"), 2, 5);
    const double worst = difference(whole, logits(naive.model, ids, 3, 41));
    // A code of an activation or a state may flip where float32 sums differ in the last bit
    check(worst < (int8 || shape.state_type != kStateFloat32 ? 0.3 : 1e-4), name + ": portable twin, " + std::to_string(worst));
    State state(config, 2);
    std::vector<float> first(std::size_t(2 * vocab));
    prefill(three.model, ids.data(), 9, state, first.data(), [] {});
    SampleParams params;
    params.temperature = 0.8;
    Generation run(three.model, state, first.data(), ids.data(), 9, params, {}, 12);
    std::vector<std::int32_t> made(24, -2);
    check(run.next(12, made.data(), [] {}) == 12, name + ": generation");
    for (const std::int32_t id : made) check(id >= 0 && id < vocab, name + ": generated id");
  }
}

// Two models in two threads, each with workers of its own.
void test_two_at_once(const Kernels& k) {
  std::vector<std::vector<float>> out(2);
  std::vector<std::thread> users;
  for (int i = 0; i < 2; ++i) {
    users.emplace_back([&, i] {
      RandomModel m(mamba2_shape(2, 64, 16, 16, 101), "dfssm", k, 2, 4);
      out[std::size_t(i)] = logits(m.model, {1, 2, 3, 4, 5, 6, 7, 8}, 1, 3);
    });
  }
  for (auto& u : users) u.join();
  check(out[0] == out[1], std::string("two models at once ") + k.isa);
}

}  // namespace

int main() {
  for (const char* isa : kIsas) {
    const Kernels* k = kernels_for(isa);
    if (!k) {
      std::printf("%-10s not on this machine\n", isa);
      continue;
    }
    const int before = failures, from = checks;
    test_products(*k);
    test_caches(*k);
    for (const char* layout : {"published", "dfssm", "ranked", "mixed"}) {
      Config shape = mamba2_shape(2, 72, 24, 16, 131);
      test_model(*k, shape, layout);
      shape.state_type = kStateInt8;
      test_model(*k, shape, layout);
      shape = mamba2_shape(1, 64, 64, 32, 67);
      shape.state_type = kStateBfloat16;
      test_model(*k, shape, layout);
      test_model(*k, mamba1_shape(2, 48, 16, 67), layout);
    }
    test_two_at_once(*k);
    std::printf("%-10s %d checks, %d failed\n", isa, checks - from, failures - before);
  }
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
