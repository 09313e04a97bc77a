// Products with weights of 4 or 8 bits, laid out by `tramontane/kernels/packing.py`: 16 columns
// side by side, 4 numbers of each, so that one instruction multiplies 64 of them.
//
// Inputs are rounded to 8 bits in the same groups along the row. Sums within a group are whole
// numbers, exact in any order; the groups are added in fp32 in their order, for any number of rows.
#pragma once

#include "plain.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

constexpr int64_t kBlock = 16;                     // columns of a block
constexpr int kVectorsPerBlock = kBlock / kLanes;  // a vector holds one number per column

// An input of 8 bits: value = scale * q. A sum of products with q starts at minus the sum of q
// times the zero point of the weights, so that this need not be taken from each weight.
struct PackedRow {
  const int8_t* q;            // (M,)
  const float* scales;        // (M / group,)
  const int32_t* minus_sums;  // (M / group,) of q
};

static inline int64_t count_row_bytes(int64_t length, int64_t group) {
  return round_up(length + length / group * 8, 64);
}

static inline PackedRow locate_row(const char* memory, int64_t length, int64_t group) {
  const auto* scales = reinterpret_cast<const float*>(memory + length);
  return {reinterpret_cast<const int8_t*>(memory), scales,
          reinterpret_cast<const int32_t*>(scales + length / group)};
}

// Round one row of fp32 to 8 bits; the largest of a group becomes 127. A number that is not finite
// makes the scale of its group NaN, and so all outputs of the row.
static inline void pack_row(const float* x, int64_t length, int64_t group, char* memory) {
  const PackedRow row = locate_row(memory, length, group);
  auto* q = const_cast<int8_t*>(row.q);
  for (int64_t g = 0; g < length / group; ++g) {
    Vec largest = zero(), poison = zero();
    for (int64_t i = 0; i < group; i += kLanes) {
      const Vec v = load(x + g * group + i);
      largest = max(largest, max(v, sub(zero(), v)));
      poison = fma(v, zero(), poison);
    }
    const float scale = max_lanes(largest) / 127.0f + sum_lanes(poison);
    const Vec divisor = splat(scale);
    Vec total = zero();  // of whole numbers: exact
    for (int64_t i = g * group; i < (g + 1) * group; i += kLanes) {
      // A scale that is no normal number is itself rounded so far that quotients exceed 127.
      const Vec quotient = min(splat(127.0f), max(splat(-127.0f), div(load(x + i), divisor)));
      const Vec rounded = scale > 0 ? round(quotient) : zero();
      store_bytes(q + i, rounded);
      total = add(total, rounded);
    }
    const_cast<float*>(row.scales)[g] = scale;
    const_cast<int32_t*>(row.minus_sums)[g] = -static_cast<int32_t>(sum_lanes(total));
  }
}

// The zero point of weights without zero points of their own is this power of two.
template <int kBits>
constexpr int kZeroShift = kBits - 1;

// kLanes sums of whole numbers, and how to add the products of 4 weights with 4 inputs to each.
template <int kBits>
struct Sums;

#if defined(__AVX512F__)

template <int kBits>
struct Sums {
  __m512i total;

  void start(const int32_t* minus_sum) {
    total = _mm512_slli_epi32(_mm512_set1_epi32(*minus_sum), kZeroShift<kBits>);
  }
  void start(const int32_t* minus_sum, const uint8_t* zeros) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros));
    total = _mm512_mullo_epi32(wide, _mm512_set1_epi32(*minus_sum));
  }
  Vec finish() const { return _mm512_cvtepi32_ps(total); }
};
struct Bytes {
  __m512i at;
};
struct Input {
  __m512i at;
};
static inline Bytes load_bytes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
static inline Bytes low_nibbles(Bytes b) { return {_mm512_and_si512(b.at, _mm512_set1_epi8(15))}; }
static inline Bytes high_nibbles(Bytes b) {
  return {_mm512_and_si512(_mm512_srli_epi16(b.at, 4), _mm512_set1_epi8(15))};
}
static inline Input load_input(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return {_mm512_set1_epi32(four)};
}
template <int kBits>
static inline void add_products(Sums<kBits>& sums, Bytes weights, Input x) {
  sums.total = _mm512_dpbusd_epi32(sums.total, weights.at, x.at);
}

#elif defined(__AVX2__)

static inline __m256i minus_zeros(const uint8_t* zeros, int32_t minus_sum) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)zeros));
  return _mm256_mullo_epi32(wide, _mm256_set1_epi32(minus_sum));
}
struct Bytes {
  __m256i at;
};
struct Input {
  __m256i at;
};
template <>
struct Sums<4> {
  __m256i total;

  void start(const int32_t* minus_sum) {
    total = _mm256_slli_epi32(_mm256_set1_epi32(*minus_sum), kZeroShift<4>);
  }
  void start(const int32_t* minus_sum, const uint8_t* zeros) {
    total = minus_zeros(zeros, *minus_sum);
  }
  Vec finish() const { return _mm256_cvtepi32_ps(total); }
};
// Products of 8 bits with 8 would overflow the 16 bits of the one instruction that adds pairs of
// them: they are widened, and each column has two sums until the end of a group.
template <>
struct Sums<8> {
  __m256i base, low, high;

