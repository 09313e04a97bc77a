// Causal attention of the last T of M positions, with grouped heads and an optional window.
//
// A tile is up to kTileRows pairs (query, head) that read one kv head. Its scores are computed as
// products are, its softmax and its sum of values run over the keys in their order, one register
// lane per kLanes keys: what a query reads does not depend on the queries beside it.
#pragma once

#include "linear.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

class AttentionTask final : public Task {
 public:
  AttentionTask(const AttentionArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments),
        repeats_(arguments.num_heads / arguments.num_kv_heads),
        key_stride_(round_up(arguments.num_keys, 16)),
        head_stride_(round_up(arguments.head_dim, 16)) {
    thread_floats_ = kTileRows * (key_stride_ + head_stride_);
    memory_ = static_cast<float*>(scratch.reserve(num_threads * thread_floats_ * 4));
  }

  void run(Team& team, int thread) override {
    float* const scores = memory_ + thread * thread_floats_;
    float* const queries = scores + kTileRows * key_stride_;
    const int64_t rows_per_head = a_.num_queries * repeats_;
    const int64_t tiles_per_head = (rows_per_head + kTileRows - 1) / kTileRows;
    const int64_t num_tiles = a_.num_kv_heads * tiles_per_head;
    for (int64_t tile; (tile = team.take(num_tiles)) < num_tiles;) {
      // The longest rows come first: the last ones are short, and the threads end together.
      const int64_t at = tiles_per_head - 1 - tile / a_.num_kv_heads;
      const int64_t first = at * kTileRows, rest = rows_per_head - first;
      attend(tile % a_.num_kv_heads, first, rest < kTileRows ? rest : kTileRows, scores, queries);
    }
  }

 private:
  struct Seen {
    int64_t begin, end;
  };

  // Rows of a kv head are ordered by query, then by head.
  Seen find_seen(int64_t row) const {
    const int64_t end = a_.num_keys - a_.num_queries + row / repeats_ + 1;
    return {a_.window > 0 && end > a_.window ? end - a_.window : 0, end};
  }

  void attend(int64_t kv_head, int64_t first, int64_t count, float* scores, float* queries) {
    const float* rows[kTileRows];
    const float scale = 1.0f / sqrtf(static_cast<float>(a_.head_dim));
    for (int64_t r = 0; r < count; ++r) {
      float* const query = queries + r * head_stride_;
      rows[r] = query;
      widen(a_.q.data, a_.q.type, locate(kv_head, first + r), a_.head_dim, query);
      for (int64_t i = 0; i < a_.head_dim; ++i) query[i] *= scale;
      for (int64_t i = a_.head_dim; i < head_stride_; ++i) query[i] = 0;
    }
    const int64_t begin = find_seen(first).begin / 16 * 16, end = find_seen(first + count - 1).end;
    const int64_t keys_at = kv_head * a_.head_stride + begin * a_.head_dim;
    if (a_.k.type == Type::kFloat)
      dot_all(rows, count, static_cast<const float*>(a_.k.data) + keys_at, a_.head_dim, a_.head_dim,
              end - begin, scores, key_stride_);
    else
      dot_all(rows, count, static_cast<const uint16_t*>(a_.k.data) + keys_at, a_.head_dim,
              a_.head_dim, end - begin, scores, key_stride_);
    float inverse_sums[kTileRows];
    for (int64_t r = 0; r < count; ++r)
      inverse_sums[r] = 1.0f / exponentiate(find_seen(first + r), begin, end,
                                            scores + r * key_stride_);
    if (a_.v.type == Type::kFloat)
      add_values(static_cast<const float*>(a_.v.data) + keys_at, end - begin, count, scores, queries);
    else
      add_values(static_cast<const uint16_t*>(a_.v.data) + keys_at, end - begin, count, scores,
                 queries);
    for (int64_t r = 0; r < count; ++r) {
      float* const out = queries + r * head_stride_;
      for (int64_t i = 0; i < a_.head_dim; ++i) out[i] *= inverse_sums[r];
      narrow(out, a_.head_dim, a_.out, a_.q.type, locate(kv_head, first + r));
    }
  }

  int64_t locate(int64_t kv_head, int64_t row) const {
    const int64_t head = kv_head * repeats_ + row % repeats_;
    return (row / repeats_ * a_.num_heads + head) * a_.head_dim;
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

  // out[r] = sum over keys of weights[r][m] * v[m]
  template <class Number>
  void add_values(const Number* v, int64_t num_keys, int64_t count, const float* weights,
                  float* out) const {
    int64_t at = 0;
    for (; at + 4 * kLanes <= a_.head_dim; at += 4 * kLanes)
      add_columns<4>(v + at, num_keys, count, weights, out + at);
    for (; at + kLanes <= a_.head_dim; at += kLanes)
      add_columns<1>(v + at, num_keys, count, weights, out + at);
    for (; at < a_.head_dim; ++at) {
      for (int64_t r = 0; r < count; ++r) {
        float sum = 0;
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
    Vec sums[kTileRows][C];
    for (int r = 0; r < kTileRows; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = zero();
    if (count == kTileRows) {
      for (int64_t m = 0; m < num_keys; ++m) {
        Vec values[C];
        for (int c = 0; c < C; ++c) values[c] = load(v + m * a_.head_dim + c * kLanes);
        for (int r = 0; r < kTileRows; ++r) {
          const Vec weight = splat(weights[r * key_stride_ + m]);
          for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, values[c], sums[r][c]);
        }
      }
    } else {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t m = 0; m < num_keys; ++m) {
          const Vec weight = splat(weights[r * key_stride_ + m]);
          for (int c = 0; c < C; ++c)
            sums[r][c] = fma(weight, load(v + m * a_.head_dim + c * kLanes), sums[r][c]);
        }
    }
    for (int64_t r = 0; r < count; ++r)
      for (int c = 0; c < C; ++c) store(out + r * head_stride_ + c * kLanes, sums[r][c]);
  }

  const AttentionArguments& a_;
  const int64_t repeats_, key_stride_, head_stride_;
  int64_t thread_floats_ = 0;
  float* memory_;
};

static void attention(const AttentionArguments& arguments, Scratch& scratch, int num_threads) {
  if (arguments.num_queries == 0) return;
  const int64_t work =
      arguments.num_queries * arguments.num_heads * arguments.num_keys * arguments.head_dim;
  num_threads = choose_threads(work, num_threads);
  AttentionTask task(arguments, scratch, num_threads);
  run_team(task, num_threads);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
