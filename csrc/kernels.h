// What each kernel is asked for. Shapes: T tokens, D dim, F hidden_dim, E experts, K experts per
// token, H heads, G kv heads, S head_dim, N rows and M columns of a matrix.
#pragma once

#include <cstdint>

#include "team.h"

namespace tramontane {

enum class Type : int { kFloat = 0, kBfloat16 = 1 };

// Numbers in memory, row after row.
struct Values {
  const void* data;
  Type type;
};

// A matrix (N, M) of a linear layer, or several stacked: plain numbers, or 4 or 8 bits in groups as
// `tramontane/kernels/packing.py` lays them out.
struct Weight {
  const void* data;        // plain (N, M), or qweight
  Type type;               // of plain numbers
  int bits;                // 0: plain
  const uint16_t* scales;  // fp16 (NB, M / group, 16)
  const uint8_t* zeros;    // as the scales, or null: 8 or 128 everywhere
  int64_t num_rows, num_columns, group;
  int64_t expert_stride = 0;  // of a plain stack: numbers from one matrix to the next
};

// out_i = x weight_i^T for matrices that read the same x: queries, keys and values, say.
constexpr int kMaxOutputs = 3;
struct LinearArguments {
  Values x;  // (T, M)
  int64_t num_tokens;
  int num_outputs;
  Weight weights[kMaxOutputs];
  void* outs[kMaxOutputs];  // (T, N_i), of the type of x
  const void* residual;     // (T, N), of the type of x, to be added to the only output; or null
};

constexpr int64_t kNoExpert = -1;

struct ExpertsArguments {
  Values x;  // (T, D)
  int64_t num_tokens, num_experts, num_slots;
  const float* slot_weights;  // (T, K)
  const int64_t* experts;     // (T, K); a slot with kNoExpert is left out
  Weight w1, w2, w3;          // of the first expert; w1 and w3 are both plain or of one group size
  void* out;                  // (T, D), of the type of x
  const void* residual;       // (T, D), of the type of x, to be added; or null
};

struct NormArguments {
  Values x;  // (T, D)
  Values weight;
  int64_t num_tokens, dim;
  float eps;
  void* out;
};

// From the gradient of RMSNorm's result to those of what it was given.
struct NormGradArguments {
  Values x;  // (T, D)
  Values weight;
  Values grad;  // (T, D), of the type of x, as `grad_x`
  int64_t num_tokens, dim;
  float eps;
  void* grad_x;
  void* grad_weight;  // (D,), of the type of the weight
};

// silu(gate) * up of `count` numbers, all of one type.
struct SwigluArguments {
  Values gate, up;
  int64_t count;
  void* out;
};

// The same, and from the gradient of its result to those of `gate` and `up`.
struct SwigluGradArguments {
  Values gate, up, grad;
  int64_t count;
  void *out, *grad_gate, *grad_up;
};

struct RotateArguments {
  Values x;  // (T, H, S), tokens `stride` numbers apart
  int64_t num_tokens, num_heads, head_dim, stride;
  const float *cos, *sin;  // (T, S / 2)
  void* out;               // (T, H, S)
};

// Keys and values of one layer in blocks of `block_size` tokens: number s of head g of the token in
// slot n of block b is at ((b * G + g) * block_size + n) * S + s.
struct Cache {
  void *keys, *values;
  Type type;
  int64_t block_size;
};

// The tokens of one sequence in a batch: the last `num_queries` of `num_keys` positions.
struct Sequence {
  int64_t num_queries, num_keys;
  Cache cache;
  const int64_t* blocks;  // block of the positions 0 .. block_size - 1, of the next ones, ...
};

// What has been multiplied for attention goes where it is read.
struct StoreArguments {
  void* q;            // (T, H, S), turned in place
  const void *k, *v;  // (T, G, S); k is turned
  Type type;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  const float *cos, *sin;  // (T, S / 2)
  const Sequence* sequences;
  int64_t num_sequences;
};

struct AttentionArguments {
  Values q;  // (T, H, S), the tokens of the sequences one after another
  const Sequence* sequences;
  int64_t num_sequences, num_heads, num_kv_heads, head_dim;
  int64_t window;  // keys that a query sees; 0: all
  void* out;       // (T, H, S)
};

struct RouterArguments {
  Values x;       // (T, D)
  Values weight;  // (E, D)
  int64_t num_tokens, dim, num_experts, num_slots;
  const int64_t* counts;  // (T,) slots that a token uses, 1 .. K; null: all
  float* slot_weights;    // (T, K); of a slot that is not used 0, and its expert kNoExpert
  int64_t* experts;       // (T, K)
  float* logits;          // (T, E)
};

// Scores of the next token as the head gives them, made fp32, and what is asked of each row first:
// among its first `num_choices`, the largest (the lowest id of equals; any, if they are NaN), and
// whether all of them are finite.
struct HeadArguments {
  Values scores;  // (R, V)
  int64_t num_rows, num_columns, num_choices;
  float* logits;       // (R, V); may be where the scores are, if they are fp32
  int64_t* best;       // (R,)
  uint8_t* is_finite;  // (R,)
};

// The next token of each row, as its own settings say: see `sample_tokens` of
// tramontane/kernels/reference.py.
struct SampleArguments {
  const float* logits;  // (R, V), rows `stride` numbers apart
  int64_t num_rows, num_columns, stride;
  const float* temperature;  // (R,), as those that follow
  const int64_t* top_k;
  const float *top_p, *min_p;
  const double* numbers;  // from [0, 1)
  int64_t* tokens;
};

// Numbers of `size` bytes, 2 or 4, whose format has an infinity of the bits `infinity`.
struct FiniteArguments {
  const void* data;
  int64_t count;
  int size;
  uint32_t infinity;
};

// Memory for intermediate results: of this thread, grown as needed, kept.
class Scratch {
 public:
  ~Scratch();
  // `size` bytes, aligned to 64, filled with anything. Throws std::bad_alloc.
  void* reserve(int64_t size);

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// The kernels of one instruction set.
struct KernelTable {
  const char* name;
  void (*linear)(const LinearArguments&, Context&);
  void (*experts)(const ExpertsArguments&, Context&);
  void (*norm)(const NormArguments&, Context&);
  void (*norm_grad)(const NormGradArguments&, Context&);
  void (*swiglu)(const SwigluArguments&, Context&);
  void (*swiglu_grad)(const SwigluGradArguments&, Context&);
  void (*rotate)(const RotateArguments&, Context&);
  void (*store)(const StoreArguments&, Context&);
  void (*attention)(const AttentionArguments&, Context&);
  void (*router)(const RouterArguments&, Context&);
  void (*head)(const HeadArguments&, Context&);
  void (*sample)(const SampleArguments&, Context&);
  bool (*is_finite)(const FiniteArguments&, int num_threads);
};

// The best that this processor runs, or the one called `name`; null if it does not run that one.
const KernelTable* find_kernels(const char* name);

}  // namespace tramontane
