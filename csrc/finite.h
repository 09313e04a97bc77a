// Whether numbers are finite: the bits of NaN and the infinities, without sign, are the largest.
#pragma once

#include <cstdint>
#include <cstring>

#include "linear.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

constexpr int64_t kNumbersAtOnce = 1 << 16;  // that a thread takes

// The comparison is one of whole numbers, so that subnormal numbers cost no more than others.
template <class Bits>
static bool are_below(const Bits* x, int64_t count, uint32_t infinity) {
  const auto magnitude_bits = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<Bits>(x[i] & magnitude_bits);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < infinity;
}

class FiniteTask final : public Task {
 public:
  explicit FiniteTask(const FiniteArguments& arguments) : a_(arguments) {}

  void run(Team& team, int) override {
    const int64_t num_items = (a_.count + kNumbersAtOnce - 1) / kNumbersAtOnce;
    for (int64_t item; (item = team.take(num_items)) < num_items && is_finite();) {
      const int64_t begin = item * kNumbersAtOnce, rest = a_.count - begin;
      const int64_t count = rest < kNumbersAtOnce ? rest : kNumbersAtOnce;
      const bool are_fine =
          a_.size == 4
              ? are_below(static_cast<const uint32_t*>(a_.data) + begin, count, a_.infinity)
              : are_below(static_cast<const uint16_t*>(a_.data) + begin, count, a_.infinity);
      if (!are_fine) is_finite_.store(false, std::memory_order_relaxed);
    }
  }

  bool is_finite() const { return is_finite_.load(std::memory_order_relaxed); }

 private:
  const FiniteArguments& a_;
  std::atomic<bool> is_finite_{true};
};

static bool is_finite(const FiniteArguments& arguments, int num_threads) {
  FiniteTask task(arguments);
  run_team(task, choose_threads(arguments.count, num_threads));
  return task.is_finite();
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