  void start_at(__m256i value) { base = value, low = high = _mm256_setzero_si256(); }
  void start(const int32_t* minus_sum) {
    start_at(_mm256_slli_epi32(_mm256_set1_epi32(*minus_sum), kZeroShift<8>));
  }
  void start(const int32_t* minus_sum, const uint8_t* zeros) {
    start_at(minus_zeros(zeros, *minus_sum));
  }
  Vec finish() const {
    const __m256i joined = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    return _mm256_cvtepi32_ps(_mm256_add_epi32(base, joined));
  }
};
static inline Bytes load_bytes(const uint8_t* from) {
  return {_mm256_loadu_si256((const __m256i*)from)};
}
static inline Bytes low_nibbles(Bytes b) { return {_mm256_and_si256(b.at, _mm256_set1_epi8(15))}; }
static inline Bytes high_nibbles(Bytes b) {
  return {_mm256_and_si256(_mm256_srli_epi16(b.at, 4), _mm256_set1_epi8(15))};
}
static inline Input load_input(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return {_mm256_set1_epi32(four)};
}
static inline void add_products(Sums<4>& sums, Bytes weights, Input x) {
  const __m256i pairs = _mm256_maddubs_epi16(weights.at, x.at);  // at most 2 * 15 * 127
  sums.total = _mm256_add_epi32(sums.total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline void add_products(Sums<8>& sums, Bytes weights, Input x) {
  const __m256i wide_x = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x.at));
  const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(weights.at));
  const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(weights.at, 1));
  sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(low, wide_x));
  sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(high, wide_x));
}

#else

template <int kBits>
struct Sums {
  int32_t total[kLanes];

  void start(const int32_t* minus_sum) {
    for (int32_t& sum : total) sum = *minus_sum * (1 << kZeroShift<kBits>);
  }
  void start(const int32_t* minus_sum, const uint8_t* zeros) {
    for (int i = 0; i < kLanes; ++i) total[i] = zeros[i] * *minus_sum;
  }
  Vec finish() const {
    return each_lane([&](int i) { return static_cast<float>(total[i]); });
  }
};
struct Bytes {
  uint8_t at[kLanes * 4];
};
struct Input {
  int8_t at[4];
};
static inline Bytes load_bytes(const uint8_t* from) {
  Bytes b;
  std::memcpy(b.at, from, sizeof b.at);
  return b;
}
static inline Bytes low_nibbles(Bytes b) {
  for (uint8_t& byte : b.at) byte &= 15;
  return b;
}
static inline Bytes high_nibbles(Bytes b) {
  for (uint8_t& byte : b.at) byte >>= 4;
  return b;
}
static inline Input load_input(const int8_t* from) {
  Input x;
  std::memcpy(x.at, from, 4);
  return x;
}
template <int kBits>
static inline void add_products(Sums<kBits>& sums, Bytes weights, Input x) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) sums.total[i] += weights.at[4 * i + j] * x.at[j];
}

#endif

// Where the weights of a matrix of a stack begin, and how far its parts are from one another.
struct PackedMatrix {
  const uint8_t* weights;
  const uint16_t* scales;
  const uint8_t* zeros;
  int64_t length, group, block_bytes, num_groups;
};

static inline PackedMatrix locate_matrix(const Weight& weight, int64_t expert) {
  const int64_t length = weight.num_columns, num_groups = length / weight.group;
  const int64_t num_blocks = round_up(weight.num_rows, kBlock) / kBlock;
  const int64_t block_bytes = length * kBlock * weight.bits / 8;
  const int64_t scales = expert * num_blocks * num_groups * kBlock;
  return {static_cast<const uint8_t*>(weight.data) + expert * num_blocks * block_bytes,
          weight.scales + scales,
          weight.zeros == nullptr ? nullptr : weight.zeros + scales,
          length,
          weight.group,
          block_bytes,
          num_groups};
}

