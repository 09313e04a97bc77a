// What training runs between products: SwiGLU, and what the gradients of it and of RMSNorm need.
// Number by number or row by row, in fp32.
#pragma once

#include "elementwise.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

constexpr int64_t kNumbersInCache = 1024;   // that are computed at once
constexpr int64_t kNumbersTaken = 1 << 14;  // that a thread takes
constexpr int64_t kTokensSummed = 64;       // whose part of a weight's gradient is summed first

// Call `compute` with the first of some numbers and how many they are, until all have been taken.
template <class Compute>
static void each_part(Team& team, int64_t count, Compute compute) {
  const int64_t num_items = (count + kNumbersTaken - 1) / kNumbersTaken;
  for (int64_t item; (item = team.take(num_items)) < num_items;) {
    const int64_t begin = item * kNumbersTaken;
    const int64_t end = count - begin < kNumbersTaken ? count : begin + kNumbersTaken;
    for (int64_t at = begin; at < end; at += kNumbersInCache)
      compute(at, end - at < kNumbersInCache ? end - at : kNumbersInCache);
  }
}

class SwigluTask final : public Task {
 public:
  SwigluTask(const SwigluArguments& arguments, Scratch&, int) : a_(arguments) {}

  // silu(gate) * up
  void run(Team& team, int) override {
    float gate[kNumbersInCache] = {}, up[kNumbersInCache] = {};
    each_part(team, a_.count, [&](int64_t at, int64_t count) {
      widen(a_.gate.data, a_.gate.type, at, count, gate);
      widen(a_.up.data, a_.up.type, at, count, up);
      for (int64_t i = 0; i < count; i += kLanes)
        store(gate + i, mul(silu(load(gate + i)), load(up + i)));
      narrow(gate, count, a_.out, a_.gate.type, at);
    });
  }

 private:
  const SwigluArguments& a_;
};

static void swiglu(const SwigluArguments& arguments, Context& context) {
  launch<SwigluTask>(context, arguments.count, arguments);
}

class SwigluGradTask final : public Task {
 public:
  SwigluGradTask(const SwigluGradArguments& arguments, Scratch&, int) : a_(arguments) {}

  // With s = 1 / (1 + e^-gate): the slope of silu is s + gate s (1 - s).
  void run(Team& team, int) override {
    float gate[kNumbersInCache] = {}, up[kNumbersInCache] = {}, grad[kNumbersInCache] = {};
    const Type type = a_.gate.type;
    const Vec one = splat(1.0f);
    each_part(team, a_.count, [&](int64_t at, int64_t count) {
      widen(a_.gate.data, type, at, count, gate);
      widen(a_.up.data, type, at, count, up);
      widen(a_.grad.data, type, at, count, grad);
      for (int64_t i = 0; i < count; i += kLanes) {
        const Vec g = load(gate + i), u = load(up + i), d = load(grad + i);
        const Vec share = sigmoid(g), active = mul(max(splat(-88.0f), g), share);  // see `silu`
        store(gate + i, mul(active, u));
        store(up + i, mul(active, d));
        store(grad + i, mul(mul(d, u), fma(active, sub(one, share), share)));
      }
      narrow(gate, count, a_.out, type, at);
      narrow(up, count, a_.grad_up, type, at);
      narrow(grad, count, a_.grad_gate, type, at);
    });
  }

 private:
  const SwigluGradArguments& a_;
};

static void swiglu_grad(const SwigluGradArguments& arguments, Context& context) {
  launch<SwigluGradTask>(context, arguments.count, arguments);
}

class NormGradTask final : public Task {
 public:
  NormGradTask(const NormGradArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments),
        stride_(round_up(arguments.dim, 16)),
        num_blocks_((arguments.num_tokens + kTokensSummed - 1) / kTokensSummed) {
    const int64_t num_rows = 1 + num_blocks_ + 2 * num_threads;
    weight_ = static_cast<float*>(scratch.reserve(num_rows * stride_ * 4));
    sums_ = weight_ + stride_;
    rows_ = sums_ + num_blocks_ * stride_;
    widen(a_.weight.data, a_.weight.type, 0, a_.dim, weight_);
    for (int64_t i = a_.dim; i < stride_; ++i) weight_[i] = 0;
  }

  // The sums over tokens are added up block by block, in their order, however many threads there
  // are: training repeats itself to the bit.
  void run(Team& team, int thread) override {
    float* const normed = rows_ + 2 * thread * stride_;
    float* const grad = normed + stride_;
    for (int64_t block; (block = team.take(num_blocks_)) < num_blocks_;) {
      float* const sums = sums_ + block * stride_;
      std::memset(sums, 0, static_cast<size_t>(stride_) * 4);
      const int64_t begin = block * kTokensSummed, rest = a_.num_tokens - begin;
      const int64_t end = begin + (rest < kTokensSummed ? rest : kTokensSummed);
      for (int64_t t = begin; t < end; ++t) differentiate_row(t, normed, grad, sums);
    }
    team.wait();
    if (thread == 0) add_sums(grad);
  }

 private:
  // y = n w with n = x r, r = 1 / rms(x): dx = r (dy w - n mean(dy w n)), dw = sum dy n.
  void differentiate_row(int64_t t, float* normed, float* grad, float* sums) {
    widen(a_.x.data, a_.x.type, t * a_.dim, a_.dim, normed);
    widen(a_.grad.data, a_.x.type, t * a_.dim, a_.dim, grad);
    for (int64_t i = a_.dim; i < stride_; ++i) normed[i] = grad[i] = 0;
    const float inverse = invert_rms(normed, a_.dim, stride_, a_.eps);
    Vec dots = zero();
    for (int64_t i = 0; i < stride_; i += kLanes) {
      const Vec n = mul(load(normed + i), splat(inverse)), d = load(grad + i);
      store(sums + i, fma(d, n, load(sums + i)));
      const Vec weighted = mul(d, load(weight_ + i));
      dots = fma(weighted, n, dots);
      store(normed + i, n);
      store(grad + i, weighted);
    }
    const Vec mean = splat(sum_lanes(dots) / static_cast<float>(a_.dim));
    for (int64_t i = 0; i < stride_; i += kLanes) {
      const Vec change = sub(load(grad + i), mul(load(normed + i), mean));
      store(grad + i, mul(change, splat(inverse)));
    }
    narrow(grad, a_.dim, a_.grad_x, a_.x.type, t * a_.dim);
  }

  void add_sums(float* total) {
    std::memset(total, 0, static_cast<size_t>(stride_) * 4);
    for (int64_t block = 0; block < num_blocks_; ++block)
      for (int64_t i = 0; i < stride_; i += kLanes)
        store(total + i, add(load(total + i), load(sums_ + block * stride_ + i)));
    narrow(total, a_.dim, a_.grad_weight, a_.weight.type, 0);
  }

  const NormGradArguments& a_;
  const int64_t stride_, num_blocks_;
  float *weight_, *sums_, *rows_;
};

static void norm_grad(const NormGradArguments& arguments, Context& context) {
  launch<NormGradTask>(context, arguments.num_tokens * arguments.dim, arguments);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
