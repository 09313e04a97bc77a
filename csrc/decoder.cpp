#include "decoder.h"

#include <algorithm>
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
  const bool are_plain = a.bits == 0 && b.bits == 0 && a.type == b.type;
  return (are_plain || (a.bits != 0 && b.bits != 0)) && a.group == b.group;
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

void expect(bool is_so, const char* message) {
  if (!is_so) throw std::invalid_argument(message);
}

// Whether row b is that of the only token of sequence b.
bool has_one_row_each(const Batch& batch) {
  const SequenceTable& table = batch.sequences;
  bool is_so = batch.num_tokens == table.num_sequences && batch.num_rows == batch.num_tokens;
  for (int64_t b = 0; is_so && b < batch.num_tokens; ++b)
    is_so = table.num_queries[b] == 1 && (batch.rows == nullptr || batch.rows[b] == b);
  return is_so;
}

// Whether after this step some sequence has no next one, for all that is known here.
bool may_end(const Batch& batch, const DecoderResults& results, const Steps& steps) {
  const int64_t* const last = steps.ends + steps.num_ends;
  for (int64_t r = 0; r < batch.num_rows; ++r)
    if (!results.is_finite[r] || std::find(steps.ends, last, results.next_tokens[r]) != last)
      return true;
  return false;
}

}  // namespace

void check_sequences(const SequenceTable& table, int64_t num_tokens, int64_t block_size) {
  expect(block_size % 16 == 0 || table.max_blocks <= 1,  // see AttentionTask::attend
         "the size of a block is no multiple of 16");
  for (int64_t b = 0; b < table.num_sequences; ++b) {
    const int64_t queries = table.num_queries[b], keys = table.num_keys[b];
    expect(0 <= queries && queries <= keys, "a sequence has fewer keys than queries");
    expect(keys <= table.max_blocks * block_size, "a sequence has too few blocks");
    num_tokens -= queries;
  }
  expect(num_tokens == 0, "there are not as many tokens as queries");
}

void add_sequences(const SequenceTable& table, const Cache& cache, std::vector<Sequence>& to) {
  for (int64_t b = 0; b < table.num_sequences; ++b)
    to.push_back({table.num_queries[b], table.num_keys[b], cache,
                  table.block_tables + b * table.max_blocks});
}

// Of one call: T tokens through a layer, and R of them through the head.
struct Decoder::Buffers {
  char *x, *normed, *q, *k, *v, *attended;
  float *cos, *sin;  // of each token
  char* rows;        // hidden states of the head's rows, unless they are all
  char* scores;      // (R, V) before they are fp32, unless they are
};

// All layers, by one team: its members call the kernels one after another, each with its part.
class Decoder::Pass final : public Task {
 public:
  Pass(const Decoder& decoder, const KernelTable& kernels, const Batch& batch,
       const Buffers& buffers, const DecoderResults& results, const Sequence* sequences,
       Scratch& scratch, int num_threads, double* seconds)
      : decoder_(decoder),
        kernels_(kernels),
        batch_(batch),
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
    const auto num_layers = static_cast<int64_t>(decoder_.layers_.size());
    for (int64_t i = 0; i < num_layers; ++i)
      decoder_.run_layer(kernels_, context, i, batch_,
                         sequences_ + i * batch_.sequences.num_sequences, buffers_, results_,
                         seconds);
    decoder_.run_head(kernels_, context, batch_, buffers_, results_, seconds);
  }

  bool has_failed() const { return shared_.has_failed; }

 private:
  const Decoder& decoder_;
  const KernelTable& kernels_;
  const Batch& batch_;
  const Buffers& buffers_;
  const DecoderResults& results_;
  const Sequence* const sequences_;
  Scratch& scratch_;
  const int num_threads_;
  double* const seconds_;
  Shared shared_;
};

