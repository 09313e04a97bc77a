// Products with plain weights, bf16 or fp32, as they lie in a checkpoint: rows of numbers.
//
// Inputs are fp32, or bf16 where both are and the processor multiplies them as such.
//
// Each output is a dot product whose sum runs over the lanes of one register in the order of the
// row, and then over the lanes. A tile computes kTileRows x kTileColumns of them at once, so that
// each number loaded is used several times; the sum of an output is the same in every tile.
#pragma once

#include "vector.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileColumns = 6;  // 24 sums, 4 inputs, 1 weight: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 3, kTileColumns = 4;  // 12 sums, 3 inputs, 1 weight: all 16 registers
#else
constexpr int kTileRows = 2, kTileColumns = 4;
#endif
constexpr int64_t kPanelColumns = 24;  // weights converted to fp32 at once, in the L2 cache
constexpr int64_t kPanelMinRows = 8;   // with fewer inputs each weight is converted as it comes
constexpr int64_t kMaxRows = 128;      // inputs multiplied at once
constexpr int64_t kPart = 1024;        // numbers of a row whose products are summed at once

static inline int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// How inputs of a type are multiplied: kSize of them in one step.
template <class Input>
struct Step;

template <>
struct Step<float> {
  static constexpr int kSize = kLanes;
  using Value = Vec;

  template <class Number>
  static Value load(const Number* from) {
    return TRAMONTANE_ISA::load(from);
  }
  static Vec add_products(Value x, Value w, Vec sum) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Step<uint16_t> {
  static constexpr int kSize = kHalfLanes;
  using Value = HalfVec;

  static Value load(const uint16_t* from) { return load_halves(from); }
  static Vec add_products(Value x, Value w, Vec sum) { return add_pairs(x, w, sum); }
};
#endif

// Adds to sums[r][c] what the numbers begin .. end of rows[r] and w[c] contribute. Rows are padded
// with zeros to whole steps, w is not.
template <int R, int C, class Input, class Number>
static inline void add_dot(const Input* const* rows, const Number* w, int64_t stride, int64_t begin,
                           int64_t end, Vec (&sums)[R][C]) {
  using Step = Step<Input>;
  using Value = typename Step::Value;
  int64_t i = begin;
  for (; i + Step::kSize <= end; i += Step::kSize) {
    Value x[R];
    for (int r = 0; r < R; ++r) x[r] = Step::load(rows[r] + i);
    for (int c = 0; c < C; ++c) {
      const Value weight = Step::load(w + c * stride + i);
      for (int r = 0; r < R; ++r) sums[r][c] = Step::add_products(x[r], weight, sums[r][c]);
    }
  }
  if (i < end) {
    for (int c = 0; c < C; ++c) {
      Number padded[Step::kSize] = {};
      std::memcpy(padded, w + c * stride + i, static_cast<size_t>(end - i) * sizeof(Number));
      const Value weight = Step::load(padded);
      for (int r = 0; r < R; ++r)
        sums[r][c] = Step::add_products(Step::load(rows[r] + i), weight, sums[r][c]);
    }
  }
}

template <int R, int C>
static inline void finish_dot(const Vec (&sums)[R][C], float* out, int64_t out_stride) {
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; c += 4) {
      float four[4];
      const int last = C - 1;
      sum_lanes(sums[r][c], sums[r][c + 1 < C ? c + 1 : last], sums[r][c + 2 < C ? c + 2 : last],
                sums[r][c + 3 < C ? c + 3 : last], four);
      for (int j = 0; j < 4 && c + j < C; ++j) out[r * out_stride + c + j] = four[j];
    }
  }
}

// out[r][c] = rows[r] . w[c]
template <int R, int C, class Input, class Number>
static void dot_tile(const Input* const* rows, const Number* w, int64_t stride, int64_t length,
                     float* out, int64_t out_stride) {
  Vec sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = zero();
  add_dot<R, C>(rows, w, stride, 0, length, sums);
  finish_dot<R, C>(sums, out, out_stride);
}

template <int R, class Input, class Number>
static void dot_columns(const Input* const* rows, const Number* w, int64_t stride, int64_t length,
                        int64_t num_columns, float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + kTileColumns <= num_columns; c += kTileColumns)
    dot_tile<R, kTileColumns>(rows, w + c * stride, stride, length, out + c, out_stride);
  for (; c < num_columns; ++c)
    dot_tile<R, 1>(rows, w + c * stride, stride, length, out + c, out_stride);
}

// out[r][c] = rows[r] . w[c] for any number of rows and columns.
template <class Input, class Number>
static void dot_all(const Input* const* rows, int64_t num_rows, const Number* w, int64_t stride,
                    int64_t length, int64_t num_columns, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + kTileRows <= num_rows; r += kTileRows)
    dot_columns<kTileRows>(rows + r, w, stride, length, num_columns, out + r * out_stride,
                           out_stride);
  const int64_t rest = num_rows - r;
  float* const to = out + r * out_stride;
  if (rest == 1) dot_columns<1>(rows + r, w, stride, length, num_columns, to, out_stride);
  if (rest == 2) dot_columns<2>(rows + r, w, stride, length, num_columns, to, out_stride);
#if defined(__AVX512F__)
  if (rest == 3) dot_columns<3>(rows + r, w, stride, length, num_columns, to, out_stride);
#endif
}

