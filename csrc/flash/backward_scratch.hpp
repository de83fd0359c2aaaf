// Scratchpad of one thread of backward (block sizes: tuning.hpp).
#pragma once

#include <type_traits>

#include "tiles/tile.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kGradStride =
    kGradKeys + 16;  // no power of 2: rows fall into different cache sets
constexpr int64_t kGradTiles = kGradQueries / kTileRows;

template <class Element>
struct BackwardScratch {
  static constexpr int kElementsPerStep = Dot<Element>::kElementsPerStep;
  using Weight = std::conditional_t<kElementsPerStep == 1, float, BFloat16>;  // element of P and dS

  Element *key_columns, *value_columns;  // a block of keys, packed for scores
  Element* key_steps;                    // the same keys, packed for dQ
  float *key_grad, *value_grad;          // their gradients
  Element *queries, *grads;              // a block of queries, and of the output's gradient
  Element *query_steps, *grad_steps;     // the same, packed for dK and dV
  float* query_grad;
  float *weights, *scores;  // P after dropout, and dP, which becomes scale * dS; as Weight
  Element *weight_steps, *score_steps;  // the same, packed for dK and dV
  float* capped;                        // one row of scores after softcap
  float* bias = nullptr;                // accumulates the gradient of the bias

  BackwardScratch(const AttentionParams& a, float* scratch) {
    const int64_t size_d = round_up(a.D, kLanes), size_e = round_up(a.E, kLanes);
    const auto take = [&](auto*& taken, int64_t size) {
      taken = reinterpret_cast<std::remove_reference_t<decltype(taken)>>(scratch);
      scratch += size;
    };
    take(key_columns, kGradKeys * size_d);
    take(key_steps, kGradKeys * size_d);
    take(key_grad, kGradKeys * size_d);
    take(value_columns, kGradKeys * size_e);
    take(value_grad, kGradKeys * size_e);
    take(queries, kGradQueries * size_d);
    take(query_grad, kGradQueries * size_d);
    take(grads, kGradQueries * size_e);
    take(weights, kGradQueries * kGradStride);
    take(scores, kGradQueries * kGradStride);
    take(capped, kGradStride);
    if constexpr (kElementsPerStep == 1) {
      // float32 rows serve both as lhs and as steps of rhs.
      query_steps = queries, grad_steps = grads;
      weight_steps = weights, score_steps = scores;
    } else {
      take(query_steps, kGradQueries / kElementsPerStep * size_d);
      take(grad_steps, kGradQueries / kElementsPerStep * size_e);
      take(weight_steps, kGradQueries / kElementsPerStep * kGradStride);
      take(score_steps, kGradQueries / kElementsPerStep * kGradStride);
    }
  }

  // Its size in floats.
  static int64_t size(const AttentionParams& a) {
    const int64_t row = 3 * round_up(a.D, kLanes) + 2 * round_up(a.E, kLanes);
    return (kGradKeys + kGradQueries) * row + 3 * kGradQueries * kGradStride + kGradStride;
  }
};

}  // namespace polyhead::POLYHEAD_ISA
