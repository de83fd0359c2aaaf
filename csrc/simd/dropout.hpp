// Counter-based dropout: one random number per query head, query and key.
#pragma once

#include "simd/vec.hpp"

namespace polyhead::POLYHEAD_ISA {

inline uint64_t mix(uint64_t x) {  // splitmix64 (Steele, Lea and Flood 2014)
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// The dropout mask of one query. It depends on seed, head, query and key alone, so backward
// recomputes it and nothing is stored.
struct Dropout {
  uint32_t threshold;  // keep where the random number is at least this; never all are dropped
  float factor;        // 1 / (the fraction kept, after rounding of the threshold)
  uint64_t seed;

  explicit Dropout(const AttentionParams& a)
      : threshold(static_cast<uint32_t>(__builtin_fmin(a.dropout * 0x1p32 + 0.5, 0x1p32 - 1.0))),
        factor(static_cast<float>(0x1p32 / (0x1p32 - threshold))),
        seed(a.seed) {}

  uint64_t row_key(int64_t row) const { return mix(mix(seed) + static_cast<uint64_t>(row)); }

  // For keys s, s + 1, ...: all bits set where the weight is kept.
  I32 kept(uint64_t row, int64_t s) const {
    U32 x = reinterpret_cast<U32>(iota()) + static_cast<uint32_t>(s);
    x = x * 0x9E3779B9U + static_cast<uint32_t>(row);
    x = (x ^ (x >> 16)) *
        0x7FEB352DU;  // lowbias32 (Wellons 2018), the upper half of the row mixed in
    x = (x ^ (x >> 15)) ^ static_cast<uint32_t>(row >> 32);
    x = x * 0x846CA68BU;
    x ^= x >> 16;
    return reinterpret_cast<I32>(x >= threshold);
  }
};

}  // namespace polyhead::POLYHEAD_ISA