// R rows by C vectors of columns, from vector `first` on.
template <int R, int C, int kBits>
static void packed_tile(const PackedRow* rows, const PackedMatrix& m, int64_t first, Vec* out) {
  constexpr int64_t kStep = kBits == 4 ? 8 : 4;  // inputs that 4 bytes of a column meet
  const uint8_t* weights[C];
  const uint16_t* scales[C];
  const uint8_t* zeros[C];
  const int8_t* q[R];
  for (int c = 0; c < C; ++c) {
    const int64_t block = (first + c) / kVectorsPerBlock, part = (first + c) % kVectorsPerBlock;
    const int64_t scale = block * m.num_groups * kBlock + part * kLanes;
    weights[c] = m.weights + block * m.block_bytes + part * kLanes * 4;
    scales[c] = m.scales + scale;
    zeros[c] = m.zeros == nullptr ? nullptr : m.zeros + scale;
  }
  Vec totals[R][C];
  for (int r = 0; r < R; ++r) {
    q[r] = rows[r].q;
    for (int c = 0; c < C; ++c) totals[r][c] = zero();
  }
  const int64_t num_steps = m.group / kStep;
  for (int64_t g = 0; g < m.num_groups; ++g) {
    Sums<kBits> sums[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        if (m.zeros == nullptr) sums[r][c].start(rows[r].minus_sums + g);
        else sums[r][c].start(rows[r].minus_sums + g, zeros[c] + g * kBlock);
      }
    }
#pragma GCC unroll 4
    for (int64_t step = 0; step < num_steps; ++step) {
      Bytes bytes[C];
      for (int c = 0; c < C; ++c) bytes[c] = load_bytes(weights[c] + step * kBlock * 4);
      if (kBits == 8) {
        for (int r = 0; r < R; ++r) {
          const Input x = load_input(q[r] + step * kStep);
          for (int c = 0; c < C; ++c) add_products(sums[r][c], bytes[c], x);
        }
      } else {
        Bytes low[C], high[C];
        for (int c = 0; c < C; ++c)
          low[c] = low_nibbles(bytes[c]), high[c] = high_nibbles(bytes[c]);
        for (int r = 0; r < R; ++r) {
          const Input x = load_input(q[r] + step * kStep);
          for (int c = 0; c < C; ++c) add_products(sums[r][c], low[c], x);
        }
        for (int r = 0; r < R; ++r) {
          const Input x = load_input(q[r] + step * kStep + 4);
          for (int c = 0; c < C; ++c) add_products(sums[r][c], high[c], x);
        }
      }
    }
    for (int c = 0; c < C; ++c) weights[c] += num_steps * kBlock * 4;
    for (int r = 0; r < R; ++r) q[r] += m.group;
    for (int c = 0; c < C; ++c) {
      const Vec scale = load_half(scales[c] + g * kBlock);
      for (int r = 0; r < R; ++r)
        totals[r][c] = fma(mul(scale, splat(rows[r].scales[g])), sums[r][c].finish(), totals[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * C + c] = totals[r][c];
}

template <int R, int C, int kBits>
static void packed_columns(const PackedRow* rows, const PackedMatrix& m, int64_t begin, int64_t end,
                           float* out, int64_t out_stride) {
  for (int64_t column = begin; column < end; column += C * kLanes) {
    Vec tile[R * C];
    int64_t num_vectors = (end - column + kLanes - 1) / kLanes;
    if (num_vectors >= C) {
      num_vectors = C;
      packed_tile<R, C, kBits>(rows, m, column / kLanes, tile);
    } else {
      for (int64_t v = 0; v < num_vectors; ++v) {
        Vec single[R];
        packed_tile<R, 1, kBits>(rows, m, column / kLanes + v, single);
        for (int r = 0; r < R; ++r) tile[r * C + v] = single[r];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t v = 0; v < num_vectors; ++v) {
        const int64_t at = column + v * kLanes, count = end - at < kLanes ? end - at : kLanes;
        float* to = out + r * out_stride + at - begin;
        if (count == kLanes) store(to, tile[r * C + v]);
        else store_some(to, tile[r * C + v], count);
      }
    }
  }
}

template <int kBits>
static void packed_all(const PackedRow* rows, int64_t num_rows, const PackedMatrix& m,
                       int64_t begin, int64_t end, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  constexpr int kRows = 6, kColumns = 2,
                kColumnsOfOne = 4;  // 12 sums and 12 totals of 32 registers
#else
  constexpr int kRows = 2, kColumns = 2, kColumnsOfOne = 2;
#endif
  int64_t r = 0;
  for (; r + kRows <= num_rows; r += kRows)
    packed_columns<kRows, kColumns, kBits>(rows + r, m, begin, end, out + r * out_stride,
                                           out_stride);
#if defined(__AVX512F__)
  for (; r + 4 <= num_rows; r += 4)
    packed_columns<4, kColumns, kBits>(rows + r, m, begin, end, out + r * out_stride, out_stride);
#endif
  const int64_t rest = num_rows - r;
  float* const to = out + r * out_stride;
  if (rest == 1) packed_columns<1, kColumnsOfOne, kBits>(rows + r, m, begin, end, to, out_stride);
#if defined(__AVX512F__)
  if (rest == 2) packed_columns<2, kColumns, kBits>(rows + r, m, begin, end, to, out_stride);
  if (rest == 3) packed_columns<3, kColumns, kBits>(rows + r, m, begin, end, to, out_stride);
#endif
}

// out[r][c] = rows[r] . column c for the columns begin .. end; `begin` is a multiple of 16.
static inline void multiply_packed(const PackedRow* rows, int64_t num_rows, const Weight& weight,
                                   int64_t expert, int64_t begin, int64_t end, float* out,
                                   int64_t out_stride) {
  const PackedMatrix m = locate_matrix(weight, expert);
  if (weight.bits == 4) packed_all<4>(rows, num_rows, m, begin, end, out, out_stride);
  else packed_all<8>(rows, num_rows, m, begin, end, out, out_stride);
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
