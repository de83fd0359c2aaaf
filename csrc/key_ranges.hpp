// Masks that keep their structure, as the range of keys that each query may attend to.
#pragma once

#include <cstdint>
#include <vector>

namespace polyhead {

// Query t may attend to key s if every rule holds:
//   t + lower <= s;  s <= t + upper;  s < stop;  s <= t + joined_upper or s < joined_prefix
struct Band {
  int64_t lower, upper, stop, joined_upper, joined_prefix;
};

struct Ranges {
  int64_t batches = 1;  // 1 where all batch rows are alike
  std::vector<int32_t> first, last;
  // The document of each key, and whether ranges do not say everything about documents.
  std::vector<int32_t> documents;
  int64_t document_batches = 0;
};

// Args:
//   lengths, padding: one number a batch row, or empty: keys at and after the first, and before
//     the second, are forbidden.
//   documents: (document_batches, S) ids, or empty; query t is key S - T + t.
Ranges ranges_of(const Band& band, int64_t B, int64_t T, int64_t S,
                 const std::vector<int64_t>& lengths, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& documents);

}  // namespace polyhead
