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
    const int64_t keys = most_keys(a), queries_ = most_queries(a);
    const auto take = [&](auto*& taken, int64_t size) {
      taken = reinterpret_cast<std::remove_reference_t<decltype(taken)>>(scratch);
      scratch += size;
    };
    take(key_columns, keys * size_d);
    take(key_steps, keys * size_d);
    take(key_grad, keys * size_d);
    take(value_columns, keys * size_e);
    take(value_grad, keys * size_e);
    take(queries, queries_ * size_d);
    take(query_grad, queries_ * size_d);
    take(grads, queries_ * size_e);
    take(weights, queries_ * kGradStride);
    take(scores, queries_ * kGradStride);
    take(capped, kGradStride);
    if constexpr (kElementsPerStep == 1) {
      // float32 rows serve both as lhs and as steps of rhs.
      query_steps = queries, grad_steps = grads;
      weight_steps = weights, score_steps = scores;
    } else {
      take(query_steps, queries_ / kElementsPerStep * size_d);
      take(grad_steps, queries_ / kElementsPerStep * size_e);
      take(weight_steps, queries_ / kElementsPerStep * kGradStride);
      take(score_steps, queries_ / kElementsPerStep * kGradStride);
    }
  }

  // Its size in floats: no larger than the call needs, as malloc returns large memory to the
  // system.
  static int64_t size(const AttentionParams& a) {
    const int64_t row = 3 * round_up(a.D, kLanes) + 2 * round_up(a.E, kLanes);
    const int64_t queries = most_queries(a);
    return (most_keys(a) + queries) * row + 3 * queries * kGradStride + kGradStride;
  }

 private:
  // Keys and queries of the largest block, in whole tiles, panels and pairs.
  static int64_t most_keys(const AttentionParams& a) {
    return min(kGradKeys, round_up(round_up(a.S, kTileRows), kPanel));
  }
  static int64_t most_queries(const AttentionParams& a) {
    return min(kGradQueries, round_up(a.T, kTileRows));
  }
};

}  // namespace polyhead::POLYHEAD_ISA
