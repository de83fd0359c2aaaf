// Epilogue of the forward kernels: normalize each row, store it with its lse, softmax state and
// statistics; before that, for split keys, combine the splits.
#pragma once

#include "flash/softmax.hpp"

namespace polyhead::POLYHEAD_ISA {

inline void write_output(const TensorView& query, void* output, int64_t at, const float* from,
                         int64_t size, float factor) {
  dispatch_dtype(query.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(output) + at;
    for (int64_t e = 0; e < size; e += kLanes) store_n(to + e, load(from + e) * factor, size - e);
  });
}

// Stores the results of one query; `acc` is the sum of exp(score - row_max) * value.
inline void write_row(const AttentionParams& a, const ForwardOutput& out, const Query& q,
                      const SoftmaxState& row, const float* acc) {
  const int64_t rows = a.B * a.H * a.T, at = (q.b * a.H + q.h) * a.T + q.t;
  const RowResult result = finalize_row(a, q.h, row);
  // Zeros are stored, not a product: the accumulator of an empty row may hold anything.
  alignas(64) static constexpr float kZeros[kMaxHeadSize] = {};
  const bool is_empty = row.row_max == -kInfinity;
  write_output(a.query, out.output, at * a.E, is_empty ? kZeros : acc, a.E, result.factor);
  if (out.lse == nullptr) return;
  out.lse[at] = result.lse;
  out.softmax_state[at] = row.row_max;
  out.softmax_state[rows + at] = row.row_sum;
  out.softmax_state[2 * rows + at] = result.inverse;
  if (out.stats != nullptr) write_stats(a, q.h, row, out.stats + at, a.B * a.H * a.T);
}

// Reduction of split-KV for one KV head: rescales the partial results of each query to their common
// max, adds them and stores the row. Layout: sums[KV head][part][row of the group], and `stride`
// floats of `acc` for each.
inline void combine_splits(const AttentionParams& a, const ForwardOutput& out, int64_t head,
                           int64_t parts, const SoftmaxState* sums, float* acc, int64_t stride) {
  const int64_t rows = a.group() * a.T;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = head * parts * rows + row;
    SoftmaxState total = sums[first];
    float* to = acc + first * stride;
    for (int64_t part = 1; part < parts; ++part) {
      SoftmaxState more = sums[first + part * rows];
      const float* from = to + part * rows * stride;
      if (more.row_max == -kInfinity) continue;
      const float row_max = total.row_max > more.row_max ? total.row_max : more.row_max;
      const float old_factor = total.rescale_to(row_max);
      const float factor = more.rescale_to(row_max);
      for (int64_t e = 0; e < a.E; e += kLanes)
        store(to + e, load(to + e) * old_factor + load(from + e) * factor);
      total.merge(more);
    }
    const Query q(a, head / a.G, head % a.G * a.group() + row / a.T, row % a.T);
    write_row(a, out, q, total, to);
  }
}

}  // namespace polyhead::POLYHEAD_ISA
