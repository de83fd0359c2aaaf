// Peak arithmetic throughput of this processor: multiply-adds of registers, and nothing else.
#pragma once

#include "simd/buffer.hpp"
#include "tiles/tile.hpp"

namespace polyhead::POLYHEAD_ISA {

// The loop of one thread. `Element` is float, or BF16Pair where the processor has bf16 dot
// products.
template <class Element>
void multiply_add(int64_t steps) {
  constexpr int kSums = kTileRows * kTileVectors;  // the accumulators of a tile
  F32 sums[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = splat(static_cast<float>(i));
  F32 factor = splat(0.5F), addend = splat(0.25F);
  for (int64_t step = 0; step < steps; ++step) {
    keep_in_register(factor);  // or the compiler would fold some of the steps
    keep_in_register(addend);
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      if constexpr (Dot<Element>::kElementsPerStep == 1) {
        sums[i] = addend + sums[i] * factor;
      } else {
        sums[i] = Dot<Element>::add(sums[i], reinterpret_cast<U32>(factor),
                                    reinterpret_cast<U32>(addend));
      }
    }
  }
  F32 total{};
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) total += sums[i];
  [[maybe_unused]] volatile float needed = reduce_add(total);  // so nothing above is optimized away
}

// Runs `steps` on every thread; returns the number of additions and multiplications.
inline double multiply_add_everywhere(bool pairs, int64_t steps, int threads) {
  using MaybePair = std::conditional_t<kHasBF16Dot, BF16Pair, float>;
  pairs = pairs && kHasBF16Dot;
#pragma omp parallel num_threads(threads)
  pairs ? multiply_add<MaybePair>(steps) : multiply_add<float>(steps);
  const double per_step = 2.0 * kTileRows * kTileVectors * kLanes * (pairs ? 2 : 1);
  return per_step * static_cast<double>(steps) * threads;
}

}  // namespace polyhead::POLYHEAD_ISA
