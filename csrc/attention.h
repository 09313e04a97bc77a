// Causal attention over a cache in blocks, with grouped heads and an optional window.
//
// A tile is up to kTileRows pairs (query, head) that read one kv head. Its scores are computed as
// products are, its softmax and its sum of values run over the keys in their order, one register
// lane per kLanes keys: what a query reads does not depend on the queries beside it.
#pragma once

#include "elementwise.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

// Turns queries and keys by the angles of their tokens, and lays keys and values into the cache.
class StoreTask final : public Task {
 public:
  StoreTask(const StoreArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments), stride_(round_up(arguments.head_dim, 16)) {
    memory_ = static_cast<float*>(scratch.reserve(num_threads * stride_ * 4));
  }

  void run(Team& team, int thread) override {
    float* const head = memory_ + thread * stride_;
    for (int64_t t; (t = team.take(a_.num_tokens)) < a_.num_tokens;) {
      int64_t which = 0, first = 0;
      while (t - first >= a_.sequences[which].num_queries)
        first += a_.sequences[which++].num_queries;
      const Sequence& sequence = a_.sequences[which];
      store_token(t, sequence, sequence.num_keys - sequence.num_queries + t - first, head);
    }
  }

 private:
  void store_token(int64_t t, const Sequence& sequence, int64_t position, float* head) const {
    const int64_t size = a_.head_dim, half = size / 2;
    const float *cos = a_.cos + t * half, *sin = a_.sin + t * half;
    for (int64_t h = 0; h < a_.num_heads; ++h) {
      const int64_t at = (t * a_.num_heads + h) * size;
      widen(a_.q, a_.type, at, size, head);
      turn_pairs(head, half, cos, sin);
      narrow(head, size, a_.q, a_.type, at);
    }
    const Cache& cache = sequence.cache;
    const int64_t block = sequence.blocks[position / cache.block_size];
    for (int64_t g = 0; g < a_.num_kv_heads; ++g) {
      const int64_t from = (t * a_.num_kv_heads + g) * size;
      const int64_t slot = (block * a_.num_kv_heads + g) * cache.block_size;
      const int64_t to = (slot + position % cache.block_size) * size;
      widen(a_.k, a_.type, from, size, head);
      turn_pairs(head, half, cos, sin);
      for (int64_t i = 0; i < size; ++i) head[i] = round_to(head[i], a_.type);
      narrow(head, size, cache.keys, cache.type, to);
      widen(a_.v, a_.type, from, size, head);
      narrow(head, size, cache.values, cache.type, to);
    }
  }

  const StoreArguments& a_;
  const int64_t stride_;
  float* memory_;
};

static void store_in_cache(const StoreArguments& arguments, Context& context) {
  const int64_t num_heads = arguments.num_heads + 2 * arguments.num_kv_heads;
  const int64_t work = arguments.num_tokens * num_heads * arguments.head_dim;
  launch<StoreTask>(context, work, arguments);
}

class AttentionTask final : public Task {
 public:
  AttentionTask(const AttentionArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments),
        repeats_(arguments.num_heads / arguments.num_kv_heads),
        head_stride_(round_up(arguments.head_dim, 16)) {
    int64_t longest = 0;
    for (int64_t s = 0; s < a_.num_sequences; ++s) {
      const Sequence& sequence = a_.sequences[s];
      longest = sequence.num_keys > longest ? sequence.num_keys : longest;
      num_tiles_ += a_.num_kv_heads * count_tiles(sequence);
    }
    key_stride_ = round_up(longest, 16);
    thread_floats_ = kTileRows * (key_stride_ + head_stride_);
    memory_ = static_cast<float*>(scratch.reserve(num_threads * thread_floats_ * 4));
  }

