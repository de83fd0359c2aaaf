// The most that this processor's arithmetic can do: multiply-adds of registers, and nothing else.
#pragma once

#include "buffer.hpp"
#include "tile.hpp"

namespace polyhead::POLYHEAD_ISA {

// One thread's share. `Element` is float, or Pair where the processor has products of bfloat16.
template <class Element>
void multiply_add(int64_t steps) {
  constexpr int kSums = kTileRows * kTileVectors;  // as many as a tile keeps
  F32 sums[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = all(static_cast<float>(i));
  F32 factor = all(0.5F), number = all(0.25F);
  for (int64_t step = 0; step < steps; ++step) {
    hold(factor);  // or the compiler would count some of the steps in advance
    hold(number);
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      if constexpr (Step<Element>::kDepth == 1) {
        sums[i] = number + sums[i] * factor;
      } else {
        sums[i] = Step<Element>::add(sums[i], reinterpret_cast<U32>(factor),
                                     reinterpret_cast<U32>(number));
      }
    }
  }
  F32 total{};
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) total += sums[i];
  [[maybe_unused]] volatile float needed = sum(total);  // so nothing above is left out
}

// Runs `steps` on every thread; returns how many additions and multiplications these were.
inline double multiply_add_everywhere(bool pairs, int64_t steps, int threads) {
  using Half = std::conditional_t<kHasPairs, Pair, float>;
  pairs = pairs && kHasPairs;
#pragma omp parallel num_threads(threads)
  pairs ? multiply_add<Half>(steps) : multiply_add<float>(steps);
  const double a_step = 2.0 * kTileRows * kTileVectors * kLanes * (pairs ? 2 : 1);
  return a_step * static_cast<double>(steps) * threads;
}

}  // namespace polyhead::POLYHEAD_ISA
