// slimba._core.kernels: each kernel on its own, for tests (any instruction set against the naive twin) and the
// bandwidth probe.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "engine/buffer.h"
#include "engine/probe.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace slimba;
using std::int64_t;

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const std::uint8_t, 1>;
using OutBytes = Array<std::uint8_t, 1>;
using In1 = Array<const float, 1>;
using In2 = Array<const float, 2>;
using Out1 = Array<float, 1>;
using Out2 = Array<float, 2>;

const Kernels& table(const std::string& isa) {
  const Kernels* k = kernels_for(isa.c_str());
  if (!k) throw std::invalid_argument("this machine cannot run the instruction set '" + isa + "'");
  return *k;
}

// y [T, rows] from one segment of `rows` x `cols`; only the rows begin..end are written.
void matmul(const std::string& isa, int format, const Bytes& data, const std::optional<Bytes>& scale, const In2& x,
            const Out2& y, int64_t begin, int64_t end, bool add) {
  const FormatKernels& k = *table(isa).format[format];
  const int64_t tokens = int64_t(x.shape(0)), cols = int64_t(x.shape(1)), rows = int64_t(y.shape(1)),
                stride = k.prepared_floats(cols);
  Buffer prepared, scratch;
  prepared.at_least(tokens * stride);
  for (int64_t i = 0; i < tokens * stride; ++i)
    prepared.data()[i] = __builtin_nanf("");  // nothing may be read before it is written
  for (int64_t t = 0; t < tokens; ++t) k.prepare(x.data() + t * cols, cols, prepared.data() + t * stride);
  const int64_t floats = k.scratch_floats(cols);
  scratch.at_least(floats);
  for (int64_t i = 0; i < floats; ++i) scratch.data()[i] = __builtin_nanf("");
  k.matmul({data.data(), scale ? scale->data() : nullptr, rows, cols, begin, end, prepared.data(), tokens, y.data(),
            rows, add, scratch.data()});
}

// q [n rounded up to 64] and scale of one token; returns the sums of kernels.h's QuantArgs
std::vector<int> quantize(const std::string& isa, const In1& x, const Array<std::int8_t, 1>& q, const Out1& scale) {
  std::vector<int> sums((x.size() + 127) / 128 + 1, -1);
  table(isa).quantize(x.data(), int64_t(x.size()), q.data(), scale.data(), sums.data());
  return sums;
}

// The same as matmul with int8 activations, by the kernel for few or for many tokens.
void quant_matmul(const std::string& isa, int format, const Bytes& data, const Bytes& scale, const In2& x,
                  const Out2& y, int64_t begin, int64_t end, bool add, bool many) {
  const Kernels& kernels = table(isa);
  const QuantFormat& k = *kernels.quant[format];
  const int64_t tokens = int64_t(x.shape(0)), cols = int64_t(x.shape(1)), rows = int64_t(y.shape(1));
  const QuantInput& input = many ? k.many_input : k.few_input;
  const int64_t stride = (cols + 63) / 64 * 64 + 64, sums = (cols + 127) / 128 + 1, ready = input.bytes(cols);
  const int64_t room = (tokens + kQuantBlock - 1) / kQuantBlock * kQuantBlock;
  Buffer q, scales, totals, prepared, scratch;
  const auto poisoned = [](Buffer& b, int64_t bytes) {  // nothing may be read before it is written
    b.at_least((bytes + 3) / 4);
    std::memset(b.data(), 0x7f, std::size_t((bytes + 3) / 4 * 4));
    return reinterpret_cast<std::uint8_t*>(b.data());
  };
  auto* codes = reinterpret_cast<std::int8_t*>(poisoned(q, room * stride));
  auto* whole = reinterpret_cast<std::int32_t*>(poisoned(totals, tokens * sums * 4));
  std::uint8_t* made = poisoned(prepared, tokens * ready);
  scales.at_least(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.quantize(x.data() + t * cols, cols, codes + t * stride, scales.data() + t, whole + t * sums);
    if (ready) input.prepare(codes + t * stride, cols, made + t * ready);
  }
  (many ? k.many : k.few)({data.data(), scale.data(), rows, cols, begin, end, codes, stride, scales.data(), whole, made,
                           tokens, y.data(), rows, add, poisoned(scratch, k.scratch_bytes(cols))});
}

void conv_silu(const std::string& isa, const In2& in, const In2& weight, const std::optional<In1>& bias,
               const Out2& state, const Out2& out, bool keep) {
  const int64_t channels = int64_t(in.shape(1));
  table(isa).conv_silu({in.data(), channels, int64_t(in.shape(0)), channels, weight.data(), channels,
                        bias ? bias->data() : nullptr, int(weight.shape(0)), state.data(), out.data(), channels, keep});
}

