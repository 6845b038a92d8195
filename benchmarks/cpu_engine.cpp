// Speed of the C++ engine at the shape of Mamba-2 1.3B, random weights, without Python; one JSON record on stdout.
//
//     bash scripts/build_cpp.sh cpu_engine benchmarks/cpu_engine.cpp && ./cpu_engine THREADS[,...] [STATE[,...]] [LAYERS]
//
// For each number of threads, state type (fp32, bf16, int8; default bf16) and layout (`dfssm`, `published`, see
// random_model.h): decode at batch 1, with int8 activations and, with FLOATS=1, float32 ones, and prefill of 512 tokens. Ends
// early, with what it has, after BUDGET seconds (environment, 200). With PROFILE=1 the time in each kernel goes to stderr.
// A decode step must read all weights and the state, write a sixteenth of it, and read and write what else it remembers;
// the floor is those bytes at the bandwidth measured in the same run. benchmarks/xeon_cpu.sh runs the tests first.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <sstream>

#include "engine/probe.h"
#include "engine/sequence.h"
#include "kernel_times.h"
#include "random_model.h"

using namespace slimba;
using std::int64_t;

namespace {

using Clock = std::chrono::steady_clock;

std::vector<std::string> parts(const char* list) {
  std::stringstream stream(list);
  std::vector<std::string> out;
  for (std::string part; std::getline(stream, part, ',');) out.push_back(part);
  return out;
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Median seconds of a decode step: five pieces of 16 tokens, in which the state is written once, after a warm-up of one.
double decode_seconds(Model& model, State& state) {
  constexpr int kSteps = int(kStateBlock), kPieces = 5;
  std::vector<float> logits(std::size_t(model.config.vocab));
  std::vector<double> times;
  std::int32_t id = 1;
  for (int piece = 0; piece <= kPieces; ++piece) {
    if (piece == 1) timed::clear();
    const auto start = Clock::now();
    for (int i = 0; i < kSteps; ++i) {
      prefill(model, &id, 1, state, logits.data(), [] {});
      id = std::int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    if (piece) times.push_back(seconds_since(start) / kSteps);
  }
  const double all = std::accumulate(times.begin(), times.end(), 0.0) * kSteps;
  if (timed::base) timed::print("a token", all, kPieces * kSteps, model.pool().threads());
  return median(times);
}

double prefill_seconds(Model& model, State& state, int64_t length, int repeats) {
  std::vector<std::int32_t> ids;
  for (int64_t i = 0; i < length; ++i) ids.push_back(std::int32_t(i * 7919 % model.config.vocab));
  std::vector<float> logits(std::size_t(model.config.vocab));
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    state.reset();
    const auto start = Clock::now();
    prefill(model, ids.data(), length, state, logits.data(), [] {});
    times.push_back(seconds_since(start));
  }
  if (timed::base) timed::print("a prompt", std::accumulate(times.begin(), times.end(), 0.0), repeats, model.pool().threads());
  return median(times);
}

bool first_record = true;
constexpr const char* kStates[] = {"fp32", "bf16", "int8"};  // in the order of StateType

// What a step reads and writes besides the weights, of one sequence.
int64_t state_traffic(const Config& c) {
  const State::Sizes s(c);
  const int64_t held = (s.bytes[State::kHeldU] + s.bytes[State::kHeldB] + s.bytes[State::kLogs]) / kStateBlock;
  const int64_t stored = s.bytes[State::kSsm] + s.bytes[State::kScales];
  return c.n_layer * (stored + stored / kStateBlock + 2 * s.bytes[State::kConv] + held * (kStateBlock + 1) / 2);
}

void record(const char* layout, bool int8, Config config, const Kernels& k, int threads, double bandwidth) {
  config.int8_activations = int8;
  RandomModel random(config, layout, k, threads);
  State state(config, 1);
  const double decode = decode_seconds(random.model, state);
  const double prompt = int8 ? prefill_seconds(random.model, state, 512, threads > 1 ? 3 : 1) : 0;
  const int64_t bytes = random.weight_bytes + state_traffic(config);
  const double floor = double(bytes) / bandwidth;
  const char *activations = int8 ? "int8" : "float32", *type = kStates[config.state_type];
  std::printf(
      "%s\n  {\"layout\": \"%s\", \"activations\": \"%s\", \"state\": \"%s\", \"threads\": %d, \"bytes\": %lld, "
      "\"weight_bytes\": %lld, \"bandwidth\": %.4g, \"floor\": %.4g, \"decode_seconds\": %.4g, "
      "\"decode_tokens_per_second\": %.2f, \"share\": %.3f, \"prefill_512_seconds\": %.4g, "
      "\"prefill_512_tokens_per_second\": %.1f}",
      first_record ? "" : ",", layout, activations, type, threads, (long long)bytes, (long long)random.weight_bytes,
      bandwidth, floor, decode, 1 / decode, floor / decode, prompt, prompt > 0 ? 512 / prompt : 0);
  std::fflush(stdout);
  first_record = false;
  std::fprintf(stderr, "%-10s %-7s act. %s state %2d threads: decode %6.1f tok/s (%.0f %% of %.1f GB/s), prefill %.0f tok/s\n",
               layout, activations, type, threads, 1 / decode, 100 * floor / decode, bandwidth / 1e9,
               prompt > 0 ? 512 / prompt : 0);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: cpu_engine THREADS[,THREADS...] [fp32|bf16|int8[,...]] [LAYERS]\n");
    return 2;
  }
  const char* forced = std::getenv("SLIMBA_CPU_ISA");
  const Kernels* k = kernels_for(forced ? forced : "");
  if (!k) {
    std::fprintf(stderr, "this machine cannot run the instruction set %s\n", forced);
    return 2;
  }
  const int layers = argc > 3 ? std::atoi(argv[3]) : 48;
  std::printf("{\"isa\": \"%s\", \"layers\": %d, \"rows\": [", k->isa, layers);
  if (std::getenv("PROFILE")) k = &timed::table(*k);
  const char* limit = std::getenv("BUDGET");
  const double budget = limit ? std::atof(limit) : 200;
  const auto begin = Clock::now();
  for (const std::string& part : parts(argv[1])) {
    const int threads = std::max(1, std::atoi(part.c_str()));
    const std::vector<double> passes = read_seconds(*k, int64_t(1) << 29, threads, 10);
    const double bandwidth = double(int64_t(1) << 29) / *std::min_element(passes.begin(), passes.end());
    for (const std::string& state : parts(argc > 2 ? argv[2] : "bf16")) {
      Config config = mamba2_shape(layers, 2048, 128, 64, 50288);
      config.state_type = state == "fp32" ? kStateFloat32 : state == "int8" ? kStateInt8 : kStateBfloat16;
      for (const char* layout : {"dfssm", "published"})
        for (const bool int8 : {true, false})
          if ((int8 || std::getenv("FLOATS")) && seconds_since(begin) < budget)
            record(layout, int8, config, *k, threads, bandwidth);
    }
  }
  std::printf("\n]}\n");
  return 0;
}
