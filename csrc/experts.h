// The experts of a layer: tokens grouped by expert, none dropped, one call for all of it.
//
// Up to kTokensAtOnce tokens at a time: their copies are sorted by expert, each expert multiplies
// its rows, and every token adds up its slots in its own order, in fp32.
#pragma once

#include "linear.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

constexpr int64_t kExpertRowsAtOnce = 128;

class ExpertsTask final : public Task {
 public:
  ExpertsTask(const ExpertsArguments& arguments, int64_t first, int64_t num_tokens,
              Scratch& scratch, int num_threads)
      : a_(arguments),
        first_(first),
        num_tokens_(num_tokens),
        dim_(arguments.w1.num_columns),
        hidden_dim_(arguments.w1.num_rows),
        hidden_stride_(round_up(arguments.w1.num_rows, 16)),
        wide_length_(round_up(arguments.w1.num_columns, 16)) {
    const int64_t* const ids = a_.experts + first * a_.num_slots;
    for (int64_t i = 0; i < num_tokens * a_.num_slots; ++i) num_rows_ += ids[i] != kNoExpert;
    rows_at_once_ = num_rows_ < kExpertRowsAtOnce ? num_rows_ : kExpertRowsAtOnce;
    panel_bytes_ = count_panel_bytes(dim_) > count_panel_bytes(hidden_dim_)
                       ? count_panel_bytes(dim_)
                       : count_panel_bytes(hidden_dim_);
    thread_bytes_ = panel_bytes_ + wide_length_ * 4 + 2 * round_up(rows_at_once_ * kChunk * 4, 64);
    is_rounded_ = choose_form(a_.w2, a_.x.type) != Form::kFloat;
    const int64_t sizes[] = {
        Inputs::count_bytes(num_tokens_, a_.w1, a_.x.type),  // inputs of the tokens
        num_rows_ * hidden_stride_ * 4,                      // hidden values in fp32
        is_rounded_ ? Inputs::count_bytes(num_rows_, a_.w2, a_.x.type) : 0,  // as inputs of w2
        round_up(num_rows_ * dim_ * 4, 64),                                  // outputs
        round_up(num_rows_ * 8, 64),                                         // token of each row
        round_up(num_tokens_ * a_.num_slots * 8, 64),                        // row of each slot
        round_up((a_.num_experts + 1) * 8, 64),  // first row of each expert
    };
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    char* memory = static_cast<char*>(scratch.reserve(total + thread_bytes_ * num_threads));
    char* parts[7];
    for (int i = 0; i < 7; ++i) parts[i] = memory, memory += sizes[i];
    inputs_memory_ = parts[0];
    hidden_ = reinterpret_cast<float*>(parts[1]);
    hidden_memory_ = is_rounded_ ? parts[2] : parts[1];  // rows of fp32 are inputs as they are
    outputs_ = reinterpret_cast<float*>(parts[3]);
    token_of_row_ = reinterpret_cast<int64_t*>(parts[4]);
    row_of_slot_ = reinterpret_cast<int64_t*>(parts[5]);
    begins_ = reinterpret_cast<int64_t*>(parts[6]);
    thread_memory_ = memory;
    sort_by_expert();
  }

  void run(Team& team, int thread) override {
    char* memory = thread_memory_ + thread * thread_bytes_;
    float* const panel = reinterpret_cast<float*>(memory);
    float* const wide = reinterpret_cast<float*>(memory + panel_bytes_);
    float* const results = wide + wide_length_;
    Inputs inputs(inputs_memory_, a_.w1, a_.x.type);
    Inputs hidden_inputs(hidden_memory_, a_.w2, a_.x.type);
    for (int64_t t; (t = team.take(num_tokens_)) < num_tokens_;)
      inputs.set(t, a_.x.data, a_.x.type, (first_ + t) * dim_, wide);
    team.wait();
    const int64_t num_hidden = a_.num_experts * count_chunks(hidden_dim_);
    for (int64_t item; (item = team.take(num_hidden)) < num_hidden;)
      compute_hidden(inputs, item, results, panel);
    team.wait();
    if (is_rounded_) {
      for (int64_t row; (row = team.take(num_rows_)) < num_rows_;)
        hidden_inputs.round(row, hidden_ + row * hidden_stride_);
      team.wait();
    }
    const int64_t num_outputs = a_.num_experts * count_chunks(dim_);
    for (int64_t item; (item = team.take(num_outputs)) < num_outputs;)
      compute_outputs(hidden_inputs, item, panel);
    team.wait();
    for (int64_t t; (t = team.take(num_tokens_)) < num_tokens_;) sum_slots(t, wide);
  }

