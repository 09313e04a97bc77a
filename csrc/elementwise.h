// RMSNorm and RoPE, row by row, in fp32.
#pragma once

#include "linear.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

static inline float round_to(float value, Type type) {
  return type == Type::kFloat ? value : bf16_to_float(float_to_bf16(value));
}

// 1 / sqrt(mean(x^2) + eps) of a row of `dim` numbers, with zeros up to `stride`.
static inline float invert_rms(const float* row, int64_t dim, int64_t stride, float eps) {
  Vec squares = zero();
  for (int64_t i = 0; i < stride; i += kLanes) {
    const Vec v = load(row + i);
    squares = fma(v, v, squares);
  }
  return 1.0f / sqrtf(sum_lanes(squares) / static_cast<float>(dim) + eps);
}

class NormTask final : public Task {
 public:
  NormTask(const NormArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments), stride_(round_up(arguments.dim, 16)) {
    memory_ = static_cast<float*>(scratch.reserve((1 + num_threads) * stride_ * 4));
    widen(a_.weight.data, a_.weight.type, 0, a_.dim, memory_);
  }

  // x / sqrt(mean(x^2) + eps), rounded to the type of x, times the weight.
  void run(Team& team, int thread) override {
    float* const row = memory_ + (1 + thread) * stride_;
    for (int64_t t; (t = team.take(a_.num_tokens)) < a_.num_tokens;) {
      widen(a_.x.data, a_.x.type, t * a_.dim, a_.dim, row);
      for (int64_t i = a_.dim; i < stride_; ++i) row[i] = 0;
      const float inverse = invert_rms(row, a_.dim, stride_, a_.eps);
      for (int64_t i = 0; i < a_.dim; ++i)
        row[i] = round_to(row[i] * inverse, a_.x.type) * memory_[i];
      narrow(row, a_.dim, a_.out, a_.x.type, t * a_.dim);
    }
  }

 private:
  const NormArguments& a_;
  const int64_t stride_;
  float* memory_;
};

static void norm(const NormArguments& arguments, Context& context) {
  launch<NormTask>(context, arguments.num_tokens * arguments.dim, arguments);
}

// Turn the pairs (i, i + half) of a head.
static inline void turn_pairs(float* head, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cos[i] - second * sin[i];
    head[half + i] = second * cos[i] + first * sin[i];
  }
}

class RotateTask final : public Task {
 public:
  RotateTask(const RotateArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments), stride_(round_up(arguments.head_dim, 16)) {
    memory_ = static_cast<float*>(scratch.reserve(num_threads * stride_ * 4));
  }

  // The pairs (i, i + S / 2) of each head turn by the angle of their token.
  void run(Team& team, int thread) override {
    const int64_t half = a_.head_dim / 2;
    float* const head = memory_ + thread * stride_;
    for (int64_t t; (t = team.take(a_.num_tokens)) < a_.num_tokens;) {
      const float *cos = a_.cos + t * half, *sin = a_.sin + t * half;
      for (int64_t h = 0; h < a_.num_heads; ++h) {
        widen(a_.x.data, a_.x.type, t * a_.stride + h * a_.head_dim, a_.head_dim, head);
        turn_pairs(head, half, cos, sin);
        narrow(head, a_.head_dim, a_.out, a_.x.type, (t * a_.num_heads + h) * a_.head_dim);
      }
    }
  }

 private:
  const RotateArguments& a_;
  const int64_t stride_;
  float* memory_;
};

static void rotate(const RotateArguments& arguments, Context& context) {
  const int64_t work = arguments.num_tokens * arguments.num_heads * arguments.head_dim;
  launch<RotateTask>(context, work, arguments);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