int64_t Decoder::run(const KernelTable& kernels, Batch batch, DecoderResults results,
                     const Steps& steps, int num_threads) {
  expect(steps.most <= 1 || has_one_row_each(batch),
         "for several steps each sequence brings one token, whose scores are wanted");
  const double deadline = read_clock() + steps.seconds;
  thread_local std::vector<int64_t> num_keys;
  SequenceTable& table = batch.sequences;
  num_keys.assign(table.num_keys, table.num_keys + table.num_sequences);
  table.num_keys = num_keys.data();
  for (int64_t done = 1;; ++done) {
    run_step(kernels, batch, results, num_threads);
    if (done >= steps.most || read_clock() > deadline || may_end(batch, results, steps))
      return done;
    batch.tokens = results.next_tokens;
    for (int64_t& keys : num_keys) ++keys;
    results.experts += static_cast<int64_t>(layers_.size()) * batch.num_tokens * batch.num_slots;
    results.next_tokens += batch.num_rows;
    if (batch.draws.numbers != nullptr) batch.draws.numbers += batch.num_rows;
    results.is_finite += batch.num_rows;
  }
}

void Decoder::run_step(const KernelTable& kernels, const Batch& batch,
                       const DecoderResults& results, int num_threads) {
  Stopwatch watch(seconds_);
  thread_local Scratch activations, scratch;
  thread_local std::vector<Sequence> sequences;
  check(batch);
  const Buffers buffers = reserve_buffers(batch, activations);
  embed(batch, buffers);
  sequences.clear();
  const CachePool& pool = batch.pool;
  for (size_t i = 0; i < layers_.size(); ++i) {
    char* const keys = pool.keys + static_cast<int64_t>(i) * pool.layer_offset;
    add_sequences(batch.sequences, {keys, keys + pool.values_offset, pool.type, pool.block_size},
                  sequences);
  }
  watch.count(kEmbeddings);
  Pass pass(*this, kernels, batch, buffers, results, sequences.data(), scratch, num_threads,
            seconds_);
  run_team(pass, num_threads);
  if (pass.has_failed()) throw std::bad_alloc();
}

void Decoder::check(const Batch& batch) const {
  check_sequences(batch.sequences, batch.num_tokens, batch.pool.block_size);
  for (int64_t b = 0; b < batch.sequences.num_sequences; ++b)
    expect(batch.sequences.num_keys[b] <= batch.num_positions,
           "a sequence has more keys than there are angles");
  expect(1 <= batch.num_slots && batch.num_slots <= shape_.num_experts,
         "there are not so many experts");
  for (int64_t t = 0; t < batch.num_tokens; ++t) {
    if (batch.tokens[t] < 0 || batch.tokens[t] >= shape_.num_embeddings)
      throw std::out_of_range("there is no such token");
    expect(batch.counts == nullptr || (1 <= batch.counts[t] && batch.counts[t] <= batch.num_slots),
           "a token has no number of experts from 1 to the largest");
  }
  for (int64_t r = 0; batch.rows != nullptr && r < batch.num_rows; ++r)
    expect(0 <= batch.rows[r] && batch.rows[r] < batch.num_tokens, "there is no such row");
}

Decoder::Buffers Decoder::reserve_buffers(const Batch& batch, Scratch& memory) const {
  const int64_t size = count_bytes(shape_.type), num_tokens = batch.num_tokens;
  const int64_t hidden = num_tokens * shape_.dim * size;
  const int64_t query = num_tokens * shape_.num_heads * shape_.head_dim * size;
  const int64_t key = num_tokens * shape_.num_kv_heads * shape_.head_dim * size;
  const int64_t angles = num_tokens * shape_.head_dim / 2 * 4;
  const int64_t scores = shape_.type == Type::kFloat ? 0 : batch.num_rows * output_.num_rows * size;
  Pieces pieces;
  const int64_t at[] = {pieces.add(hidden),
                        pieces.add(hidden),
                        pieces.add(query),
                        pieces.add(key),
                        pieces.add(key),
                        pieces.add(query),
                        pieces.add(angles),
                        pieces.add(angles),
                        pieces.add(batch.rows == nullptr ? 0 : batch.num_rows * shape_.dim * size),
                        pieces.add(scores)};
  char* const begin = static_cast<char*>(memory.reserve(pieces.total()));
  return {begin + at[0],
          begin + at[1],
          begin + at[2],
          begin + at[3],
          begin + at[4],
          begin + at[5],
          reinterpret_cast<float*>(begin + at[6]),
          reinterpret_cast<float*>(begin + at[7]),
          begin + at[8],
          begin + at[9]};
}

