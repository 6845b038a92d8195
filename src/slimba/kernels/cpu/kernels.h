// The contract between the engine and the kernels: plain structs and function pointers, one table per instruction set.
//
// Every family folder (sign, int8, int4, floats, norm, ssm) holds naive.cpp, the readable portable twin, and avx2.cpp
// and avx512.cpp, compiled with their own flags. This header must stay free of inline functions and templates: whatever
// two translation units with different flags share, the linker may merge into the faster one and break older machines.
//
// Tested by tests/kernels/. Legend: T tokens, W lanes of a vector register, y and x are float32 everywhere.
#pragma once

#include <cstdint>

namespace slimba {

// Rows that the repacking loops of quant/ take at a time; activations are readable for as many tokens.
constexpr std::int64_t kQuantBlock = 32;

enum Format : int { kFloat32, kFloat16, kBfloat16, kInt8, kInt4, kSign, kFormats };

// y[t * y_stride + r] = (add ? y : 0) + sum_c w[r, c] * x[t, c] for the rows row_begin <= r < row_end of one segment.
// The order of the additions for one (r, t) depends on the columns only: not on T, the row range or the other tokens.
struct MatmulArgs {
  const std::uint8_t* data;   // the segment as stored in the file, any alignment
  const std::uint8_t* scale;  // float16: one a row (sign, int8), one a group of 128 columns (int4), null (floats)
  std::int64_t rows, cols;
  std::int64_t row_begin, row_end;
  const float* x;  // activations as the family's `prepare` wrote them, prepared_floats(cols) floats a token
  std::int64_t tokens;
  float* y;
  std::int64_t y_stride;
  bool add;
  float* scratch;  // scratch_floats(cols) floats of this thread, 64-byte aligned
};

struct FormatKernels {
  std::int64_t (*prepared_floats)(std::int64_t cols);  // a multiple of 16
  void (*prepare)(const float* x, std::int64_t cols, float* out);
  std::int64_t (*scratch_floats)(std::int64_t cols);
  void (*matmul)(const MatmulArgs& a);
};

// Products with int8 activations. A token x [cols] becomes q = round(x 127 / max|x|), ties to even, with one float32 scale
// max|x| / 127 (0 below 1e-30; NaN when x holds NaN or infinity). With n = sum_c w[r, c] q[t, c] in whole numbers,
//     sign, int8: y = n * (scale[r] * x_scale[t]);   int4: y = (sum over groups g of scale[r, g] * n_g) * x_scale[t],
// each product and sum rounded to float32 in this order, so every instruction set gives the same bits.
struct QuantArgs {
  const std::uint8_t *data, *scale;  // as in MatmulArgs
  std::int64_t rows, cols;
  std::int64_t row_begin, row_end;
  const std::int8_t* x;  // [T, x_stride], zeros from cols to the next multiple of 64; readable for 32 tokens at a time
  std::int64_t x_stride;
  const float* x_scale;       // [T]
  const std::int32_t* x_sums;  // [T, ceil(cols / 128) + 1]: sum of q over each 128 columns, then over all
  const std::uint8_t* prepared;  // [T, bytes(cols)] by `prepare` of what is called: `few` or `many`
  std::int64_t tokens;
  float* y;
  std::int64_t y_stride;
  bool add;
  std::uint8_t* scratch;  // scratch_bytes(cols) bytes of this thread, 64-byte aligned
  bool once = false;      // the rows come from memory and will not be in a cache the next time either
};

// What a product wants of each token besides its codes.
struct QuantInput {
  std::int64_t (*bytes)(std::int64_t cols);  // a multiple of 64, or 0: nothing to prepare
  void (*prepare)(const std::int8_t* x, std::int64_t cols, std::uint8_t* out);
};

struct QuantFormat {
  QuantInput few_input, many_input;
  std::int64_t (*scratch_bytes)(std::int64_t cols);
  void (*few)(const QuantArgs& a);   // reads rows as they are stored: best for up to few_tokens tokens
  void (*many)(const QuantArgs& a);  // expands rows to bytes first; same results
  std::int64_t few_tokens;
  std::int64_t many_rows;  // that `many` likes to get at a time, where there are enough of them for all threads
};

// Causal depthwise convolution and SiLU of `channels` channels over T tokens that continue from `state`.
struct ConvArgs {
  const float* in;  // [T, in_stride]
  std::int64_t in_stride, tokens, channels;
  const float* weight;  // [K, weight_stride]: tap k meets the input of k - (K - 1) tokens ago
  std::int64_t weight_stride;
  const float* bias;  // [channels] or null
  int taps;           // K
  float* state;       // [K - 1, weight_stride]: inputs before the first token, oldest first
  float* out;         // [T, out_stride], not overlapping `in`
  std::int64_t out_stride;
  bool keep;  // whether `state` is to move on
};

// How a recurrent state is stored: in float32, in nearest-even bfloat16, or in int8 with one float32 scale for each row of
// N entries, max |S| / 127, codes nearest-even (a row below 1e-30 becomes zero, one that holds NaN or infinity stays
// damaged). All arithmetic is float32. A Mamba-1 state is stored after every token, whose y is taken before the rounding;
// a Mamba-2 state after every kStateBlock tokens.
enum StateType : int { kStateFloat32, kStateBfloat16, kStateInt8 };

// Mamba-2: what the tokens since the last storing add to the state is held in a buffer (docs/decisions.md, recurrent
// state). For the j-th of them, with r = bfloat16 where the state is not float32:
//     u_j = r(dt_j x_j), b_j = r(B_j), L_j = dt_1 A + ... + dt_j A
//     y_j = exp(L_j) S C_j + sum_(i <= j) exp(L_j - L_i) <b_i, C_j> u_i + D x_j
// and after j = kStateBlock S becomes exp(L_j) S + sum_i exp(L_j - L_i) u_i b_i^T, stored.
constexpr std::int64_t kStateBlock = 16;

// T more tokens for some heads of one group, filled + T <= kStateBlock. Reads the first `filled` rows of held_b and leaves
// them alone; whoever calls adds the new ones by `hold` when all heads have run.
struct Ssm2Args {
  std::int64_t tokens, heads, headdim, d_state;
  const float *x, *b, *c;  // [T, xbc_stride]: x of the first head, B and C of the group
  std::int64_t xbc_stride;
  const float* dt;  // [T, dt_stride], from the first head's column on
  std::int64_t dt_stride;
  const float* a;  // [heads], negative
  const float* d;  // D: [heads], or [heads, P] when d_per_channel
  bool d_per_channel;
  StateType type;
  std::uint8_t* state;  // [heads, P, N] in its type
  float* state_scale;   // [heads, P], int8 only
  std::int64_t filled;  // tokens in the buffer
  std::uint8_t* held_u;  // [heads, kStateBlock, P], float32 or bfloat16
  const std::uint8_t* held_b;  // [kStateBlock, N], the same
  float* logs;                 // L [heads, kStateBlock]
  float* y;                    // [T, y_stride]
  std::int64_t y_stride;
  float* work;        // ssm2_work_floats(N) of this thread, 64-byte aligned
  bool once = false;  // as in QuantArgs, of the state
};
constexpr std::int64_t ssm2_work_floats(std::int64_t n) { return (2 * kStateBlock + 2) * ((n + 31) / 32 * 32); }

// Mamba-1 recurrence of `channels` channels: S[i, :] = exp(dt[t, i] A[i, :]) S[i, :] + (dt[t, i] x[t, i]) B[t], y =
// <S[i], C[t]> + D[i] x.
struct Ssm1Args {
  std::int64_t tokens, channels, d_state;
  const float* x;
  std::int64_t x_stride;
  const float *b, *c;
  std::int64_t bc_stride;
  const float* dt;
  std::int64_t dt_stride;
  const float* a;  // [channels, N], negative
  const float* d;  // [channels]
  StateType type;
  std::uint8_t* state;  // [channels, N] in its type
  float* state_scale;   // [channels], int8 only
  float* y;
  std::int64_t y_stride;
  float* work;  // round_up(N, 16) floats of this thread; untouched when the state is float32
};

struct Kernels {
  const char* isa;
  // Weights of more bytes in all are read with `once`; 0: never. On AMD, whose cores see a third-level cache of 32 or 96 MB.
  std::int64_t cached_bytes;
  std::int64_t near_bytes;  // a core's first-level cache for data; 0: not known
  const FormatKernels* format[kFormats];
  // quant/
  const QuantFormat* quant[kFormats];  // null for the float formats
  // q [n] and zeros up to the next multiple of 64; sums as in QuantArgs
  void (*quantize)(const float* x, std::int64_t n, std::int8_t* q, float* scale, std::int32_t* sums);
  // norm/
  void (*rms_norm)(const float* x, const float* weight, std::int64_t n, float eps,
                   float* y);                                                // weight may be null; y may be x
  void (*gate)(const float* y, const float* z, std::int64_t n, float* out);  // out = y * silu(z); out may be y
  float (*max)(const float* x, std::int64_t n);                              // NaN or infinity anywhere gives NaN
  double (*sum_exp)(const float* x, std::int64_t n, float shift);            // sum of exp(x - shift)
  void (*read)(const float* x, std::int64_t n, float* sink);                 // bandwidth probe
  // The transform of formats/hadamard.py in place: n a multiple of block, block a power of two. Stages of distance 1, 2, 4,
  // ... turn (a, b) into (a + b, a - b), then all is multiplied by float(1 / sqrt(block)): the same bits everywhere.
  void (*hadamard)(float* x, std::int64_t n, std::int64_t block);
  // ssm/
  void (*conv_silu)(const ConvArgs& a);
  void (*softplus)(const float* x, const float* bias, std::int64_t n, float low, float high, float* out);  // clamped
  // n numbers as a buffer holds them: float32, or nearest-even bfloat16 where the state's type is not float32
  void (*hold)(StateType type, const float* x, std::int64_t n, std::uint8_t* out);
  void (*ssm2)(const Ssm2Args& a);
  void (*ssm1)(const Ssm1Args& a);
};

// Writes row r of a stored segment as `cols` floats (embedding look-up, and the heart of every naive matmul).
using DequantRow = void (*)(const std::uint8_t* data, const std::uint8_t* scale, std::int64_t cols, std::int64_t r,
                            float* out);
extern const DequantRow kDequantRow[kFormats];

extern const FormatKernels kNaiveFloat32, kNaiveFloat16, kNaiveBfloat16, kNaiveInt8, kNaiveInt4, kNaiveSign;
void naive_dequant_float32(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int64_t, float*);
void naive_dequant_float16(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int64_t, float*);
void naive_dequant_bfloat16(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int64_t, float*);
void naive_dequant_int8(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int64_t, float*);
void naive_dequant_int4(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int64_t, float*);
void naive_dequant_sign(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int64_t, float*);
void naive_quant(Kernels& k);
void naive_norm(Kernels& k);
void naive_ssm(Kernels& k);

#if defined(SLIMBA_X86)
extern const FormatKernels kAvx2Float32, kAvx2Float16, kAvx2Bfloat16, kAvx2Int8, kAvx2Int4, kAvx2Sign;
void avx2_quant(Kernels& k);
void avxvnni_quant(Kernels& k);
void avx512vnni_quant(Kernels& k);
void avx512lookup_quant(Kernels& k);  // over the table that avx512vnni_quant filled
void amx_quant(Kernels& k);  // over the table that avx512vnni_quant filled
void avx2_norm(Kernels& k);
void avx2_ssm(Kernels& k);
extern const FormatKernels kAvx512Float32, kAvx512Float16, kAvx512Bfloat16, kAvx512Int8, kAvx512Int4, kAvx512Sign;
void avx512_norm(Kernels& k);
void avx512_ssm(Kernels& k);
#endif

#if defined(SLIMBA_NEON)
void neon_quant(Kernels& k);
#endif

// The table for `isa`: "" chooses by cpuid; "portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512lookup", "amx" and "neon" force
// one. Null when this machine cannot run it.
const Kernels* kernels_for(const char* isa);

}  // namespace slimba
