#include "key_ranges.hpp"

#include <algorithm>
#include <unordered_map>

namespace polyhead {
namespace {

struct Extent {
  int32_t number;  // in order of appearance
  int64_t first, last, count;
  bool is_run() const { return last - first == count; }
};

std::unordered_map<int64_t, Extent> extents_of(const int64_t* ids, int64_t S) {
  std::unordered_map<int64_t, Extent> extents;
  for (int64_t s = 0; s < S; ++s) {
    const Extent fresh{static_cast<int32_t>(extents.size()), s, s, 0};
    Extent& extent = extents.emplace(ids[s], fresh).first->second;
    extent.last = s + 1;
    ++extent.count;
  }
  return extents;
}

}  // namespace

Ranges ranges_of(const Band& band, int64_t B, int64_t T, int64_t S,
                 const std::vector<int64_t>& lengths, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& documents, const std::vector<int64_t>& offsets) {
  Ranges ranges;
  ranges.doc_batches = S == 0 ? 0 : static_cast<int64_t>(documents.size()) / S;
  const bool by_batch =
      !lengths.empty() || !padding.empty() || ranges.doc_batches > 1 || offsets.size() > 1;
  ranges.batches = by_batch ? B : 1;
  ranges.kv_begin.resize(static_cast<size_t>(ranges.batches * T));
  ranges.kv_end.resize(static_cast<size_t>(ranges.batches * T));
  bool all_runs = true;
  for (int64_t b = 0; b < ranges.batches; ++b) {
    const int64_t start = padding.empty() ? 0 : padding[b];
    const int64_t stop = std::min({S, band.stop, lengths.empty() ? S : lengths[b]});
    const int64_t offset = offsets.empty() ? 0 : offsets[offsets.size() > 1 ? b : 0];
    const int64_t* ids = nullptr;
    std::unordered_map<int64_t, Extent> extents;
    if (ranges.doc_batches > 0) {
      ids = documents.data() + (ranges.doc_batches > 1 ? b * S : 0);
      extents = extents_of(ids, S);
      for (const auto& [id, extent] : extents) all_runs = all_runs && extent.is_run();
      if (b < ranges.doc_batches)
        for (int64_t s = 0; s < S; ++s) ranges.doc_ids.push_back(extents.at(ids[s]).number);
    }
    for (int64_t t = 0; t < T; ++t) {
      const int64_t q = t + offset;
      int64_t first = std::max({int64_t{0}, start, q + band.lower});
      int64_t last = std::min(
          {stop, q + band.upper + 1, std::max(q + band.joined_upper + 1, band.joined_prefix)});
      if (ids != nullptr) {
        const int64_t position = offsets.empty() ? S - T + t : q;
        if (0 <= position && position < S) {
          const Extent& own = extents.at(ids[position]);
          first = std::max(first, own.first);
          last = std::min(last, own.last);
        } else {
          last = first;  // not a token of any document
        }
      }
      const bool is_empty = first >= last;
      ranges.kv_begin[b * T + t] = is_empty ? 0 : static_cast<int32_t>(first);
      ranges.kv_end[b * T + t] = is_empty ? 0 : static_cast<int32_t>(last);
    }
  }
  if (all_runs) ranges.doc_ids.clear();
  return ranges;
}

}  // namespace polyhead