void Decoder::embed(const Batch& batch, const Buffers& buffers) const {
  const int64_t row = shape_.dim * count_bytes(shape_.type), half = shape_.head_dim / 2;
  const auto angle_bytes = static_cast<size_t>(half) * 4;
  const auto* const embeddings = static_cast<const char*>(embeddings_.data);
  const SequenceTable& table = batch.sequences;
  int64_t t = 0;
  for (int64_t b = 0; b < table.num_sequences; ++b) {
    for (int64_t i = 0; i < table.num_queries[b]; ++i, ++t) {
      const int64_t position = table.num_keys[b] - table.num_queries[b] + i;
      std::memcpy(buffers.x + t * row, embeddings + batch.tokens[t] * row,
                  static_cast<size_t>(row));
      std::memcpy(buffers.cos + t * half, batch.cos + position * half, angle_bytes);
      std::memcpy(buffers.sin + t * half, batch.sin + position * half, angle_bytes);
    }
  }
}

void Decoder::run_layer(const KernelTable& kernels, Context& context, int64_t index,
                        const Batch& batch, const Sequence* sequences, const Buffers& buffers,
                        const DecoderResults& results, double* seconds) const {
  Stopwatch watch(seconds);
  const DecoderLayer& layer = layers_[static_cast<size_t>(index)];
  const int64_t num_tokens = batch.num_tokens;
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
  kernels.store(
      {buffers.q, buffers.k, buffers.v, type, num_tokens, shape_.num_heads, shape_.num_kv_heads,
       shape_.head_dim, buffers.cos, buffers.sin, sequences, batch.sequences.num_sequences},
      context);
  kernels.attention({{buffers.q, type},
                     sequences,
                     batch.sequences.num_sequences,
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
  float* const slot_weights = results.slot_weights + index * num_tokens * batch.num_slots;
  int64_t* const experts = results.experts + index * num_tokens * batch.num_slots;
  kernels.router({{buffers.normed, type},
                  layer.gate,
                  num_tokens,
                  shape_.dim,
                  shape_.num_experts,
                  batch.num_slots,
                  batch.counts,
                  slot_weights,
                  experts,
                  results.router_logits + index * num_tokens * shape_.num_experts},
                 context);
  watch.count(kRouter);
  kernels.experts({{buffers.normed, type},
                   num_tokens,
                   shape_.num_experts,
                   batch.num_slots,
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

void Decoder::run_head(const KernelTable& kernels, Context& context, const Batch& batch,
                       const Buffers& buffers, const DecoderResults& results,
                       double* seconds) const {
  Stopwatch watch(seconds);
  const Type type = shape_.type;
  kernels.norm({{buffers.x, type}, norm_, batch.num_tokens, shape_.dim, shape_.eps, results.hidden},
               context);
  watch.count(kNorms);
  if (batch.num_rows == 0) return;
  const char* hidden = static_cast<const char*>(results.hidden);
  if (batch.rows != nullptr) {
    const int64_t size = shape_.dim * count_bytes(type);
    for (int64_t r = 0; context.thread == 0 && r < batch.num_rows; ++r)
      std::memcpy(buffers.rows + r * size, hidden + batch.rows[r] * size,
                  static_cast<size_t>(size));
    context.team->wait();
    hidden = buffers.rows;
  }
  void* const scores = type == Type::kFloat ? results.logits : static_cast<void*>(buffers.scores);
  kernels.linear({{hidden, type}, batch.num_rows, 1, {output_}, {scores}, nullptr}, context);
  kernels.head({{scores, type},
                batch.num_rows,
                output_.num_rows,
                shape_.num_choices,
                results.logits,
                results.next_tokens,
                results.is_finite},
               context);
  const Draws& draws = batch.draws;
  if (draws.temperature != nullptr)
    kernels.sample({results.logits, batch.num_rows, shape_.num_choices, output_.num_rows,
                    draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.numbers,
                    results.next_tokens},
                   context);
  watch.count(kHead);
}

}  // namespace tramontane
