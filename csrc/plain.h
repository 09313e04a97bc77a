// Products with plain weights, bf16 or fp32, as they lie in a checkpoint: rows of numbers.
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
constexpr int64_t kPanelColumns = 24;     // weights converted to fp32 at once, in the L2 cache
constexpr int64_t kPanelMinRows = 8;      // with fewer inputs each weight is converted as it comes
constexpr int64_t kPanelMaxBytes = 1 << 20;

static inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// out[r][c] = rows[r] . w[c]; rows are padded with zeros to whole vectors, w is not.
template <int R, int C, class Number>
static void dot_tile(const float* const* rows, const Number* w, int64_t stride, int64_t length,
                     float* out, int64_t out_stride) {
  Vec sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = zero();
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    Vec x[R];
    for (int r = 0; r < R; ++r) x[r] = load(rows[r] + i);
    for (int c = 0; c < C; ++c) {
      const Vec weight = load(w + c * stride + i);
      for (int r = 0; r < R; ++r) sums[r][c] = fma(x[r], weight, sums[r][c]);
    }
  }
  if (i < length) {
    for (int c = 0; c < C; ++c) {
      const Vec weight = load_some(w + c * stride + i, length - i);
      for (int r = 0; r < R; ++r) sums[r][c] = fma(load(rows[r] + i), weight, sums[r][c]);
    }
  }
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

template <int R, class Number>
static void dot_columns(const float* const* rows, const Number* w, int64_t stride, int64_t length,
                        int64_t num_columns, float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + kTileColumns <= num_columns; c += kTileColumns)
    dot_tile<R, kTileColumns>(rows, w + c * stride, stride, length, out + c, out_stride);
  for (; c < num_columns; ++c)
    dot_tile<R, 1>(rows, w + c * stride, stride, length, out + c, out_stride);
}

// out[r][c] = rows[r] . w[c] for any number of rows and columns.
template <class Number>
static void dot_all(const float* const* rows, int64_t num_rows, const Number* w, int64_t stride,
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

// Bytes of a panel for rows of `length` weights; 0 if weights are to be converted as they come.
static inline int64_t count_panel_bytes(int64_t length) {
  const int64_t bytes = kPanelColumns * round_up(length, kLanes) * 4;
  return bytes <= kPanelMaxBytes ? bytes : 0;
}

// As `dot_all`, for weights of either type; `panel` is memory of `count_panel_bytes`.
static inline void multiply_plain(const float* const* rows, int64_t num_rows, const Weight& weight,
                                  int64_t expert, int64_t begin, int64_t end, float* out,
                                  int64_t out_stride, float* panel) {
  const int64_t length = weight.num_columns;
  const int64_t first = (expert * weight.num_rows + begin) * length;
  if (weight.type == Type::kFloat) {
    const float* w = static_cast<const float*>(weight.data) + first;
    dot_all(rows, num_rows, w, length, length, end - begin, out, out_stride);
    return;
  }
  const uint16_t* w = static_cast<const uint16_t*>(weight.data) + first;
  if (num_rows < kPanelMinRows || count_panel_bytes(length) == 0) {
    dot_all(rows, num_rows, w, length, length, end - begin, out, out_stride);
    return;
  }
  const int64_t stride = round_up(length, kLanes);
  for (int64_t c = 0; c < end - begin; c += kPanelColumns) {
    const int64_t count = end - begin - c < kPanelColumns ? end - begin - c : kPanelColumns;
    for (int64_t j = 0; j < count; ++j) {
      const uint16_t* from = w + (c + j) * length;
      float* to = panel + j * stride;
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes) store(to + i, load(from + i));
      if (i < length) store(to + i, load_some(from + i, length - i));
    }
    dot_all(rows, num_rows, panel, stride, stride, count, out + c, out_stride);
  }
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
