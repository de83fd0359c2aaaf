// exp2, tanh and a random number, a vector at a time.
#pragma once

#include "simd/vec.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.693147180559945309F;

// The polynomial nearest to 2^f on [-1/2, 1/2] in relative error, 9e-8, that is exact at 0.
inline F32 exp2_of_fraction(F32 f) {
  F32 power = splat(1.326472690e-3F);
  power = power * f + 9.671512661e-3F;
  power = power * f + 5.550733744e-2F;
  power = power * f + 2.402224208e-1F;
  power = power * f + 6.931469776e-1F;
  return power * f + 1.0F;
}

// 2 to the power of x for x <= 0, and a little above; relative error under 2e-7. Below -126, where
// float32 has no more normal numbers, it is 0, or nearly. NaN stays NaN.
inline F32 exp2_of(F32 x) {
#if defined(__AVX512F__)
  // Of -infinity the fraction is NaN, which the last instruction turns into 0.
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

// The rational function of Eigen (Eigen/src/Core/MathFunctionsImpl.h); error of a few units in
// the last place.
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

inline uint64_t mix(uint64_t x) {  // splitmix64 (Steele, Lea and Flood 2014)
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// Which weights of one query dropout keeps. Counter-based: the answer depends on the seed, the
// head, the query and the key alone, so backward asks again and nothing is stored.
struct Dropout {
  uint32_t threshold;  // keep where the random number is at least this: some are always kept
  float factor;        // what is kept grows by it: by the share really kept, however small
  uint64_t seed;

  explicit Dropout(const AttentionParams& a)
      : threshold(static_cast<uint32_t>(__builtin_fmin(a.dropout * 0x1p32 + 0.5, 0x1p32 - 1.0))),
        factor(static_cast<float>(0x1p32 / (0x1p32 - threshold))),
        seed(a.seed) {}

  uint64_t row_key(int64_t row) const { return mix(mix(seed) + static_cast<uint64_t>(row)); }

  // For keys s, s + 1, ...: all bits set where kept.
  I32 kept(uint64_t row, int64_t s) const {
    U32 x = reinterpret_cast<U32>(iota()) + static_cast<uint32_t>(s);
    x = x * 0x9E3779B9U + static_cast<uint32_t>(row);
    x = (x ^ (x >> 16)) * 0x7FEB352DU;  // lowbias32 (Wellons 2018), the row's other half between
    x = (x ^ (x >> 15)) ^ static_cast<uint32_t>(row >> 32);
    x = x * 0x846CA68BU;
    x ^= x >> 16;
    return reinterpret_cast<I32>(x >= threshold);
  }
};

}  // namespace polyhead::POLYHEAD_ISA