  void run(Team& team, int thread) override {
    Tile tile;
    tile.scores = memory_ + thread * thread_floats_;
    tile.queries = tile.scores + kTileRows * key_stride_;
    for (int64_t item; (item = team.take(num_tiles_)) < num_tiles_;) {
      int64_t which = 0;
      tile.first_token = 0;
      for (int64_t count; item >= (count = a_.num_kv_heads * count_tiles(a_.sequences[which]));) {
        tile.first_token += a_.sequences[which++].num_queries;
        item -= count;
      }
      tile.sequence = &a_.sequences[which];
      tile.kv_head = item % a_.num_kv_heads;
      // The longest rows come first: the last ones are short, and the threads end together.
      const int64_t at = count_tiles(*tile.sequence) - 1 - item / a_.num_kv_heads;
      tile.first = at * kTileRows;
      const int64_t rest = tile.sequence->num_queries * repeats_ - tile.first;
      tile.count = rest < kTileRows ? rest : kTileRows;
      attend(tile);
    }
  }

 private:
  struct Tile {
    const Sequence* sequence;
    int64_t first_token, kv_head;
    int64_t first, count;  // rows; those of a kv head are ordered by query, then by head
    float *scores, *queries;
  };
  struct Seen {
    int64_t begin, end;
  };

  int64_t count_tiles(const Sequence& sequence) const {
    return (sequence.num_queries * repeats_ + kTileRows - 1) / kTileRows;
  }

  Seen find_seen(const Tile& tile, int64_t row) const {
    const Sequence& sequence = *tile.sequence;
    const int64_t end = sequence.num_keys - sequence.num_queries + row / repeats_ + 1;
    return {a_.window > 0 && end > a_.window ? end - a_.window : 0, end};
  }

  // Where the numbers of a row of a tile begin in q and out.
  int64_t locate(const Tile& tile, int64_t row) const {
    const int64_t head = tile.kv_head * repeats_ + row % repeats_;
    return ((tile.first_token + row / repeats_) * a_.num_heads + head) * a_.head_dim;
  }

  void attend(const Tile& tile) const {
    const float* rows[kTileRows];
    const float scale = 1.0f / sqrtf(static_cast<float>(a_.head_dim));
    for (int64_t r = 0; r < tile.count; ++r) {
      float* const query = tile.queries + r * head_stride_;
      rows[r] = query;
      widen(a_.q.data, a_.q.type, locate(tile, tile.first + r), a_.head_dim, query);
      for (int64_t i = 0; i < a_.head_dim; ++i) query[i] *= scale;
      for (int64_t i = a_.head_dim; i < head_stride_; ++i) query[i] = 0;
    }
    const int64_t begin = find_seen(tile, tile.first).begin / 16 * 16;
    const int64_t end = find_seen(tile, tile.first + tile.count - 1).end;
    const Cache& cache = tile.sequence->cache;
    for_each_run(tile, begin, end, [&](int64_t key, int64_t at, int64_t count) {
      float* const scores = tile.scores + key - begin;
      if (cache.type == Type::kFloat)
        dot_all(rows, tile.count, static_cast<const float*>(cache.keys) + at, a_.head_dim,
                a_.head_dim, count, scores, key_stride_);
      else
        dot_all(rows, tile.count, static_cast<const uint16_t*>(cache.keys) + at, a_.head_dim,
                a_.head_dim, count, scores, key_stride_);
    });
    float inverse_sums[kTileRows];
    for (int64_t r = 0; r < tile.count; ++r)
      inverse_sums[r] = 1.0f / exponentiate(find_seen(tile, tile.first + r), begin, end,
                                            tile.scores + r * key_stride_);
    std::memset(tile.queries, 0, static_cast<size_t>(kTileRows * head_stride_) * 4);
    for_each_run(tile, begin, end, [&](int64_t key, int64_t at, int64_t count) {
      const float* weights = tile.scores + key - begin;
      if (cache.type == Type::kFloat)
        add_values(static_cast<const float*>(cache.values) + at, count, tile, weights);
      else add_values(static_cast<const uint16_t*>(cache.values) + at, count, tile, weights);
    });
    for (int64_t r = 0; r < tile.count; ++r) {
      float* const out = tile.queries + r * head_stride_;
      for (int64_t i = 0; i < a_.head_dim; ++i) out[i] *= inverse_sums[r];
      narrow(out, a_.head_dim, a_.out, a_.q.type, locate(tile, tile.first + r));
    }
  }

