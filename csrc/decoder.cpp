#include "decoder.h"

#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

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

// Whether inputs prepared for one are right for the other.
bool can_share_inputs(const Weight& a, const Weight& b) {
  return (a.bits == 0) == (b.bits == 0) && a.group == b.group;
}

double read_clock() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

// Adds the time since it was made, or since the last call, to a part.
class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds), since_(read_clock()) {}
  void count(Part part) {
    const double now = read_clock();
    seconds_[part] += now - since_;
    since_ = now;
  }

 private:
  double* seconds_;
  double since_;
};

}  // namespace

// Of one call: T tokens through a layer.
struct Decoder::Buffers {
  int64_t num_tokens;
  void *x, *normed, *q, *k, *v, *attended;
  float *cos, *sin;
};

// All layers, by one team: its members call the kernels one after another, each with its part.
class Decoder::Pass final : public Task {
 public:
  Pass(const Decoder& decoder, const KernelTable& kernels, const Buffers& buffers,
       const DecoderResults& results, const std::vector<std::vector<Sequence>>& sequences,
       Scratch& scratch, int num_threads, double* seconds)
      : decoder_(decoder),
        kernels_(kernels),
        buffers_(buffers),
        results_(results),
        sequences_(sequences),
        scratch_(scratch),
        num_threads_(num_threads),
        seconds_(seconds) {}

  void run(Team& team, int thread) override {
    Context context{scratch_, num_threads_, &team, thread, &shared_};
    double ignored[kNumParts] = {};
    double* const seconds = thread == 0 ? seconds_ : ignored;
    for (size_t i = 0; i < sequences_.size(); ++i)
      decoder_.run_layer(kernels_, context, static_cast<int64_t>(i), sequences_[i], buffers_,
                         results_, seconds);
    Stopwatch watch(seconds);
    const DecoderShape& shape = decoder_.shape_;
    kernels_.norm({{buffers_.x, shape.type},
                   decoder_.norm_,
                   buffers_.num_tokens,
                   shape.dim,
                   shape.eps,
                   results_.hidden},
                  context);
    watch.count(kNorms);
  }

  bool has_failed() const { return shared_.has_failed; }

 private:
  const Decoder& decoder_;
  const KernelTable& kernels_;
  const Buffers& buffers_;
  const DecoderResults& results_;
  const std::vector<std::vector<Sequence>>& sequences_;
  Scratch& scratch_;
  const int num_threads_;
  double* const seconds_;
  Shared shared_;
};

void Decoder::run(const KernelTable& kernels, const int64_t* tokens,
                  const std::vector<SequenceCache>& caches, const float* cos, const float* sin,
                  const DecoderResults& results, int num_threads) {
  Stopwatch watch(seconds_);
  thread_local Scratch activations, scratch;
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
      if (tokens[t] < 0 || tokens[t] >= shape_.vocab_size)
        throw std::out_of_range("there is no such token");
      const int64_t position = cache.num_keys - cache.num_queries + i;
      const int64_t row = shape_.dim * size;
      std::memcpy(static_cast<char*>(buffers.x) + t * row,
                  static_cast<const char*>(embeddings_.data) + tokens[t] * row,
                  static_cast<size_t>(row));
      std::memcpy(buffers.cos + t * half, cos + position * half, static_cast<size_t>(half) * 4);
      std::memcpy(buffers.sin + t * half, sin + position * half, static_cast<size_t>(half) * 4);
    }
  }
  thread_local std::vector<std::vector<Sequence>> sequences;
  sequences.resize(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    sequences[i].clear();
    for (const SequenceCache& cache : caches) {
      char* const keys = cache.keys + static_cast<int64_t>(i) * cache.layer_offset;
      sequences[i].push_back({cache.num_queries,
                              cache.num_keys,
                              {keys, keys + cache.values_offset, cache.type, cache.block_size},
                              cache.blocks});
    }
  }
  watch.count(kEmbeddings);
  Pass pass(*this, kernels, buffers, results, sequences, scratch, num_threads, seconds_);
  run_team(pass, num_threads);
  if (pass.has_failed()) throw std::bad_alloc();
}

void Decoder::run_layer(const KernelTable& kernels, Context& context, int64_t index,
                        const std::vector<Sequence>& sequences, const Buffers& buffers,
                        const DecoderResults& results, double* seconds) const {
  Stopwatch watch(seconds);
  const DecoderLayer& layer = layers_[static_cast<size_t>(index)];
  const int64_t num_tokens = buffers.num_tokens;
  const Type type = shape_.type;
  const auto normalize = [&](Values weight) {
    kernels.norm({{buffers.x, type}, weight, num_tokens, shape_.dim, shape_.eps, buffers.normed},
                 context);
  };

  normalize(layer.attention_norm);
  watch.count(kNorms);
  if (can_share_inputs(layer.wq, layer.wk) && can_share_inputs(layer.wq, layer.wv)) {
    kernels.linear({{buffers.normed, type},
                    num_tokens,
                    3,
                    {layer.wq, layer.wk, layer.wv},
                    {buffers.q, buffers.k, buffers.v},
                    nullptr},
                   context);
  } else {
    const Weight* weights[] = {&layer.wq, &layer.wk, &layer.wv};
    void* const outs[] = {buffers.q, buffers.k, buffers.v};
    for (int i = 0; i < 3; ++i)
      kernels.linear({{buffers.normed, type}, num_tokens, 1, {*weights[i]}, {outs[i]}, nullptr},
                     context);
  }
  watch.count(kAttentionLinear);
  const auto num_sequences = static_cast<int64_t>(sequences.size());
  kernels.store(
      {buffers.q, buffers.k, buffers.v, type, num_tokens, shape_.num_heads, shape_.num_kv_heads,
       shape_.head_dim, buffers.cos, buffers.sin, sequences.data(), num_sequences},
      context);
  kernels.attention({{buffers.q, type},
                     sequences.data(),
                     num_sequences,
                     shape_.num_heads,
                     shape_.num_kv_heads,
                     shape_.head_dim,
                     shape_.window,
                     buffers.attended},
                    context);
  watch.count(kAttention);
  kernels.linear({{buffers.attended, type}, num_tokens, 1, {layer.wo}, {buffers.x}, buffers.x},
                 context);
  watch.count(kAttentionLinear);

  normalize(layer.ffn_norm);
  watch.count(kNorms);
  float* const slot_weights = results.slot_weights + index * num_tokens * shape_.num_slots;
  int64_t* const experts = results.experts + index * num_tokens * shape_.num_slots;
  kernels.router({{buffers.normed, type},
                  layer.gate,
                  num_tokens,
                  shape_.dim,
                  layer.num_experts,
                  shape_.num_slots,
                  nullptr,
                  slot_weights,
                  experts,
                  results.logits + index * num_tokens * layer.num_experts},
                 context);
  watch.count(kRouter);
  kernels.experts({{buffers.normed, type},
                   num_tokens,
                   layer.num_experts,
                   shape_.num_slots,
                   slot_weights,
                   experts,
                   layer.w1,
                   layer.w2,
                   layer.w3,
                   buffers.x,
                   buffers.x},
                  context);
  watch.count(kExperts);
}

}  // namespace tramontane
