// Key ranges of blocks of queries, and their splits (split-KV).
#pragma once

#include "flash/scores.hpp"

namespace polyhead::POLYHEAD_ISA {

// Keys [begin, end).
struct KeyRange {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The smallest range that holds the keys of queries [begin, end) of a batch row.
inline KeyRange key_range(const AttentionParams& a, int64_t b, int64_t begin, int64_t end) {
  KeyRange span{a.S, 0};
  for (int64_t t = begin; t < end; ++t) {
    const Query q(a, b, 0, t);
    if (q.kv_begin >= q.kv_end) continue;
    span.begin = min(span.begin, q.kv_begin);
    span.end = max(span.end, q.kv_end);
  }
  return span;
}

// One of `parts` splits of the keys, at multiples of a block.
inline KeyRange split_range(KeyRange keys, int64_t block, int64_t part, int64_t parts) {
  if (keys.empty()) return {0, 0};
  const int64_t begin = keys.begin / block * block;
  const int64_t blocks = (keys.end - begin + block - 1) / block;
  return {begin + blocks * part / parts * block,
          min(keys.end, begin + blocks * (part + 1) / parts * block)};
}

}  // namespace polyhead::POLYHEAD_ISA
