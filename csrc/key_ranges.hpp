// Structured masks, lowered to one range of keys per query.
#pragma once

#include <cstdint>
#include <vector>

namespace polyhead {

// Query t may attend to key s if all conditions hold, with q = t + offset:
//   q + lower <= s;  s <= q + upper;  s < stop;  s <= q + joined_upper or s < joined_prefix
struct Band {
  int64_t lower, upper, stop, joined_upper, joined_prefix;
};

struct Ranges {
  int64_t batches = 1;  // 1 if all batch rows have the same ranges
  std::vector<int32_t> kv_begin, kv_end;
  // (doc_batches, S), the document of each key; empty if the ranges suffice.
  std::vector<int32_t> doc_ids;
  int64_t doc_batches = 0;
};

// Args:
//   lengths, padding: one number per batch row, or empty: keys from lengths[b] on, and keys before
//     padding[b], are masked.
//   documents: (doc_batches, S) ids, or empty.
//   offsets: the position of query 0, one for all batch rows or one each. Empty: S - T for
//     documents, and 0 for the band, which then counts from query 0.
Ranges ranges_of(const Band& band, int64_t B, int64_t T, int64_t S,
                 const std::vector<int64_t>& lengths, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& documents, const std::vector<int64_t>& offsets);

}  // namespace polyhead
