// The scores of one query, from dot products to weights: softcap, ALiBi, bias, mask, then the
// softmax over keys that come block by block (Milakov and Gimelshein 2018).
#pragma once

#include <cmath>
#include <limits>

#include "simd/math.hpp"
#include "tiles/tile.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Query {
  int64_t b, h, t;
  int64_t first, last;  // the keys it may attend to, before documents and dense masks

  Query(const AttentionParams& a, int64_t b, int64_t h, int64_t t)
      : b(b),
        h(h),
        t(t),
        first(a.kv_begin[b * a.kv_range_stride + t]),
        last(a.kv_end[b * a.kv_range_stride + t]) {}
};

// Numbers of a row of a broadcast tensor, a vector at a time, reading `count` of them at most.
template <class Element>
inline F32 load_strided(const Element* from, int64_t stride, int64_t count) {
  if (stride == 1) return load_n(from, count);
  Element lanes[kLanes] = {};
  for (int64_t i = 0; i < min(count, kLanes); ++i) lanes[i] = from[i * stride];
  return load(lanes);
}

inline void add_alibi(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                      float* z) {
  const float slope = a.alibi_slopes[q.h];
  for (int64_t s = begin; s < end; s += kLanes) {
    const I32 ahead = iota() + static_cast<int32_t>(s - a.position(q.t));
    const F32 distance = __builtin_convertvector(ahead < 0 ? -ahead : ahead, F32);
    store(z + s - begin, load(z + s - begin) - slope * distance);
  }
}

inline void add_bias(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                     float* z) {
  dispatch_dtype(a.bias.dtype, [&](auto element) {
    const auto* row = static_cast<const decltype(element)*>(a.bias.data) + q.b * a.bias.stride[0] +
                      q.h * a.bias.stride[1] + q.t * a.bias.stride[2];
    const int64_t stride = a.bias.stride[3];
    for (int64_t s = begin; s < min(end, a.S); s += kLanes)
      store(z + s - begin, load(z + s - begin) + load_strided(row + s * stride, stride, a.S - s));
  });
}

inline void mask_forbidden(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                           float* z) {
  const uint8_t* row = a.dense_mask + q.b * a.allowed_stride[0] + q.h * a.allowed_stride[1] +
                       q.t * a.allowed_stride[2];
  const int64_t stride = a.allowed_stride[3];
  for (int64_t s = begin; s < min(end, a.S); s += kLanes) {
    U8 may;
    if (stride == 1 && s + kLanes <= a.S) {
      may = load_as<U8>(row + s);
    } else {
      for (int64_t i = 0; i < kLanes; ++i) may[i] = s + i < a.S ? row[(s + i) * stride] : 0;
    }
    const I32 allowed = __builtin_convertvector(may, I32) != 0;
    store(z + s - begin, select(allowed, load(z + s - begin), splat(-kInfinity)));
  }
}

inline void mask_other_documents(const AttentionParams& a, const Query& q, int64_t begin,
                                 int64_t end, float* z) {
  const int32_t* documents = a.doc_ids + q.b * a.document_stride;
  const int32_t own = documents[a.position(q.t)];
  for (int64_t s = begin; s < min(end, a.S); ++s)
    if (documents[s] != own) z[s - begin] = -kInfinity;
}

inline void mask_outside(const Query& q, int64_t begin, int64_t end, float* z) {
  for (int64_t s = begin; s < min(q.first, end); ++s) z[s - begin] = -kInfinity;
  for (int64_t s = max(q.last, begin); s < end; ++s) z[s - begin] = -kInfinity;
}

// z holds the scaled dot products with keys [begin, end), whole vectors; afterwards the scores.
// `capped` gets the scores between softcap and bias, which backward needs.
inline void apply_score_mods(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                             float* z, float* capped = nullptr) {
  if (a.softcap != 0.0F) {
    const float inverse = 1.0F / a.softcap;
    for (int64_t i = 0; i < end - begin; i += kLanes) {
      const F32 cap = a.softcap * tanh_of(load(z + i) * inverse);
      store(z + i, cap);
      if (capped != nullptr) store(capped + i, cap);
    }
  }
  if (a.alibi_slopes != nullptr) add_alibi(a, q, begin, end, z);
  if (a.bias.data != nullptr) add_bias(a, q, begin, end, z);
  if (a.dense_mask != nullptr) mask_forbidden(a, q, begin, end, z);
  if (a.doc_ids != nullptr) mask_other_documents(a, q, begin, end, z);
  mask_outside(q, begin, end, z);
}

// Sums over the keys seen so far, relative to the largest score among them.
struct SoftmaxState {
  float row_max = -kInfinity;  // the largest score
  float sum = 0.0F;            // of exp(score - row_max)
  // For statistics only:
  float scores = 0.0F;    // of exp(score - row_max) * (score - row_max)
  float distance = 0.0F;  // of exp(score - row_max) * |query position - key position|
  float first = -kInfinity, previous = -kInfinity, self = -kInfinity;  // the scores of these keys

