// A table of kernels that counts calls and the time spent in each, over all threads: where does a step go?
//
// Used by cpu_engine.cpp with PROFILE=1. A call costs some 500 ns more, so the small kernels look worse than they are.
#pragma once

#include <atomic>
#include <cstdio>
#include <ctime>
#include <string>

#include "kernels.h"

namespace slimba::timed {

enum Kind : int {
  kFew, kMany = kFew + kFormats, kFloat = kMany + kFormats, kPrepare = kFloat + kFormats, kQuantize, kNorm, kGate, kConv,
  kSoftplus, kSsm2, kSsm1, kKinds
};

inline const Kernels* base;
inline std::atomic<long long> spent[kKinds], calls[kKinds];

// Time of this thread's own, so that other work on the machine counts less
inline long long now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

struct Clocked {
  explicit Clocked(int kind) : kind(kind), start(now()) {}
  ~Clocked() {
    spent[kind] += now() - start;
    ++calls[kind];
  }
  int kind;
  long long start;
};

// The kernel at the member pointer kMember, timed as kKind
template <int kKind, auto kMember, class... A>
auto call(A... a) {
  const Clocked clock(kKind);
  return (base->*kMember)(a...);
}

template <int F>
struct Wrapped {
  static void few(const QuantArgs& a) { const Clocked c(kFew + F); base->quant[F]->few(a); }
  static void many(const QuantArgs& a) { const Clocked c(kMany + F); base->quant[F]->many(a); }
  static void prepare_few(const std::int8_t* x, std::int64_t n, std::uint8_t* o) { const Clocked c(kPrepare); base->quant[F]->few_input.prepare(x, n, o); }
  static void prepare_many(const std::int8_t* x, std::int64_t n, std::uint8_t* o) { const Clocked c(kPrepare); base->quant[F]->many_input.prepare(x, n, o); }
  static void product(const MatmulArgs& a) { const Clocked c(kFloat + F); base->format[F]->matmul(a); }
};

template <int F>
inline void wrap(Kernels& k, FormatKernels* formats, QuantFormat* quants) {
  formats[F] = *base->format[F];
  formats[F].matmul = Wrapped<F>::product;
  k.format[F] = &formats[F];
  if (!base->quant[F]) return;
  quants[F] = *base->quant[F];
  quants[F].few = Wrapped<F>::few;
  quants[F].many = Wrapped<F>::many;
  quants[F].few_input.prepare = Wrapped<F>::prepare_few;
  quants[F].many_input.prepare = Wrapped<F>::prepare_many;
  k.quant[F] = &quants[F];
}

inline const Kernels& table(const Kernels& k) {
  static Kernels out;
  static FormatKernels formats[kFormats];
  static QuantFormat quants[kFormats];
  base = &k;
  out = k;
  wrap<kFloat32>(out, formats, quants), wrap<kFloat16>(out, formats, quants), wrap<kBfloat16>(out, formats, quants);
  wrap<kInt8>(out, formats, quants), wrap<kInt4>(out, formats, quants), wrap<kSign>(out, formats, quants);
  out.quantize = call<kQuantize, &Kernels::quantize>;
  out.rms_norm = call<kNorm, &Kernels::rms_norm>;
  out.gate = call<kGate, &Kernels::gate>;
  out.conv_silu = [](const ConvArgs& a) { const Clocked c(kConv); base->conv_silu(a); };
  out.softplus = call<kSoftplus, &Kernels::softplus>;
  out.ssm2 = [](const Ssm2Args& a) { const Clocked c(kSsm2); base->ssm2(a); };
  out.ssm1 = [](const Ssm1Args& a) { const Clocked c(kSsm1); base->ssm1(a); };
  return out;
}

inline void clear() {
  for (int i = 0; i < kKinds; ++i) spent[i] = calls[i] = 0;
}

// To stderr: microseconds of all threads together and calls, a step; what is left of threads x wall is waiting and glue.
inline void print(const char* what, double wall, double steps, int threads) {
  static const char* formats[kFormats] = {"float32", "float16", "bfloat16", "int8", "int4", "sign"};
  static const char* others[] = {"prepare", "quantize", "norm", "gate", "conv", "softplus", "ssm2", "ssm1"};
  double sum = 0;
  std::fprintf(stderr, "  %s: %.0f us x %d threads\n", what, wall / steps * 1e6, threads);
  for (int i = 0; i < kKinds; ++i) {
    const double us = double(spent[i]) / 1e3 / steps;
    sum += us;
    if (!calls[i]) continue;
    const std::string name = i < kMany    ? std::string("few ") + formats[i]
                             : i < kFloat ? std::string("many ") + formats[i - kMany]
                             : i < kPrepare ? std::string("float ") + formats[i - kFloat] : others[i - kPrepare];
    std::fprintf(stderr, "    %-14s %9.1f us %9.1f calls\n", name.c_str(), us, double(calls[i]) / steps);
  }
  std::fprintf(stderr, "    %-14s %9.1f us\n", "the rest", wall / steps * 1e6 * threads - sum);
  clear();
}

}  // namespace slimba::timed