// A state [rows, N] for one call: float32, uint16 (bfloat16) or int8 with scales [rows]; type is kernels.h's StateType.
struct TestState {
  StateType type;
  std::uint8_t* data;
  float* scales;
  Buffer work;
  TestState(int t, const OutBytes& state, const Out1& scale, int64_t n)
      : type(StateType(t)), data(state.data()), scales(scale.data()) {
    const int64_t floats = (n + 15) / 16 * 16;
    work.at_least(floats);
    for (int64_t i = 0; i < floats; ++i) work.data()[i] = __builtin_nanf("");
  }
};

// x [T, H P], b and c [T, N] packed into xbc; dt [T, H], a [H], d [H] or [H P]; state [H, P, N] and its scales [H, P];
// buffer: filled, u [H, 16, P] and b [16, N] as bytes, logs [H, 16]; y [T, H P]. Returns how much is filled then.
int64_t ssm2(const std::string& isa, const In2& xbc, const In2& dt, const In1& a, const In1& d, int type,
             const OutBytes& state, const Out1& scale, int64_t filled, const OutBytes& held_u, const OutBytes& held_b,
             const Out2& logs, const Out2& y) {
  const int64_t inner = int64_t(y.shape(1)), heads = int64_t(a.size()), n = (int64_t(xbc.shape(1)) - inner) / 2;
  const int64_t stride = inner + 2 * n, width = type == kStateFloat32 ? 4 : 2;
  Buffer work;
  work.at_least(ssm2_work_floats(n));
  for (int64_t i = 0; i < ssm2_work_floats(n); ++i) work.data()[i] = __builtin_nanf("");
  const int64_t length = int64_t(y.shape(0));
  for (int64_t t = 0; t < length;) {
    const int64_t tokens = std::min(kStateBlock - filled, length - t);
    const float* x = xbc.data() + t * stride;
    table(isa).ssm2({tokens, heads, inner / heads, n, x, x + inner, x + inner + n, stride, dt.data() + t * heads, heads,
                     a.data(), d.data(), int64_t(d.size()) > heads, StateType(type), state.data(), scale.data(), filled,
                     held_u.data(), held_b.data(), logs.data(), y.data() + t * inner, inner, work.data()});
    for (int64_t i = 0; i < tokens; ++i)
      table(isa).hold(StateType(type), x + inner + i * stride, n, held_b.data() + (filled + i) * n * width);
    t += tokens;
    filled = (filled + tokens) % kStateBlock;
  }
  return filled;
}

void ssm1(const std::string& isa, const In2& x, const In2& bc, const In2& dt, const In2& a, const In1& d, int type,
          const OutBytes& state, const Out1& scale, const Out2& y) {
  const int64_t channels = int64_t(a.shape(0)), n = int64_t(a.shape(1));
  TestState s(type, state, scale, n);
  table(isa).ssm1({int64_t(x.shape(0)), channels, n, x.data(), channels, bc.data(), bc.data() + n, 2 * n, dt.data(),
                   channels, a.data(), d.data(), s.type, s.data, s.scales, y.data(), channels, s.work.data()});
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::module_ k = m.def_submodule("kernels", "Single kernels, for tests");
  k.def("matmul", matmul, nb::arg("isa"), nb::arg("format"), nb::arg("data"), nb::arg("scale").none(), nb::arg("x"),
        nb::arg("y"), nb::arg("begin"), nb::arg("end"), nb::arg("add"));
  k.def("quantize", quantize);
  k.def("quant_matmul", quant_matmul);
  k.def("conv_silu", conv_silu, nb::arg("isa"), nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
        nb::arg("state"), nb::arg("out"), nb::arg("keep") = true);
  k.def("ssm2", ssm2);
  k.def("ssm1", ssm1);
  k.def(
      "rms_norm",
      [](const std::string& isa, const In1& x, const std::optional<In1>& w, float eps, const Out1& y) {
        table(isa).rms_norm(x.data(), w ? w->data() : nullptr, int64_t(x.size()), eps, y.data());
      },
      nb::arg("isa"), nb::arg("x"), nb::arg("weight").none(), nb::arg("eps"), nb::arg("y"));
  k.def("gate", [](const std::string& isa, const In1& y, const In1& z, const Out1& out) {
    table(isa).gate(y.data(), z.data(), int64_t(y.size()), out.data());
  });
  k.def("hadamard", [](const std::string& isa, const Out1& x, int64_t block) {
    table(isa).hadamard(x.data(), int64_t(x.size()), block);
  });
  k.def("max", [](const std::string& isa, const In1& x) { return table(isa).max(x.data(), int64_t(x.size())); });
  k.def("sum_exp", [](const std::string& isa, const In1& x, float shift) {
    return table(isa).sum_exp(x.data(), int64_t(x.size()), shift);
  });
  k.def("softplus", [](const std::string& isa, const In1& x, const In1& bias, float low, float high, const Out1& out) {
    table(isa).softplus(x.data(), bias.data(), int64_t(x.size()), low, high, out.data());
  });
  k.def(
      "read_seconds",
      [](int64_t bytes, int threads, int repeats) { return read_seconds(table(""), bytes, threads, repeats); },
      nb::arg("bytes"), nb::arg("threads"), nb::arg("repeats"));
}
