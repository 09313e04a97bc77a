// From scores to a token.
#pragma once

#include "elementwise.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

// The largest of `count` numbers but NaN; -infinity if there is none.
static inline float find_largest(const float* from, int64_t count) {
  Vec largest = splat(-INFINITY);  // of a NaN and a number, `max` takes the second
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(load(from + i), largest);
  float best = max_lanes(largest);
  for (; i < count; ++i) best = from[i] > best ? from[i] : best;
  return best;
}

// Where the largest of `count` numbers first is; 0 if all are NaN.
static inline int64_t find_best(const float* from, int64_t count) {
  constexpr int64_t kStep = 256;
  const float best = find_largest(from, count);
  for (int64_t begin = 0; begin < count; begin += kStep) {
    const int64_t end = begin + kStep < count ? begin + kStep : count;
    if (find_largest(from + begin, end - begin) != best) continue;
    for (int64_t i = begin; i < end; ++i)
      if (from[i] == best) return i;
  }
  return 0;
}

static inline bool are_finite(const float* from, int64_t count) {
  Vec poison = zero();  // 0 times a number is 0, times any other NaN
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) poison = fma(load(from + i), zero(), poison);
  float rest = sum_lanes(poison);
  for (; i < count; ++i) rest += from[i] * 0.0f;
  return rest == 0;
}

class HeadTask final : public Task {
 public:
  HeadTask(const HeadArguments& arguments, Scratch&, int) : a_(arguments) {}

  void run(Team& team, int) override {
    for (int64_t r; (r = team.take(a_.num_rows)) < a_.num_rows;) {
      float* const row = a_.logits + r * a_.num_columns;
      if (a_.scores.data != a_.logits)
        widen(a_.scores.data, a_.scores.type, r * a_.num_columns, a_.num_columns, row);
      a_.best[r] = find_best(row, a_.num_choices);
      a_.is_finite[r] = are_finite(row, a_.num_choices);
    }
  }

 private:
  const HeadArguments& a_;
};

static void head(const HeadArguments& arguments, Context& context) {
  launch<HeadTask>(context, arguments.num_rows * arguments.num_columns, arguments);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
