// Mixtral's router: logits, the K largest of them, and their softmax.
#pragma once

#include "elementwise.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

class RouterTask final : public Task {
 public:
  RouterTask(const RouterArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments), weight_{arguments.weight.data, arguments.weight.type, 0, nullptr, nullptr,
                               arguments.num_experts, arguments.dim,         0} {
    row_bytes_ = Inputs::count_bytes(1, weight_, a_.x.type);
    memory_ = static_cast<char*>(scratch.reserve(row_bytes_ * num_threads));
  }

  void run(Team& team, int thread) override {
    Inputs inputs(memory_ + thread * row_bytes_, weight_, a_.x.type);
    for (int64_t t; (t = team.take(a_.num_tokens)) < a_.num_tokens;) {
      float* const logits = a_.logits + t * a_.num_experts;
      inputs.set_plain(0, a_.x.data, a_.x.type, t * a_.dim);
      multiply(inputs, nullptr, 0, 1, weight_, 0, 0, a_.num_experts, logits, a_.num_experts,
               nullptr);
      for (int64_t e = 0; e < a_.num_experts; ++e) logits[e] = round_to(logits[e], a_.x.type);
      choose(logits, a_.counts == nullptr ? a_.num_slots : a_.counts[t],
             a_.slot_weights + t * a_.num_slots, a_.experts + t * a_.num_slots);
    }
  }

 private:
  // Of equal logits the lower expert comes first. NaN counts as the largest, as in torch.sort.
  void choose(const float* logits, int64_t count, float* weights, int64_t* experts) const {
    for (int64_t k = 0; k < count; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < a_.num_experts; ++e) {
        bool is_taken = false;
        for (int64_t j = 0; j < k; ++j) is_taken |= experts[j] == e;
        if (!is_taken && (best < 0 || is_above(logits[e], logits[best]))) best = e;
      }
      experts[k] = best;
    }
    float total = 0;
    for (int64_t k = 0; k < count; ++k) {
      weights[k] = expf(logits[experts[k]] - logits[experts[0]]);
      total += weights[k];
    }
    for (int64_t k = 0; k < count; ++k) weights[k] /= total;
    for (int64_t k = count; k < a_.num_slots; ++k) weights[k] = 0, experts[k] = kNoExpert;
  }

  static bool is_above(float a, float b) { return a > b || (a != a && b == b); }

  const RouterArguments& a_;
  const Weight weight_;
  int64_t row_bytes_ = 0;
  char* memory_ = nullptr;
};

static void router(const RouterArguments& arguments, Context& context) {
  const int64_t work = arguments.num_tokens * arguments.num_experts * arguments.dim;
  launch<RouterTask>(context, work, arguments);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
