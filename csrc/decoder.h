// A whole decoder of sparse layers in one call: what tramontane/models/transformer.py computes,
// from the embeddings to the scores of the next tokens, with the same kernels in the same order,
// and so the same bits.
#pragma once

#include <vector>

#include "kernels.h"

namespace tramontane {

struct DecoderLayer {
  Values attention_norm, ffn_norm;  // (D,)
  Weight wq, wk, wv, wo;
  Values gate;  // (E, D)
  Weight w1, w2, w3;
};

struct DecoderShape {
  int64_t dim, num_heads, num_kv_heads, head_dim, num_embeddings, num_experts;
  int64_t window;       // keys that a query sees; 0: all
  int64_t num_choices;  // columns of the head that a next token is chosen from
  float eps;
  Type type;  // of activations
};

// The keys and values of all sequences, (L, 2, num_blocks, G, block_size, S): where the keys of the
// first layer begin, and how many bytes further values and the next layers are.
struct CachePool {
  char* keys;
  int64_t values_offset, layer_offset;
  Type type;
  int64_t block_size;
};

// B sequences of a batch, see Sequence, in arrays.
struct SequenceTable {
  int64_t num_sequences, max_blocks;
  const int64_t *num_queries, *num_keys;  // (B,)
  const int64_t* block_tables;            // (B, max_blocks); the blocks that are read are believed
};

// Throws std::invalid_argument unless they have so many tokens, in blocks of that size.
void check_sequences(const SequenceTable& table, int64_t num_tokens, int64_t block_size);

void add_sequences(const SequenceTable& table, const Cache& cache, std::vector<Sequence>& to);

// How the next token of each row is drawn (SampleArguments); null settings: it is the best one.
struct Draws {
  const float* temperature;  // (R,), as those that follow
  const int64_t* top_k;
  const float *top_p, *min_p;
  const double* numbers;  // (S, R), for each step
};

// What one call runs: the tokens (T,) of the sequences, one sequence after another.
struct Batch {
  const int64_t* tokens;
  int64_t num_tokens;
  CachePool pool;
  SequenceTable sequences;
  const float *cos, *sin;  // (num_positions, S / 2): angles of the positions 0, 1, ...
  int64_t num_positions;
  const int64_t* rows;  // (num_rows,) tokens whose scores are wanted; null: all
  int64_t num_rows;
  const int64_t* counts;  // (T,) experts of each token, 1 .. num_slots; null: num_slots
  int64_t num_slots;
  Draws draws;
};

// Where results go: hidden (T, D) after the last norm; of the routers (L, T, K), (L, T, K) and
// (L, T, E); of the head scores (R, V), and of each row the best token, or the one that was drawn,
// and whether its scores are finite (HeadArguments).
struct DecoderResults {
  void* hidden;
  float* slot_weights;
  int64_t* experts;
  float* router_logits;
  float* logits;
  int64_t* next_tokens;
  uint8_t* is_finite;
};

// How far one call may go: `most` steps, none of which begins after so many seconds, nor after one
// whose next token is among `ends` (num_ends,). For more than one step each sequence has to bring
// one token, whose scores are wanted.
struct Steps {
  int64_t most;
  double seconds;
  const int64_t* ends;
  int64_t num_ends;
};

// Parts of a step whose time is counted.
enum Part {
  kEmbeddings,
  kNorms,
  kAttentionLinear,
  kAttention,
  kRouter,
  kExperts,
  kHead,
  kNumParts
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, Values embeddings, Values norm, Weight output)
      : shape_(shape), embeddings_(embeddings), norm_(norm), output_(output) {}

  void add_layer(const DecoderLayer& layer) { layers_.push_back(layer); }

  // One call at a time. Runs the batch, and then the next token of each sequence, again and again
  // until `steps` or scores that are not finite end it; returns the number of steps. Experts,
  // `next_tokens` and `is_finite` are (S, ...) of S steps, of all else the last step's remain.
  // Throws std::bad_alloc, std::out_of_range on an id that is none, and std::invalid_argument on
  // numbers that do not fit together.
  int64_t run(const KernelTable& kernels, Batch batch, DecoderResults results, const Steps& steps,
              int num_threads);

  // Seconds that all calls of `run` have spent in each part.
  const double* seconds() const { return seconds_; }

 private:
  struct Buffers;
  class Pass;

  void run_step(const KernelTable& kernels, const Batch& batch, const DecoderResults& results,
                int num_threads);
  void check(const Batch& batch) const;
  Buffers reserve_buffers(const Batch& batch, Scratch& memory) const;
  void embed(const Batch& batch, const Buffers& buffers) const;
  void run_layer(const KernelTable& kernels, Context& context, int64_t index, const Batch& batch,
                 const Sequence* sequences, const Buffers& buffers, const DecoderResults& results,
                 double* seconds) const;
  void run_head(const KernelTable& kernels, Context& context, const Batch& batch,
                const Buffers& buffers, const DecoderResults& results, double* seconds) const;

  DecoderShape shape_;
  Values embeddings_, norm_;
  Weight output_;
  std::vector<DecoderLayer> layers_;
  double seconds_[kNumParts] = {};
};

}  // namespace tramontane
