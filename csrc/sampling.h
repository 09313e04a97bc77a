// From scores to a token: the best of them, or one drawn from those that the filters keep.
//
// What a row gives depends on that row alone. No row is sorted: a filter's threshold is found by
// halving the range of fp32 numbers, 31 times at most.
#pragma once

#include "elementwise.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

// The largest of `count` numbers but NaN; -infinity if there is none.
static inline float find_largest(const float* from, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Vec largest = splat(-INFINITY);  // of a NaN and a number, `max` takes the second
  for (int64_t i = 0; i < whole; i += kLanes) largest = max(load(from + i), largest);
  float best = max_lanes(largest);
  for (int64_t i = whole; i < count; ++i) best = from[i] > best ? from[i] : best;
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
  const int64_t whole = count / kLanes * kLanes;
  Vec poison = zero();  // 0 times a number is 0, times any other NaN
  for (int64_t i = 0; i < whole; i += kLanes) poison = fma(load(from + i), zero(), poison);
  float rest = sum_lanes(poison);
  for (int64_t i = whole; i < count; ++i) rest += from[i] * 0.0f;
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

constexpr int64_t kScoreBlock = 64;     // scores whose largest, and whose chances' sum, are known
constexpr float kGreedyBelow = 1e-5f;   // as in tramontane/kernels/sampling.py
constexpr float kLowestScore = -87.0f;  // what is below has no chance; see `exp`

// Scores x <= 0, whose chances are proportional to w = e^x. Whole blocks: the rest is -infinity, 0.
struct Scores {
  float *x, *w;
  int64_t count;

  void fill_up() {
    for (int64_t i = count; i < round_up(count, kScoreBlock); ++i) x[i] = -INFINITY, w[i] = 0;
  }
};

// Numbers up to 0 have the bits of 0, 1, 2, ... in falling order, if their sign is left out.
static inline float threshold_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return -value;
}
static inline int32_t bits_of(float threshold) {
  int32_t bits;
  std::memcpy(&bits, &threshold, sizeof bits);
  return bits & 0x7fffffff;
}

// How many of the scores are at least `least`.
static inline int64_t count_at_least(const float* x, int64_t count, float least) {
  Vec total = zero();
  for (int64_t i = 0; i < count; i += kLanes)
    total = add(total, keep_at_least(splat(1.0f), load(x + i), splat(least)));
  return static_cast<int64_t>(sum_lanes(total));
}

// The chances of the scores that are at least `least`: never less than with a higher one.
static inline double sum_at_least(const Scores& scores, float least) {
  double total = 0;
  for (int64_t i = 0; i < scores.count; i += kScoreBlock) {
    Vec sums = zero();
    for (int64_t j = i; j < i + kScoreBlock; j += kLanes)
      sums = add(sums, keep_at_least(load(scores.w + j), load(scores.x + j), splat(least)));
    total += sum_lanes(sums);
  }
  return total;
}

// A threshold that `k` scores reach, or more if some are equal to the k-th largest. At least k
// reach `least`; whole blocks of -infinity may follow the scores.
static inline float find_kth(const float* x, int64_t count, int64_t k, float least) {
  int32_t low = -1, high = bits_of(least);  // too few reach `low`, enough `high`
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t found = count_at_least(x, count, threshold_of(middle));
    if (found == k) return threshold_of(middle);
    (found > k ? high : low) = middle;
  }
  return threshold_of(high);
}

class SampleTask final : public Task {
 public:
  SampleTask(const SampleArguments& arguments, Scratch& scratch, int num_threads)
      : a_(arguments),
        length_(round_up(arguments.num_columns, kScoreBlock)),
        num_blocks_(length_ / kScoreBlock) {
    row_floats_ = 4 * length_ + round_up(num_blocks_, kScoreBlock) + 2 * round_up(num_blocks_, 16);
    memory_ = static_cast<float*>(scratch.reserve(num_threads * row_floats_ * 4));
  }

  void run(Team& team, int thread) override {
    float* at = memory_ + thread * row_floats_;
    Row row;
    row.all = {at, at + length_, a_.num_columns};
    row.some = {at + 2 * length_, at + 3 * length_, 0};
    row.largest = at + 4 * length_;
    row.sums = reinterpret_cast<double*>(row.largest + round_up(num_blocks_, kScoreBlock));
    for (int64_t r; (r = team.take(a_.num_rows)) < a_.num_rows;) a_.tokens[r] = choose(r, row);
  }

 private:
  struct Row {
    Scores all, some;  // of the whole row, and those of them that a threshold may be among
    float* largest;    // score of each block
    double* sums;      // of the chances of each block
  };
  // What the filters keep: scores above `least`, and equal to it as long as less than `share` of
  // the chances has come before, of which `before` are those above.
  struct Kept {
    float least;
    double before, share;
  };

  int64_t choose(int64_t r, Row& row) const {
    const float* const logits = a_.logits + r * a_.stride;
    if (a_.temperature[r] < kGreedyBelow) return find_best(logits, a_.num_columns);
    scale(logits, a_.temperature[r], row);
    const Kept kept = filter(a_.top_k[r], a_.top_p[r], row);
    const double total = drop(kept, a_.min_p[r], row);
    return total > 0 ? draw(a_.numbers[r] * total, row) : find_best(logits, a_.num_columns);
  }

