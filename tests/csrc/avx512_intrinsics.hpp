// Emulation of the AVX-512 intrinsics that csrc/ uses, after the pseudo-code of Intel's Intrinsics
// Guide, so that the AVX-512 code runs on any processor with AVX2 and F16C. Include it first.
#pragma once

#include <immintrin.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#define POLYHEAD_EMULATE_AVX512
#define __AVX512F__ 1

namespace emulated {

// The halves of a vector.
struct F32x8x2 {
  __m256 low, high;
};
struct U16x8x2 {
  __m128i low, high;
};
using U16x16 = std::array<uint16_t, 16>;
using U16x32 = std::array<uint16_t, 32>;
using F32x16 = std::array<float, 16>;

inline __m512i cvtepu16_epi32(__m256i a) {
  std::array<uint32_t, 16> wide;
  for (int i = 0; i < 16; ++i) wide[i] = std::bit_cast<U16x16>(a)[i];
  return std::bit_cast<__m512i>(wide);
}

inline __m512i cvtepi8_epi32(__m128i a) {
  std::array<int32_t, 16> wide;
  for (int i = 0; i < 16; ++i) wide[i] = std::bit_cast<std::array<int8_t, 16>>(a)[i];
  return std::bit_cast<__m512i>(wide);
}

inline __m512 cvtph_ps(__m256i a) {
  const auto [low, high] = std::bit_cast<U16x8x2>(a);
  return std::bit_cast<__m512>(F32x8x2{_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)});
}

template <int kRounding>
inline __m256i cvtps_ph(__m512 a) {
  const auto [low, high] = std::bit_cast<F32x8x2>(a);
  return std::bit_cast<__m256i>(
      U16x8x2{_mm256_cvtps_ph(low, kRounding), _mm256_cvtps_ph(high, kRounding)});
}

template <class Function>
inline __m512 each(__m512 a, __m512 b, Function&& function) {
  F32x16 results;
  for (int i = 0; i < 16; ++i)
    results[i] = function(std::bit_cast<F32x16>(a)[i], std::bit_cast<F32x16>(b)[i]);
  return std::bit_cast<__m512>(results);
}

// Rounds to an integer; only round to nearest, ties to even, is used.
inline __m512 roundscale_ps(__m512 a, int) {
  return each(a, a, [](float x, float) { return std::nearbyint(x); });
}

// x * 2^floor(y); 0 if y is -infinity, even if x is NaN.
inline __m512 scalef_ps(__m512 a, __m512 b) {
  return each(a, b, [](float x, float y) {
    if (std::isinf(y)) return y < 0 ? 0.0F : x == 0.0F ? std::nanf("") : y;
    if (std::isnan(x) || std::isnan(y)) return std::nanf("");
    return std::ldexp(x, static_cast<int>(std::fmax(std::fmin(std::floor(y), 4e3F), -4e3F)));
  });
}

#if defined(POLYHEAD_EMULATE_BF16)
// The instructions of AVX512_BF16 flush subnormal inputs and results to 0.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0F, x) : x;
}

inline __m256bh cvtneps_pbh(__m512 a) {
  U16x16 narrow;
  for (int i = 0; i < 16; ++i) {
    const float x = flushed(std::bit_cast<F32x16>(a)[i]);
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = std::isnan(x) ? bits | 0x400000 : bits + 0x7FFF + ((bits >> 16) & 1);
    narrow[i] = static_cast<uint16_t>(rounded >> 16);
  }
  return std::bit_cast<__m256bh>(narrow);
}

inline __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  auto totals = std::bit_cast<F32x16>(sums);
  const auto number = [](__m512bh from, int i) {
    return flushed(std::bit_cast<float>(uint32_t{std::bit_cast<U16x32>(from)[i]} << 16));
  };
  for (int i = 0; i < 16; ++i)
    for (int j : {2 * i + 1, 2 * i})
      totals[i] = flushed(std::fma(number(a, j), number(b, j), flushed(totals[i])));
  return std::bit_cast<__m512>(totals);
}

#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#endif

}  // namespace emulated

#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph<rounding>(a)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef_ps
