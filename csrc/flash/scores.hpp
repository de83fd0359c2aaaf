// Scores of one query against a block of keys: softcap, ALiBi, bias and masks, applied in place to
// the scaled dot products.
#pragma once

#include <limits>

#include "simd/math.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Query {
  int64_t b, h, t;
  int64_t kv_begin, kv_end;  // the keys it may attend to, before documents and dense masks

  Query(const AttentionParams& a, int64_t b, int64_t h, int64_t t)
      : b(b),
        h(h),
        t(t),
        kv_begin(a.kv_begin[b * a.kv_range_stride + t]),
        kv_end(a.kv_end[b * a.kv_range_stride + t]) {}
};

// One vector of a row of a broadcast tensor; reads at most `count` elements.
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
    const I32 ahead = iota() + static_cast<int32_t>(s - a.position(q.b, q.t));
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
  const uint8_t* row = a.dense_mask + q.b * a.dense_mask_stride[0] + q.h * a.dense_mask_stride[1] +
                       q.t * a.dense_mask_stride[2];
  const int64_t stride = a.dense_mask_stride[3];
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
  const int32_t* documents = a.doc_ids + q.b * a.doc_ids_stride;
  const int64_t position = a.position(q.b, q.t);
  const bool has_document = 0 <= position && position < a.S;
  const int32_t own = has_document ? documents[position] : -1;
  for (int64_t s = begin; s < min(end, a.S); ++s)
    if (documents[s] != own) z[s - begin] = -kInfinity;
}

inline void mask_outside(const Query& q, int64_t begin, int64_t end, float* z) {
  for (int64_t s = begin; s < min(q.kv_begin, end); ++s) z[s - begin] = -kInfinity;
  for (int64_t s = max(q.kv_end, begin); s < end; ++s) z[s - begin] = -kInfinity;
}

// Turns z, the scaled dot products with keys [begin, end) in whole vectors, into scores in place.
// `capped` receives the scores after softcap and before the bias, which backward needs.
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

}  // namespace polyhead::POLYHEAD_ISA