  // Calls `visit(key, at, count)` for keys begin .. end in runs of a block: `at` is where the
  // numbers of the first of `count` keys begin in the cache.
  template <class Visit>
  void for_each_run(const Tile& tile, int64_t begin, int64_t end, Visit visit) const {
    const int64_t size = tile.sequence->cache.block_size;
    for (int64_t key = begin; key < end;) {
      const int64_t in_block = size - key % size,
                    count = end - key < in_block ? end - key : in_block;
      const int64_t block = tile.sequence->blocks[key / size];
      const int64_t slot = (block * a_.num_kv_heads + tile.kv_head) * size + key % size;
      visit(key, slot * a_.head_dim, count);
      key += count;
    }
  }

  // Turn the scores of keys begin .. end into e^(score - largest), 0 where unseen; return the sum.
  static float exponentiate(Seen seen, int64_t begin, int64_t end, float* scores) {
    for (int64_t m = begin; m < seen.begin; ++m) scores[m - begin] = -INFINITY;
    const int64_t padded = round_up(end - begin, 16);
    for (int64_t m = seen.end; m < begin + padded; ++m) scores[m - begin] = -INFINITY;
    Vec largest = splat(-INFINITY), total = zero();
    for (int64_t i = 0; i < padded; i += kLanes) largest = max(largest, load(scores + i));
    const Vec shift = splat(max_lanes(largest));
    for (int64_t i = 0; i < padded; i += kLanes)
      store(scores + i, exp(sub(load(scores + i), shift)));
    for (int64_t m = begin; m < seen.begin; ++m) scores[m - begin] = 0;
    for (int64_t m = seen.end; m < begin + padded; ++m) scores[m - begin] = 0;
    for (int64_t i = 0; i < padded; i += kLanes) total = add(total, load(scores + i));
    return sum_lanes(total);
  }

  // out[r] += sum over keys of weights[r][m] * v[m], in the order of the keys
  template <class Number>
  void add_values(const Number* v, int64_t num_keys, const Tile& tile, const float* weights) const {
    float* const out = tile.queries;
    int64_t at = 0;
    for (; at + 4 * kLanes <= a_.head_dim; at += 4 * kLanes)
      add_columns<4>(v + at, num_keys, tile.count, weights, out + at);
    for (; at + kLanes <= a_.head_dim; at += kLanes)
      add_columns<1>(v + at, num_keys, tile.count, weights, out + at);
    for (; at < a_.head_dim; ++at) {
      for (int64_t r = 0; r < tile.count; ++r) {
        float sum = out[r * head_stride_ + at];
        for (int64_t m = 0; m < num_keys; ++m)
          sum = fmaf(weights[r * key_stride_ + m], widen_one(v[m * a_.head_dim + at]), sum);
        out[r * head_stride_ + at] = sum;
      }
    }
  }

  static float widen_one(float value) { return value; }
  static float widen_one(uint16_t bits) { return bf16_to_float(bits); }

  template <int C, class Number>
  void add_columns(const Number* v, int64_t num_keys, int64_t count, const float* weights,
                   float* out) const {
    if (count == kTileRows) return add_tile<kTileRows, C>(v, num_keys, weights, out);
    for (int64_t r = 0; r < count; ++r)
      add_tile<1, C>(v, num_keys, weights + r * key_stride_, out + r * head_stride_);
  }

  template <int R, int C, class Number>
  void add_tile(const Number* v, int64_t num_keys, const float* weights, float* out) const {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * head_stride_ + c * kLanes);
    for (int64_t m = 0; m < num_keys; ++m) {
      Vec values[C];
      for (int c = 0; c < C; ++c) values[c] = load(v + m * a_.head_dim + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(weights[r * key_stride_ + m]);
        for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, values[c], sums[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(out + r * head_stride_ + c * kLanes, sums[r][c]);
  }

  const AttentionArguments& a_;
  const int64_t repeats_, head_stride_;
  int64_t key_stride_ = 0, thread_floats_ = 0, num_tiles_ = 0;
  float* memory_;
};

static void attention(const AttentionArguments& arguments, Context& context) {
  int64_t work = 0;
  for (int64_t s = 0; s < arguments.num_sequences; ++s)
    work += arguments.sequences[s].num_queries * arguments.sequences[s].num_keys;
  if (work == 0) return;
  launch<AttentionTask>(context, work * arguments.num_heads * arguments.head_dim, arguments);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
