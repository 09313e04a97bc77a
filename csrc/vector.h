// Vectors of the instruction set that this file is compiled for: `kLanes` floats in a register.
//
// Everything lies in a namespace of its own per instruction set, and nothing here is a template of
// the standard library: a function of the same name in two objects is kept once by the linker, and
// the copy with AVX-512 must not be the one that a small machine runs.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

static inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To nearest, ties to even, as torch rounds; NaN stays NaN.
static inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;  // no branch: compilers make vectors of it
  return static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

static inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const uint32_t wide = exponent == 31 ? 0x7f800000 | (fraction << 13)
                                         : ((exponent + 112) << 23) | (fraction << 13);
    std::memcpy(&value, &wide, sizeof value);
  }
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  wide |= sign;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec splat(float value) { return _mm512_set1_ps(value); }
static inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
static inline Vec load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline Vec load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
static inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
static inline void store_bytes(int8_t* to, Vec v) {  // whole numbers from -128 to 127
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Vec scale_by_power(Vec a, Vec exponent) { return _mm512_scalef_ps(a, exponent); }
// v where x >= least, 0 elsewhere: where x is NaN, too.
static inline Vec keep_at_least(Vec v, Vec x, Vec least) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), v);
}

#if defined(__AVX512BF16__)
constexpr bool kHasHalfDots = true;  // of bf16 with bf16, in pairs, added up in fp32
constexpr int kHalfLanes = 32;
using HalfVec = __m512bh;

static inline HalfVec load_halves(const uint16_t* from) {
  return (HalfVec)_mm512_loadu_si512(from);
}
// Each lane of c plus two products; numbers below 2^-126 count as zero.
static inline Vec add_pairs(HalfVec a, HalfVec b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
#endif

static inline __m256 fold(Vec v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
static inline Vec interleave_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
static inline Vec interleave_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
static inline Vec join_low(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0x44); }
static inline Vec join_high(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0xee); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;

static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec splat(float value) { return _mm256_set1_ps(value); }
static inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
static inline Vec load(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Vec load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
static inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
static inline void store_bytes(int8_t* to, Vec v) {
  const __m256i wide = _mm256_cvtps_epi32(v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
}
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Vec keep_at_least(Vec v, Vec x, Vec least) {
  return _mm256_and_ps(v, _mm256_cmp_ps(x, least, _CMP_GE_OQ));
}
// `exponent` holds whole numbers from -126 to 127.
static inline Vec scale_by_power(Vec a, Vec exponent) {
  const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
}

static inline __m256 fold(Vec v) { return v; }
static inline Vec interleave_low(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
static inline Vec interleave_high(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
static inline Vec join_low(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0x44); }
static inline Vec join_high(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0xee); }

#else

constexpr int kLanes = 4;
struct Vec {
  float at[kLanes];
};

template <class Function>
static inline Vec each_lane(Function function) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.at[i] = function(i);
  return v;
}
static inline Vec zero() { return Vec{}; }
static inline Vec splat(float value) {
  return each_lane([=](int) { return value; });
}
static inline Vec load(const float* from) {
  return each_lane([=](int i) { return from[i]; });
}
static inline Vec load(const uint16_t* from) {
  return each_lane([=](int i) { return bf16_to_float(from[i]); });
}
static inline Vec load_half(const uint16_t* from) {
  return each_lane([=](int i) { return half_to_float(from[i]); });
}
static inline void store(float* to, Vec v) { std::memcpy(to, v.at, sizeof v.at); }
static inline void store_bytes(int8_t* to, Vec v) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(v.at[i]);
}
static inline Vec add(Vec a, Vec b) {
  return each_lane([&](int i) { return a.at[i] + b.at[i]; });
}
static inline Vec sub(Vec a, Vec b) {
  return each_lane([&](int i) { return a.at[i] - b.at[i]; });
}
static inline Vec mul(Vec a, Vec b) {
  return each_lane([&](int i) { return a.at[i] * b.at[i]; });
}
static inline Vec div(Vec a, Vec b) {
  return each_lane([&](int i) { return a.at[i] / b.at[i]; });
}
static inline Vec max(Vec a, Vec b) {
  return each_lane([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
static inline Vec min(Vec a, Vec b) {
  return each_lane([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return each_lane([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
static inline Vec round(Vec a) {
  return each_lane([&](int i) { return nearbyintf(a.at[i]); });
}
static inline Vec keep_at_least(Vec v, Vec x, Vec least) {
  return each_lane([&](int i) { return x.at[i] >= least.at[i] ? v.at[i] : 0.0f; });
}
static inline Vec scale_by_power(Vec a, Vec exponent) {
  return each_lane([&](int i) {
    const float n = exponent.at[i];
    return n == n ? ldexpf(a.at[i], static_cast<int>(n)) : n;
  });
}

#endif

#if !defined(__AVX512BF16__)
constexpr bool kHasHalfDots = false;
#endif

// The first `count` of a vector's floats, the rest zero: reads nothing beyond them.
template <class Value>
static inline Vec load_some(const Value* from, int64_t count) {
  Value padded[kLanes] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(Value));
  return load(padded);
}
static inline void store_some(float* to, Vec v, int64_t count) {
  float padded[kLanes];
  store(padded, v);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(float));
}

// The sums of the lanes of four vectors. Every sum is ((0+2)+(1+3)) of each four lanes, then of
// those fours in a fixed order, whichever of the four vectors it is: its bits do not depend on its
// place.
static inline void sum_lanes(Vec a, Vec b, Vec c, Vec d, float* out) {
#if defined(__AVX2__)
  const Vec ab = add(interleave_low(a, b), interleave_high(a, b));
  const Vec cd = add(interleave_low(c, d), interleave_high(c, d));
  const __m256 quarters = fold(add(join_low(ab, cd), join_high(ab, cd)));
  const __m128 low = _mm256_castps256_ps128(quarters), high = _mm256_extractf128_ps(quarters, 1);
  _mm_storeu_ps(out, _mm_add_ps(low, high));
#else
  const Vec* all[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    const float* at = all[i]->at;
    out[i] = (at[0] + at[2]) + (at[1] + at[3]);
  }
#endif
}

static inline float sum_lanes(Vec v) {
  float out[4];
  sum_lanes(v, v, v, v, out);
  return out[0];
}

static inline float max_lanes(Vec v) {
  float at[kLanes], best;
  store(at, v);
  best = at[0];
  for (int i = 1; i < kLanes; ++i) best = at[i] > best ? at[i] : best;
  return best;
}

// e^x within 2 units in the last place, for x from -87 to 88; beyond, the value at that end. Of two
// numbers, `max` and `min` return the second if one is NaN: NaN stays NaN.
static inline Vec exp(Vec x) {
  const Vec clamped = min(splat(88.0f), max(splat(-87.0f), x));
  const Vec n = round(mul(clamped, splat(1.44269504088896341f)));
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);  // Cephes' polynomial for expf
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const Vec y = add(fma(mul(r, r), p, r), splat(1.0f));
  return scale_by_power(y, n);
}

// 1 / (1 + e^-x)
static inline Vec sigmoid(Vec x) {
  return div(splat(1.0f), add(splat(1.0f), exp(sub(zero(), x))));
}

// x / (1 + e^-x); `exp` stops growing at 88, and so does x there.
static inline Vec silu(Vec x) {
  return div(max(splat(-88.0f), x), add(splat(1.0f), exp(sub(zero(), x))));
}

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane
