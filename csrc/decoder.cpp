#include "decoder.h"

#include <cstring>

namespace tramontane {
namespace {

int64_t count_bytes(Type type) { return type == Type::kFloat ? 4 : 2; }

// Pieces of one run of memory, each aligned to 64 bytes.
class Pieces {
 public:
  int64_t add(int64_t size) {
    const int64_t begin = total_;
    total_ += (size + 63) / 64 * 64;
    return begin;
  }
  int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
};

}  // namespace

// Of one call: T tokens through a layer.
struct Decoder::Buffers {
  int64_t num_tokens;
  void *x, *normed, *q, *k, *v, *attended;
  float *cos, *sin;
};

void Decoder::run(const KernelTable& kernels, Scratch& scratch, const int64_t* tokens,
                  const std::vector<SequenceCache>& caches, const float* cos, const float* sin,
                  const DecoderResults& results, int num_threads) const {
  thread_local Scratch activations;
  int64_t num_tokens = 0;
  for (const SequenceCache& cache : caches) num_tokens += cache.num_queries;
  const int64_t size = count_bytes(shape_.type), half = shape_.head_dim / 2;
  const int64_t query = shape_.num_heads * shape_.head_dim * size;
  const int64_t key = shape_.num_kv_heads * shape_.head_dim * size;
  Pieces pieces;
  const int64_t at[] = {pieces.add(num_tokens * shape_.dim * size),
                        pieces.add(num_tokens * shape_.dim * size),
                        pieces.add(num_tokens * query),
                        pieces.add(num_tokens * key),
                        pieces.add(num_tokens * key),
                        pieces.add(num_tokens * query),
                        pieces.add(num_tokens * half * 4),
                        pieces.add(num_tokens * half * 4)};
  char* const memory = static_cast<char*>(activations.reserve(pieces.total()));
  const Buffers buffers{num_tokens,
                        memory + at[0],
                        memory + at[1],
                        memory + at[2],
                        memory + at[3],
                        memory + at[4],
                        memory + at[5],
                        reinterpret_cast<float*>(memory + at[6]),
                        reinterpret_cast<float*>(memory + at[7])};
  int64_t t = 0;
  for (const SequenceCache& cache : caches) {
    for (int64_t i = 0; i < cache.num_queries; ++i, ++t) {
      const int64_t position = cache.num_keys - cache.num_queries + i;
      const int64_t row = shape_.dim * size;
      std::memcpy(static_cast<char*>(buffers.x) + t * row,
                  static_cast<const char*>(embeddings_.data) + tokens[t] * row,
                  static_cast<size_t>(row));
      std::memcpy(buffers.cos + t * half, cos + position * half, static_cast<size_t>(half) * 4);
      std::memcpy(buffers.sin + t * half, sin + position * half, static_cast<size_t>(half) * 4);
    }
  }
  for (size_t i = 0; i < layers_.size(); ++i)
    run_layer(kernels, scratch, static_cast<int64_t>(i), caches, buffers, results, num_threads);
  kernels.norm({{buffers.x, shape_.type}, norm_, num_tokens, shape_.dim, shape_.eps, results.hidden},
               scratch, num_threads);
}

void Decoder::run_layer(const KernelTable& kernels, Scratch& scratch, int64_t index,
                        const std::vector<SequenceCache>& caches, const Buffers& buffers,
                        const DecoderResults& results, int num_threads) const {
  const DecoderLayer& layer = layers_[static_cast<size_t>(index)];
  const int64_t num_tokens = buffers.num_tokens;
  const Type type = shape_.type;
  const auto normalize = [&](Values weight) {
    kernels.norm({{buffers.x, type}, weight, num_tokens, shape_.dim, shape_.eps, buffers.normed},
                 scratch, num_threads);
  };

  normalize(layer.attention_norm);
  if (layer.wq.bits == layer.wk.bits && layer.wq.bits == layer.wv.bits &&
      layer.wq.group == layer.wk.group && layer.wq.group == layer.wv.group) {
    kernels.linear({{buffers.normed, type}, num_tokens, 3, {layer.wq, layer.wk, layer.wv},
                    {buffers.q, buffers.k, buffers.v}, nullptr},
                   scratch, num_threads);
  } else {
    const Weight* weights[] = {&layer.wq, &layer.wk, &layer.wv};
    void* const outs[] = {buffers.q, buffers.k, buffers.v};
    for (int i = 0; i < 3; ++i)
      kernels.linear({{buffers.normed, type}, num_tokens, 1, {*weights[i]}, {outs[i]}, nullptr},
                     scratch, num_threads);
  }
  thread_local std::vector<Sequence> sequences;
  sequences.clear();
  for (const SequenceCache& cache : caches) {
    char* const keys = cache.keys + index * cache.layer_offset;
    sequences.push_back({cache.num_queries, cache.num_keys,
                         {keys, keys + cache.values_offset, cache.type, cache.block_size},
                         cache.blocks});
  }
  const auto num_sequences = static_cast<int64_t>(sequences.size());
  kernels.store({buffers.q, buffers.k, buffers.v, type, num_tokens, shape_.num_heads,
                 shape_.num_kv_heads, shape_.head_dim, buffers.cos, buffers.sin, sequences.data(),
                 num_sequences},
                scratch, num_threads);
  kernels.attention({{buffers.q, type}, sequences.data(), num_sequences, shape_.num_heads,
                     shape_.num_kv_heads, shape_.head_dim, shape_.window, buffers.attended},
                    scratch, num_threads);
  kernels.linear({{buffers.attended, type}, num_tokens, 1, {layer.wo}, {buffers.x}, buffers.x},
                 scratch, num_threads);

  normalize(layer.ffn_norm);
  float* const slot_weights = results.slot_weights + index * num_tokens * shape_.num_slots;
  int64_t* const experts = results.experts + index * num_tokens * shape_.num_slots;
  kernels.router({{buffers.normed, type}, layer.gate, num_tokens, shape_.dim, layer.num_experts,
                  shape_.num_slots, slot_weights, experts,
                  results.logits + index * num_tokens * layer.num_experts},
                 scratch, num_threads);
  kernels.experts({{buffers.normed, type}, num_tokens, layer.num_experts, shape_.num_slots,
                   slot_weights, experts, layer.w1, layer.w2, layer.w3, buffers.x, buffers.x},
                  scratch, num_threads);
}

}  // namespace tramontane
