// Dense masks read as one range of keys per row, where every row has one.
#pragma once

#include <cstdint>

namespace polyhead {

enum class MaskElement { boolean, f32, bf16, f16 };

struct DenseMask {
  const void* data;
  MaskElement element;
  int64_t batches, rows, keys;  // keys are contiguous
  int64_t batch_stride, row_stride;
};

enum class MaskRows {
  unstructured,  // a row allows more than one range of keys, or an element is not 0 and not -inf
  ranges,
  lowest,  // ranges, and some forbidden element is finite: the lowest float or near it
};

// Writes (begin, end) of the allowed keys per row, (batches, rows, 2); (0, 0) for an empty row.
// Elements allow a key if they are true, or 0 in a float mask; they forbid it if they are false,
// -inf or a finite float below -1e30.
MaskRows mask_rows(const DenseMask& mask, int threads, int64_t* ranges);

}  // namespace polyhead