  // Scores relative to the best, over the temperature, and their chances.
  void scale(const float* logits, float temperature, Row& row) const {
    const int64_t count = a_.num_columns;
    const Vec best = splat(find_largest(logits, count)), divisor = splat(temperature);
    const auto put = [&](int64_t at, Vec x) {
      store(row.all.x + at, x);
      store(row.all.w + at, keep_at_least(exp(x), x, splat(kLowestScore)));
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put(i, div(sub(load(logits + i), best), divisor));
    if (i < count) put(i, div(sub(load_some(logits + i, count - i), best), divisor));
    row.all.fill_up();
    for (int64_t b = 0; b < num_blocks_; ++b)
      row.largest[b] = find_largest(row.all.x + b * kScoreBlock, kScoreBlock);
    for (int64_t b = num_blocks_; b < round_up(num_blocks_, kScoreBlock); ++b)
      row.largest[b] = -INFINITY;
  }

  Kept filter(int64_t top_k, float top_p, Row& row) const {
    Kept kept{-INFINITY, 0, INFINITY};
    const Scores* scores = &row.all;
    if (top_k > 0 && top_k < a_.num_columns) {
      if (top_k < num_blocks_) {  // what the best of k blocks reach, k scores reach
        kept.least = find_kth(row.largest, num_blocks_, top_k, kept.least);
        scores = &gather(kept.least, row);
      }
      kept.least = find_kth(scores->x, scores->count, top_k, kept.least);
    }
    if (top_p < 1) {
      const double total = sum_at_least(*scores, kept.least);
      kept.share = static_cast<double>(top_p) * total;
      // All tokens with less than this chance have together less than what top-p leaves out.
      const double chance = (total - kept.share) / static_cast<double>(a_.num_columns);
      const float least = logf(static_cast<float>(chance)) - 1e-3f;
      if (least > kept.least) kept.least = least;
      if (scores == &row.all) scores = &gather(kept.least, row);
      find_share(*scores, kept);
    }
    return kept;
  }

  // Raise the threshold as far as it still lets `share` through.
  static void find_share(const Scores& scores, Kept& kept) {
    int32_t low = -1, high = bits_of(kept.least);
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (sum_at_least(scores, threshold_of(middle)) >= kept.share ? high : low) = middle;
    }
    kept.least = threshold_of(high);
    kept.before = high == 0 ? 0 : sum_at_least(scores, threshold_of(high - 1));
  }

  // The scores of the row that are at least `least`.
  const Scores& gather(float least, Row& row) const {
    Scores& some = row.some;
    some.count = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      if (row.largest[b] < least) continue;
      const float* const x = row.all.x + b * kScoreBlock;
      const float* const w = row.all.w + b * kScoreBlock;
      for (int64_t i = 0; i < kScoreBlock; ++i) {
        some.x[some.count] = x[i], some.w[some.count] = w[i];
        some.count += x[i] >= least;
      }
    }
    some.fill_up();
    return some;
  }

  // Leave chances to what is kept alone, and sum them.
  double drop(const Kept& kept, float min_p, Row& row) const {
    double total = 0, before = kept.before;
    const Vec least = splat(kept.least), least_chance = splat(min_p);
    for (int64_t b = 0; b < num_blocks_; ++b) {
      row.sums[b] = 0;
      if (row.largest[b] < kept.least) continue;
      const float* const x = row.all.x + b * kScoreBlock;
      float* const w = row.all.w + b * kScoreBlock;
      for (int64_t i = 0; kept.share < INFINITY && i < kScoreBlock; ++i) {
        if (x[i] != kept.least) continue;
        const float chance = w[i];
        if (before >= kept.share && before > 0) w[i] = 0;  // the best is kept in any case
        before += chance;
      }
      Vec sums = zero();
      for (int64_t i = 0; i < kScoreBlock; i += kLanes) {
        Vec chances = keep_at_least(load(w + i), load(x + i), least);
        chances = keep_at_least(chances, chances, least_chance);
        store(w + i, chances);
        sums = add(sums, chances);
      }
      total += row.sums[b] = sum_lanes(sums);
    }
    return total;
  }

  // The first token at which the running sum of chances passes `target`.
  int64_t draw(double target, const Row& row) const {
    double before = 0, sum = 0;
    int64_t block = 0, token = 0;
    for (int64_t b = 0; b < num_blocks_ && sum <= target; ++b) {
      if (row.sums[b] == 0) continue;
      block = b, before = sum;
      sum += row.sums[b];
    }
    for (int64_t i = 0; i < kScoreBlock && before <= target; ++i) {
      const float chance = row.all.w[block * kScoreBlock + i];
      if (chance > 0) token = block * kScoreBlock + i;  // the last, if rounding raised their sum
      before += chance;
    }
    return token;
  }

  const SampleArguments& a_;
  const int64_t length_, num_blocks_;
  int64_t row_floats_ = 0;
  float* memory_;
};

static void sample(const SampleArguments& arguments, Context& context) {
  constexpr int64_t kWorkPerScore = 16;
  const int64_t work = arguments.num_rows * arguments.num_columns * kWorkPerScore;
  launch<SampleTask>(context, work, arguments);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
