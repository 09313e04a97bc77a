// A whole decoder of sparse layers in one call: what tramontane/models/transformer.py computes,
// from the embeddings to the last norm, with the same kernels in the same order, and so the same
// bits.
#pragma once

#include <vector>

#include "kernels.h"

namespace tramontane {

struct DecoderLayer {
  Values attention_norm, ffn_norm;  // (D,)
  Weight wq, wk, wv, wo;
  Values gate;  // (E, D)
  Weight w1, w2, w3;
  int64_t num_experts;
};

struct DecoderShape {
  int64_t dim, num_heads, num_kv_heads, head_dim, vocab_size, num_slots;
  int64_t window;  // keys that a query sees; 0: all
  float eps;
  Type type;  // of activations
};

// The cache of one sequence in the first layer, and how many bytes further those of the others are.
struct SequenceCache {
  int64_t num_queries, num_keys;
  char* keys;
  int64_t values_offset, layer_offset;
  Type type;
  int64_t block_size;
  const int64_t* blocks;
};

// Results: hidden (T, D) after the last norm; of the routers (L, T, K), (L, T, K) and (L, T, E).
struct DecoderResults {
  void* hidden;
  float* slot_weights;
  int64_t* experts;
  float* logits;
};

// Parts of a step whose time is counted.
enum Part { kEmbeddings, kNorms, kAttentionLinear, kAttention, kRouter, kExperts, kNumParts };

class Decoder {
 public:
  Decoder(const DecoderShape& shape, Values embeddings, Values norm)
      : shape_(shape), embeddings_(embeddings), norm_(norm) {}

  void add_layer(const DecoderLayer& layer) { layers_.push_back(layer); }

  // `cos` and `sin` hold the angles of the positions 0, 1, ... (S / 2 each). Tokens lie sequence
  // after sequence. One call at a time. Throws std::bad_alloc, and std::out_of_range on an id that
  // is none.
  void run(const KernelTable& kernels, const int64_t* tokens,
           const std::vector<SequenceCache>& caches, const float* cos, const float* sin,
           const DecoderResults& results, int num_threads);

  // Seconds that all calls of `run` have spent in each part.
  const double* seconds() const { return seconds_; }

 private:
  struct Buffers;
  class Pass;

  void run_layer(const KernelTable& kernels, Context& context, int64_t index,
                 const std::vector<Sequence>& sequences, const Buffers& buffers,
                 const DecoderResults& results, double* seconds) const;

  DecoderShape shape_;
  Values embeddings_, norm_;
  std::vector<DecoderLayer> layers_;
  double seconds_[kNumParts] = {};
};

}  // namespace tramontane
