// Vectorized exp2 and tanh.
#pragma once

#include "simd/vec.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr float kLog2E = 1.44269504088896341F;

// Scalars. (std::exp(float) and its like are inline functions, which all instruction sets share.)
inline float exp_of(float x) { return __builtin_expf(x); }
inline float log_of(float x) { return __builtin_logf(x); }
inline bool is_nan(float x) { return __builtin_isnan(x); }

// Minimax polynomial of 2^f on [-1/2, 1/2], exact at 0; relative error 9e-8.
inline F32 exp2_of_fraction(F32 f) {
  F32 power = splat(1.326472690e-3F);
  power = power * f + 9.671512661e-3F;
  power = power * f + 5.550733744e-2F;
  power = power * f + 2.402224208e-1F;
  power = power * f + 6.931469776e-1F;
  return power * f + 1.0F;
}

// 2^x for x <= 0, and a little above; relative error below 2e-7. Below -126, where float32 has no
// normal numbers, 0 or nearly 0. NaN stays NaN.
inline F32 exp2_of(F32 x) {
#if defined(__AVX512F__)
  // The fraction of -infinity is NaN, which the last instruction turns into 0.
  const __m512 whole = _mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  const F32 power = exp2_of_fraction(x - reinterpret_cast<F32>(whole));
  return reinterpret_cast<F32>(_mm512_scalef_ps(reinterpret_cast<__m512>(power), whole));
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const F32 shifted = x + 0x1.8p23F;
  const F32 power = exp2_of_fraction(x - (shifted - 0x1.8p23F));
  // A product, not a sum of exponents: a NaN must stay one.
  const U32 exponent = (reinterpret_cast<U32>(shifted) << 23) + 0x3F800000U;
  const F32 value = power * reinterpret_cast<F32>(exponent);
  const I32 vanishes = x < -126.0F;
  return reinterpret_cast<F32>(~vanishes & reinterpret_cast<I32>(value));
#endif
}

// Rational approximation of Eigen (Eigen/src/Core/MathFunctionsImpl.h); error of a few ulp.
inline F32 tanh_of(F32 x) {
  const F32 bounded = x > 7.90531110763549805F    ? splat(7.90531110763549805F)
                      : x < -7.90531110763549805F ? splat(-7.90531110763549805F)
                                                  : x;
  const F32 square = bounded * bounded;
  F32 above = splat(-2.76076847742355e-16F);
  above = above * square + 2.00018790482477e-13F;
  above = above * square + -8.60467152213735e-11F;
  above = above * square + 5.12229709037114e-08F;
  above = above * square + 1.48572235717979e-05F;
  above = above * square + 6.37261928935756e-04F;
  above = above * square + 4.89352455891786e-03F;
  F32 below = splat(1.19825839466702e-06F);
  below = below * square + 1.18534705686654e-04F;
  below = below * square + 2.26843463243900e-03F;
  below = below * square + 4.89352518554385e-03F;
  return bounded * above / below;
}

}  // namespace polyhead::POLYHEAD_ISA