  // Makes the sums relative to a max score; returns the factor for other sums of the row.
  float rescale_to(float new_max) {
    if (new_max == row_max) return 1.0F;
    const float factor = exp2_of(splat((row_max - new_max) * kLog2E))[0];
    // (Between the lowest float32 and any other score the sum overflows: 0 * infinity were NaN.)
    scores = factor == 0.0F ? 0.0F : factor * (scores + sum * (row_max - new_max));
    sum *= factor;
    distance *= factor;
    row_max = new_max;
    return factor;
  }

  // Adds other keys' sums, relative to the same score.
  void add(const SoftmaxState& other) {
    sum += other.sum;
    scores += other.scores;
    distance += other.distance;
    first = first > other.first ? first : other.first;  // one of the two is -inf
    previous = previous > other.previous ? previous : other.previous;
    self = self > other.self ? self : other.self;
  }
};

inline float largest_of(const float* z, int64_t n) {
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
    if (std::isnan(z[i])) return true;
  return false;
}

inline void record_key_scores(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                              const float* z, SoftmaxState& row) {
  const auto note = [&](int64_t s, float& score) {
    if (begin <= s && s < min(end, a.S)) score = z[s - begin];
  };
  note(0, row.first);
  note(a.position(q.t) - 1, row.previous);
  note(a.position(q.t), row.self);
}

// Turns scores of keys [begin, end) into exp(score - row_max) in place, as tiles of Elements want
// them; returns the factor that the row's earlier products must be multiplied by.
template <bool kStats, class Element>
inline float online_softmax(const AttentionParams& a, const Query& q, int64_t begin, int64_t end,
                            float* z, SoftmaxState& row) {
  const int64_t n = end - begin;
  if constexpr (kStats) record_key_scores(a, q, begin, end, z, row);
  const float block_most = largest_of(z, n);
  const float row_max = block_most > row.row_max ? block_most : row.row_max;
  if (row_max == -kInfinity) {
    // Nothing to attend to, or nothing but NaN, which the sum then carries to the output.
    if (any_nan(z, n)) row = {.row_max = 0.0F, .sum = kNaN};
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
      // 0 * -inf is NaN, and what is forbidden counts for nothing.
      scores += weight * select(weight == 0.0F, F32{}, below);
      const I32 ahead = iota() + static_cast<int32_t>(begin + i - a.position(q.t));
      distance += weight * __builtin_convertvector(ahead < 0 ? -ahead : ahead, F32);
    }
    if (drops) weight = select(dropout.kept(row_key, begin + i), weight, F32{});
    if constexpr (Dot<Element>::kElementsPerStep == 1) {
      store(z + i, weight);
    } else {
      store_as(reinterpret_cast<char*>(z) + i * 2, round_to_bf16(weight));
    }
  }
  row.sum += reduce_add(sum);
  if constexpr (kStats) {
    row.scores += reduce_add(scores);
    row.distance += reduce_add(distance);
  }
  return factor;
}

// What remains to be done with the sum of exp(score - row_max) * value, once every key was seen.
struct RowResult {
  float factor;   // for that sum, to be the output
  float lse;      // without the sink
  float inverse;  // of the sum of exp(score - row_max), with the sink
};

// The sum of exp(score - row_max) over a row's keys and its sink, as its inverse and its logarithm.
struct Denominator {
  float inverse;
  float log;
};

inline Denominator denominator(const AttentionParams& a, int64_t h, const SoftmaxState& row) {
  if (a.sinks == nullptr) return {1.0F / row.sum, std::log(row.sum)};
  // Shifted by the max of the two: beside a large sink exp(sink - row_max) would be infinite.
  const float shift = row.row_max < a.sinks[h] ? a.sinks[h] : row.row_max;
  const float keys = std::exp(row.row_max - shift);
  const float total = row.sum * keys + std::exp(a.sinks[h] - shift);
  return {keys / total, shift - row.row_max + std::log(total)};
}

inline RowResult finalize_row(const AttentionParams& a, int64_t h, const SoftmaxState& row) {
  if (row.row_max == -kInfinity) return {0.0F, -kInfinity, 0.0F};
  const Denominator total = denominator(a, h, row);
  return {total.inverse * Dropout(a).factor, row.row_max + std::log(row.sum), total.inverse};
}

// The six numbers of HeadStats for one query; `stride` from one to the next.
inline void write_stats(const AttentionParams& a, int64_t h, const SoftmaxState& row, float* to,
                        int64_t stride) {
  for (int64_t i = 0; i < 6; ++i) to[i * stride] = 0.0F;
  // A comparison skips NaN, and the sum does not.
  to[5 * stride] = std::isnan(row.sum) && row.row_max < kInfinity ? kNaN : row.row_max;
  if (row.row_max == -kInfinity) return;
  const Denominator total = denominator(a, h, row);
  const auto mass = [&](float score) { return std::exp(score - row.row_max) * total.inverse; };
  // - sum of w log w, with log w = score - row_max - log of the total.
  to[0 * stride] = total.log * (row.sum * total.inverse) - row.scores * total.inverse;
  to[1 * stride] = row.distance * total.inverse;
  to[2 * stride] = mass(row.first);
  to[3 * stride] = mass(row.previous);
  to[4 * stride] = mass(row.self);
}

}  // namespace polyhead::POLYHEAD_ISA