 private:
  void sort_by_expert() {
    const int64_t* experts = a_.experts + first_ * a_.num_slots;
    for (int64_t e = 0; e <= a_.num_experts; ++e) begins_[e] = 0;
    const int64_t num_slots = num_tokens_ * a_.num_slots;
    for (int64_t i = 0; i < num_slots; ++i)
      if (experts[i] != kNoExpert) ++begins_[experts[i] + 1];
    for (int64_t e = 0; e < a_.num_experts; ++e) begins_[e + 1] += begins_[e];
    for (int64_t i = 0; i < num_slots; ++i) {  // begins_[e] moves to the end of e, and back below
      if (experts[i] == kNoExpert) continue;
      const int64_t row = begins_[experts[i]]++;
      token_of_row_[row] = i / a_.num_slots;
      row_of_slot_[i] = row;
    }
    for (int64_t e = a_.num_experts; e > 0; --e) begins_[e] = begins_[e - 1];
    begins_[0] = 0;
  }

  void compute_hidden(const Inputs& inputs, int64_t item, float* results, float* panel) {
    const int64_t num_chunks = count_chunks(hidden_dim_), expert = item / num_chunks;
    const int64_t begin = item % num_chunks * kChunk;
    const int64_t end = begin + kChunk < hidden_dim_ ? begin + kChunk : hidden_dim_;
    float* const up = results + rows_at_once_ * kChunk;
    for (int64_t r = begins_[expert]; r < begins_[expert + 1]; r += rows_at_once_) {
      const int64_t rest = begins_[expert + 1] - r;
      const int64_t count = rest < rows_at_once_ ? rest : rows_at_once_;
      const int64_t* which = token_of_row_ + r;
      multiply(inputs, which, 0, count, a_.w1, expert, begin, end, results, kChunk, panel);
      multiply(inputs, which, 0, count, a_.w3, expert, begin, end, up, kChunk, panel);
      for (int64_t i = 0; i < count; ++i)
        combine(results + i * kChunk, up + i * kChunk, end - begin,
                hidden_ + (r + i) * hidden_stride_ + begin);
      if (end == hidden_dim_ && hidden_stride_ > end)
        for (int64_t i = 0; i < count; ++i)
          std::memset(hidden_ + (r + i) * hidden_stride_ + end, 0,
                      static_cast<size_t>(hidden_stride_ - end) * 4);
    }
  }

  // out = silu(gate) * up
  static void combine(const float* gate, const float* up, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store(out + i, mul(silu(load(gate + i)), load(up + i)));
    if (i < count) {
      const Vec rest = mul(silu(load_some(gate + i, count - i)), load_some(up + i, count - i));
      store_some(out + i, rest, count - i);
    }
  }

  void compute_outputs(const Inputs& inputs, int64_t item, float* panel) {
    const int64_t num_chunks = count_chunks(dim_), expert = item / num_chunks;
    const int64_t begin = item % num_chunks * kChunk;
    const int64_t end = begin + kChunk < dim_ ? begin + kChunk : dim_;
    const int64_t row = begins_[expert], count = begins_[expert + 1] - row;
    if (count > 0)
      multiply(inputs, nullptr, row, count, a_.w2, expert, begin, end,
               outputs_ + row * dim_ + begin, dim_, panel);
  }

  void sum_slots(int64_t t, float* total) {
    const int64_t first_slot = t * a_.num_slots;
    const int64_t* const experts = a_.experts + first_ * a_.num_slots + first_slot;
    bool is_first = true;
    for (int64_t k = 0; k < a_.num_slots; ++k) {
      if (experts[k] == kNoExpert) continue;
      const int64_t slot = first_slot + k;
      const float* out = outputs_ + row_of_slot_[slot] * dim_;
      const float weight = a_.slot_weights[first_ * a_.num_slots + slot];
      for (int64_t i = 0; i < dim_; ++i) {
        const float part = weight * out[i];
        total[i] = is_first ? part : total[i] + part;
      }
      is_first = false;
    }
    if (is_first) std::memset(total, 0, static_cast<size_t>(dim_) * 4);
    narrow_and_add(total, dim_, a_.residual, a_.out, a_.x.type, (first_ + t) * dim_);
  }

  const ExpertsArguments& a_;
  const int64_t first_, num_tokens_, dim_, hidden_dim_, hidden_stride_, wide_length_;
  int64_t num_rows_ = 0, rows_at_once_ = 0;  // token copies that go to an expert
  int64_t thread_bytes_ = 0, panel_bytes_ = 0;
  bool is_rounded_ = false;  // whether hidden values become bf16 or 8 bits
  char *inputs_memory_, *hidden_memory_, *thread_memory_;
  float *hidden_, *outputs_;
  int64_t *token_of_row_, *row_of_slot_, *begins_;
};

static void experts(const ExpertsArguments& arguments, Context& context) {
  for (int64_t t = 0; t < arguments.num_tokens; t += kTokensAtOnce) {
    const int64_t rest = arguments.num_tokens - t;
    const int64_t count = rest < kTokensAtOnce ? rest : kTokensAtOnce;
    const int64_t matrix = arguments.w1.num_rows * arguments.w1.num_columns;
    launch<ExpertsTask>(context, 3 * count * arguments.num_slots * matrix, arguments, t, count);
  }
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
