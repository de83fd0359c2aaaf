// Online softmax (Milakov and Gimelshein 2018): the running state of one query over blocks of keys,
// and what follows from it: the row's factor, its lse, and its statistics.
#pragma once

#include "flash/scores.hpp"
#include "simd/dropout.hpp"
#include "tiles/tile.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Running state of the online softmax of one row: sums over the keys so far, relative to their max.
struct SoftmaxState {
  float row_max = -kInfinity;  // the largest score
  float row_sum = 0.0F;        // of exp(score - row_max)
  // For statistics only:
  float scores = 0.0F;    // of exp(score - row_max) * (score - row_max)
  float distance = 0.0F;  // of exp(score - row_max) * |query position - key position|
  float first = -kInfinity, previous = -kInfinity, self = -kInfinity;  // scores of these keys

  // Rescales the sums to a new max; returns the factor for the accumulator of the row.
  float rescale_to(float new_max) {
    if (new_max == row_max) return 1.0F;
    const float factor = exp2_of(splat((row_max - new_max) * kLog2E))[0];
    // (Between the lowest float32 and any other score the sum overflows: 0 * infinity were NaN.)
    scores = factor == 0.0F ? 0.0F : factor * (scores + row_sum * (row_max - new_max));
    row_sum *= factor;
    distance *= factor;
    row_max = new_max;
    return factor;
  }

  // Adds the sums over other keys, relative to the same max.
  void merge(const SoftmaxState& other) {
    row_sum += other.row_sum;
    scores += other.scores;
    distance += other.distance;
    first = first > other.first ? first : other.first;  // one of the two is -inf
    previous = previous > other.previous ? previous : other.previous;
    self = self > other.self ? self : other.self;
  }
};

inline float max_of(const float* z, int64_t n) {
  F32 a = splat(-kInfinity), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = max(load(z + i), a);
    b = max(load(z + i + kLanes), b);
  }
  if (i < n) a = max(load(z + i), a);
  return reduce_max(max(a, b));
}

inline bool any_nan(const float* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (is_nan(z[i])) return true;
  return false;
}

inline void record_key_scores(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                              const float* z, SoftmaxState& row) {
  const auto record = [&](int64_t s, float& score) {
    if (begin <= s && s < min(end, a.S)) score = z[s - begin];
  };
  record(0, row.first);
  record(a.position(q.b, q.t) - 1, row.previous);
  record(a.position(q.b, q.t), row.self);
}

// Turns the scores of keys [begin, end) into weights exp(score - row_max) in place, as an lhs of
// Elements; returns the factor that rescales the accumulator of the row.
template <bool kStats, class Element>
inline float online_softmax(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                            float* z, SoftmaxState& row) {
  const int64_t n = end - begin;
  if constexpr (kStats) record_key_scores(a, q, begin, end, z, row);
  const float block_max = max_of(z, n);
  const float row_max = block_max > row.row_max ? block_max : row.row_max;
  if (row_max == -kInfinity) {
    // No key to attend to, or nothing but NaN, which row_sum then carries to the output.
    if (any_nan(z, n)) row = {.row_max = 0.0F, .row_sum = kNaN};
    std::memset(z, 0, static_cast<size_t>(n) * sizeof(float));
    return 1.0F;
  }
  const float factor = row.rescale_to(row_max);
  const bool drops = a.dropout > 0.0;
  const Dropout dropout(a);
  const uint64_t row_key = drops ? dropout.row_key((q.b * a.H + q.h) * a.T + q.t) : 0;
  F32 sum{}, scores{}, distance{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 below = load(z + i) - row_max;
    F32 weight = exp2_of(below * kLog2E);
    sum += weight;
    if constexpr (kStats) {
      // 0 * -inf is NaN, and forbidden keys contribute 0.
      scores += weight * select(weight == 0.0F, F32{}, below);
      const I32 ahead = iota() + static_cast<int32_t>(begin + i - a.position(q.b, q.t));
      distance += weight * __builtin_convertvector(ahead < 0 ? -ahead : ahead, F32);
    }
    if (drops) weight = select(dropout.kept(row_key, begin + i), weight, F32{});
    if constexpr (Dot<Element>::kElementsPerStep == 1) {
      store(z + i, weight);
    } else {
      store_as(reinterpret_cast<char*>(z) + i * 2, round_to_bf16(weight));
    }
  }
  row.row_sum += reduce_add(sum);
  if constexpr (kStats) {
    row.scores += reduce_add(scores);
    row.distance += reduce_add(distance);
  }
  return factor;
}

// Final scaling of a row, after its last key.
struct RowResult {
  float factor;   // output = factor * accumulator
  float lse;      // without the sink
  float inverse;  // 1 / (the sum of exp(score - row_max), with the sink)
};

// The sum of exp(score - row_max) over the keys and the sink of a row: its inverse and its log.
struct Denominator {
  float inverse;
  float log;
};

inline Denominator denominator(const AttentionParams& a, int64_t h, const SoftmaxState& row) {
  if (a.sinks == nullptr) return {1.0F / row.row_sum, log_of(row.row_sum)};
  // Shifted by the max of the two: exp(sink - row_max) would overflow for a large sink.
  const float shift = row.row_max < a.sinks[h] ? a.sinks[h] : row.row_max;
  const float keys = exp_of(row.row_max - shift);
  const float total = row.row_sum * keys + exp_of(a.sinks[h] - shift);
  return {keys / total, shift - row.row_max + log_of(total)};
}

inline RowResult finalize_row(const AttentionParams& a, int64_t h, const SoftmaxState& row) {
  if (row.row_max == -kInfinity) return {0.0F, -kInfinity, 0.0F};
  const Denominator total = denominator(a, h, row);
  return {total.inverse * Dropout(a).factor, row.row_max + log_of(row.row_sum), total.inverse};
}

// Stores the six fields of HeadStats of one query, `stride` elements apart.
inline void write_stats(const AttentionParams& a, int64_t h, const SoftmaxState& row, float* to,
                        int64_t stride) {
  for (int64_t i = 0; i < 6; ++i) to[i * stride] = 0.0F;
  // Comparisons skip NaN; row_sum does not.
  to[5 * stride] = is_nan(row.row_sum) && row.row_max < kInfinity ? kNaN : row.row_max;
  if (row.row_max == -kInfinity) return;
  const Denominator total = denominator(a, h, row);
  const auto mass = [&](float score) { return exp_of(score - row.row_max) * total.inverse; };
  // Entropy, -sum w log w, with log w = score - row_max - log of the total.
  to[0 * stride] = total.log * (row.row_sum * total.inverse) - row.scores * total.inverse;
  to[1 * stride] = row.distance * total.inverse;
  to[2 * stride] = mass(row.first);
  to[3 * stride] = mass(row.previous);
  to[4 * stride] = mass(row.self);
}

}  // namespace polyhead::POLYHEAD_ISA