// Memory for `multiply_plain` with rows of `length` weights.
static inline int64_t count_panel_bytes(int64_t length) {
  const int64_t kept = kMaxRows * kPanelColumns * kLanes * 4;
  return kPanelColumns * round_up(length, kLanes) * 4 + (length > kPart ? kept : 0);
}

// As `dot_all` for whole tiles of rows and kPanelColumns columns, in parts of the rows that stay in
// the L1 cache together with their weights; sums wait in `kept` between one part and the next.
template <class Input, class Number>
static void dot_panel(const Input* const* rows, int64_t num_rows, const Number* w, int64_t stride,
                      int64_t length, float* out, int64_t out_stride, float* kept) {
  constexpr int64_t kTilesPerPanel = kPanelColumns / kTileColumns;
  constexpr int64_t kTileSize = kTileRows * kTileColumns * kLanes;
  for (int64_t begin = 0; begin < length; begin += kPart) {
    const int64_t end = begin + kPart < length ? begin + kPart : length;
    for (int64_t c = 0; c < kPanelColumns; c += kTileColumns) {
      for (int64_t r = 0; r < num_rows; r += kTileRows) {
        float* const tile = kept + (r / kTileRows * kTilesPerPanel + c / kTileColumns) * kTileSize;
        Vec sums[kTileRows][kTileColumns];
        for (int i = 0; i < kTileRows; ++i)
          for (int j = 0; j < kTileColumns; ++j)
            sums[i][j] = begin == 0 ? zero() : load(tile + (i * kTileColumns + j) * kLanes);
        add_dot<kTileRows, kTileColumns>(rows + r, w + c * stride, stride, begin, end, sums);
        if (end == length) {
          finish_dot<kTileRows, kTileColumns>(sums, out + r * out_stride + c, out_stride);
        } else {
          for (int i = 0; i < kTileRows; ++i)
            for (int j = 0; j < kTileColumns; ++j)
              store(tile + (i * kTileColumns + j) * kLanes, sums[i][j]);
        }
      }
    }
  }
}

// The same for any number of rows and columns.
template <class Input, class Number>
static void dot_blocked(const Input* const* rows, int64_t num_rows, const Number* w, int64_t stride,
                        int64_t length, int64_t num_columns, float* out, int64_t out_stride,
                        float* kept) {
  const int64_t whole = num_columns == kPanelColumns ? num_rows / kTileRows * kTileRows : 0;
  if (whole > 0) dot_panel(rows, whole, w, stride, length, out, out_stride, kept);
  dot_all(rows + whole, num_rows - whole, w, stride, length, num_columns, out + whole * out_stride,
          out_stride);
}

static inline void widen_panel(const uint16_t* w, int64_t num_rows, int64_t length, float* panel) {
  const int64_t stride = round_up(length, kLanes);
  for (int64_t j = 0; j < num_rows; ++j) {
    const uint16_t* from = w + j * length;
    float* to = panel + j * stride;
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) store(to + i, load(from + i));
    if (i < length) store(to + i, load_some(from + i, length - i));
  }
}

// As `dot_all` for up to kMaxRows rows and weights of either type; `memory` has
// `count_panel_bytes`.
static inline void multiply_plain(const float* const* rows, int64_t num_rows, const Weight& weight,
                                  int64_t expert, int64_t begin, int64_t end, float* out,
                                  int64_t out_stride, float* memory) {
  const int64_t length = weight.num_columns, stride = round_up(length, kLanes);
  const int64_t first = expert * weight.expert_stride + begin * length, num_columns = end - begin;
  const auto* floats = static_cast<const float*>(weight.data) + first;
  const auto* halves = static_cast<const uint16_t*>(weight.data) + first;
  const bool is_float = weight.type == Type::kFloat;
  if (num_rows < kPanelMinRows) {
    if (is_float) dot_all(rows, num_rows, floats, length, length, num_columns, out, out_stride);
    else dot_all(rows, num_rows, halves, length, length, num_columns, out, out_stride);
    return;
  }
  float* const panel = memory;
  float* const kept = panel + kPanelColumns * stride;
  for (int64_t c = 0; c < num_columns; c += kPanelColumns) {
    const int64_t count = num_columns - c < kPanelColumns ? num_columns - c : kPanelColumns;
    if (is_float) {
      dot_blocked(rows, num_rows, floats + c * length, length, length, count, out + c, out_stride,
                  kept);
    } else {
      widen_panel(halves + c * length, count, length, panel);
      dot_blocked(rows, num_rows, panel, stride, stride, count, out + c, out_stride, kept);
    }
  }
}

#if defined(__AVX512BF16__)
// The same for inputs and weights of bf16: nothing is converted.
static inline void multiply_plain(const uint16_t* const* rows, int64_t num_rows,
                                  const Weight& weight, int64_t expert, int64_t begin, int64_t end,
                                  float* out, int64_t out_stride, float* memory) {
  const int64_t length = weight.num_columns, num_columns = end - begin;
  const uint16_t* const w = static_cast<const uint16_t*>(weight.data) +
                            expert * weight.expert_stride + begin * length;
  if (num_rows < kPanelMinRows)
    return dot_all(rows, num_rows, w, length, length, num_columns, out, out_stride);
  for (int64_t c = 0; c < num_columns; c += kPanelColumns) {
    const int64_t count = num_columns - c < kPanelColumns ? num_columns - c : kPanelColumns;
    dot_blocked(rows, num_rows, w + c * length, length, length, count, out + c, out_stride, memory);
  }
}
#endif

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
