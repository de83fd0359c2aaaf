// Packing: keys, values and queries copied into the layout that gemm tiles read, and converted to
// float32 or bfloat16 pairs. K and V are packed once per KV head, for all queries of its group.
//
// Packing costs one pass over K and V, which pays off from about 33 rows of a group on; below,
// decode reads them in place (gemv.hpp). README.md draws the layouts.
#pragma once

#include <type_traits>

#include "tiles/tile.hpp"

namespace polyhead::POLYHEAD_ISA {

// Address of a token: batch row and token, or, in a paged cache, block and slot.
struct TokenAddress {
  int64_t first, second;

  TokenAddress(const TensorView& view, int64_t b, int64_t token) : first(b), second(token) {
    if (view.block_table == nullptr) return;
    first = view.block_table[b * view.block_table_stride + token / view.block_size];
    second = token % view.block_size;
  }
  template <class Source>
  const Source* row(const TensorView& view, int64_t head) const {
    return static_cast<const Source*>(view.data) + first * view.stride[0] + head * view.stride[1] +
           second * view.stride[2];
  }
  const float* scale(const TensorView& view, int64_t head) const {
    return view.scales + first * view.scale_stride[0] + head * view.scale_stride[1] +
           second * view.scale_stride[2];
  }
};

template <class Source>
inline const Source* row_of(const TensorView& view, int64_t b, int64_t head, int64_t token) {
  return TokenAddress(view, b, token).row<Source>(view, head);
}

// One token of one head as float32, padded with 0 to whole vectors.
template <class Source>
inline void widen_row(const TensorView& view, int64_t b, int64_t head, int64_t token, int64_t size,
                      float* to) {
  const TokenAddress place(view, b, token);
  const Source* from = place.row<Source>(view, head);
  if constexpr (std::is_same_v<Source, Int8>) {
    const float scale = *place.scale(view, head);
    for (int64_t i = 0; i < size; i += kLanes) store(to + i, load_n(from + i, size - i) * scale);
  } else {
    for (int64_t i = 0; i < size; i += kLanes) store(to + i, load_n(from + i, size - i));
  }
}

// Tokens [begin, end) of one head as float32 rows, `stride` elements apart.
inline void widen_rows(const TensorView& view, int64_t b, int64_t head, int64_t begin, int64_t end,
                       int64_t size, float* to, int64_t stride) {
  dispatch_kv_dtype(view.dtype, [&](auto source) {
    for (int64_t token = begin; token < end; ++token, to += stride)
      widen_row<decltype(source)>(view, b, head, token, size, to);
  });
}

// One token of one head as bfloat16; int8 is dequantized, and padded with 0 to whole vectors.
inline void copy_row(const TensorView& view, int64_t b, int64_t head, int64_t token, int64_t size,
                     void* to) {
  if (view.dtype != Dtype::i8) {
    std::memcpy(to, row_of<BFloat16>(view, b, head, token), static_cast<size_t>(size) * 2);
    return;
  }
  alignas(64) float row[kMaxHeadSize];
  widen_row<Int8>(view, b, head, token, size, row);
  for (int64_t i = 0; i < size; i += kLanes)
    store_as(static_cast<char*>(to) + i * 2, round_to_bf16(load(row + i)));
}

// Packs two bfloat16 rows as the pairs of each column.
inline U32 pack_bf16_pairs(const void* first, const void* second) {
  return to_f32(load_as<U16>(first)) | (to_f32(load_as<U16>(second)) << 16);
}

// Sizes and offsets of packed operands of Elements.
template <class Element>
struct PackedLayout {
  static constexpr int kElementsPerStep = Dot<Element>::kElementsPerStep;

  static int64_t steps(int64_t depth) {
    return round_up(depth, kElementsPerStep) / kElementsPerStep;
  }

  // Keys, panels of kPanel tokens: [panel][step of the features][token].
  static int64_t columns_size(int64_t tokens, int64_t size) {
    return round_up(tokens, kPanel) * steps(size);
  }
  static int64_t column_panel(int64_t token, int64_t size) { return token * steps(size); }

  // Values, panels of kPanel features, the last one narrower: [panel][step of the tokens][feature].
  static int64_t rows_size(int64_t tokens, int64_t size) {
    return steps(round_up(tokens, kPanel)) * round_up(size, kLanes);
  }
  static int64_t row_panel(int64_t feature, int64_t tokens) {
    return feature * steps(round_up(tokens, kPanel));
  }
  static int64_t panel_width(int64_t feature, int64_t size) {
    return min(kPanel, round_up(size, kLanes) - feature);
  }
};

// Zeros only what is used: zeroing whole buffers would cost more than short calls take.
template <class Number>
inline void clear(Number* numbers, int64_t count) {
  std::memset(numbers, 0, static_cast<size_t>(count) * sizeof *numbers);
}

// One token of one head as an lhs row of a tile: whole steps.
inline void read_row(const TensorView& view, int64_t b, int64_t head, int64_t token, int64_t size,
                     float* to) {
  widen_rows(view, b, head, token, token + 1, size, to, 0);
}
inline void read_row(const TensorView& view, int64_t b, int64_t head, int64_t token, int64_t size,
                     BF16Pair* to) {
  to[(size - 1) / 2].bits = 0;  // an odd size ends in half a pair
  copy_row(view, b, head, token, size, to);
}

// Packs queries, row by row, as lhs.
template <class Number>
inline void pack_queries(const TensorView& view, int64_t b, int64_t h, int64_t begin, int64_t end,
                         int64_t size, Number* to) {
  const int64_t stride = round_up(size, kLanes);
  for (int64_t token = begin; token < end; ++token, to += stride)
    read_row(view, b, h, token, size, to);
}

// In-register transpose: swaps blocks of half the size, then of a quarter, ...
template <int Distance = kLanes / 2, class Vector>
[[gnu::always_inline]] inline void transpose(Vector (&square)[kLanes]) {
  if constexpr (Distance > 0) {
    const auto upper = [](auto i) { return (i & Distance) != 0 ? i - Distance + kLanes : i; };
    const auto lower = [](auto i) { return (i & Distance) != 0 ? i + kLanes : i + Distance; };
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & Distance) continue;
      const Vector a = square[i], b = square[i + Distance];
      square[i] = shuffle(a, b, upper);
      square[i + Distance] = shuffle(a, b, lower);
    }
    transpose<Distance / 2>(square);
  }
}

// Packs tokens [begin, end) as columns, in panels from `to` on; the last panel is padded with 0.
template <class Number>
inline void pack_keys(const TensorView& view, int64_t b, int64_t head, int64_t begin, int64_t end,
                      int64_t size, Number* to) {
  using Vector = std::conditional_t<std::is_same_v<Number, float>, F32, U32>;
  const int64_t steps = PackedLayout<Number>::steps(size);
  // The row stride is an odd number of lines, so that rows fall into different cache sets.
  alignas(64) Number rows[kLanes][kMaxHeadSize + 16];
  for (int64_t s = 0; s < round_up(end - begin, kPanel); s += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      if (begin + s + i < end) {
        read_row(view, b, head, begin + s + i, size, rows[i]);
      } else {
        clear(rows[i], steps);
      }
    }
    Number* columns =
        to + PackedLayout<Number>::column_panel(s / kPanel * kPanel, size) + s % kPanel;
    for (int64_t d = 0; d < steps; d += kLanes) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load_as<Vector>(rows[i] + d);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (d + i < steps) store_as(columns + (d + i) * kPanel, square[i]);
    }
  }
}

// Packs tokens [begin, end) as rows from `at` on, which is even, of panels of `tokens` rows.
inline void pack_values(const TensorView& view, int64_t b, int64_t head, int64_t begin, int64_t end,
                        int64_t at, int64_t tokens, int64_t size, float* to) {
  alignas(64) float row[kMaxHeadSize];
  dispatch_kv_dtype(view.dtype, [&](auto source) {
    const int64_t padded_end = round_up(end, kPanel);
    for (int64_t s = begin; s < padded_end; ++s) {
      if (s < end) {
        widen_row<decltype(source)>(view, b, head, s, size, row);
      } else if (s == end) {
        clear(row, round_up(size, kLanes));
      }
      for (int64_t e = 0; e < size; e += kPanel) {
        const int64_t width = PackedLayout<float>::panel_width(e, size);
        float* panel = to + PackedLayout<float>::row_panel(e, tokens);
        std::memcpy(panel + (at + s - begin) * width, row + e, static_cast<size_t>(width) * 4);
      }
    }
  });
}

inline void pack_values(const TensorView& view, int64_t b, int64_t head, int64_t begin, int64_t end,
                        int64_t at, int64_t tokens, int64_t size, BF16Pair* to) {
  const int64_t padded_end = round_up(end, kPanel);
  const int64_t padded_size = round_up(size, kLanes);
  alignas(64) uint16_t rows[2][kMaxHeadSize] = {};
  for (int64_t s = begin; s < padded_end; s += 2) {
    for (int64_t i = 0; i < 2; ++i) {
      if (s + i < end) {
        copy_row(view, b, head, s + i, size, rows[i]);
      } else if (s + i < end + 2) {  // later both rows are 0 already
        clear(rows[i], padded_size);
      }
    }
    for (int64_t e = 0; e < padded_size; e += kLanes) {
      const int64_t first = e / kPanel * kPanel;
      const int64_t width = PackedLayout<BF16Pair>::panel_width(first, size);
      BF16Pair* panel = to + PackedLayout<BF16Pair>::row_panel(first, tokens);
      store_as(panel + (at + s - begin) / 2 * width + (e - first),
               pack_bf16_pairs(rows[0] + e, rows[1] + e));
    }
  }
}

// Packs tokens [begin, end) as one rhs without panels: [step of the tokens][feature].
inline void pack_depth_major(const TensorView& view, int64_t b, int64_t head, int64_t begin,
                             int64_t end, int64_t size, float* to) {
  widen_rows(view, b, head, begin, end, size, to, round_up(size, kLanes));
}

inline void pack_depth_major(const TensorView& view, int64_t b, int64_t head, int64_t begin,
                             int64_t end, int64_t size, BF16Pair* to) {
  alignas(64) uint16_t rows[2][kMaxHeadSize] = {};
  for (int64_t s = begin; s < end; s += 2) {
    for (int64_t i = 0; i < 2; ++i) {
      if (s + i < end) {
        copy_row(view, b, head, s + i, size, rows[i]);
      } else {
        clear(rows[i], round_up(size, kLanes));
      }
    }
    for (int64_t i = 0; i < size; i += kLanes, to += kLanes)
      store_as(to, pack_bf16_pairs(rows[0] + i, rows[1] + i));
  }
}

}  // namespace polyhead::POLYHEAD_ISA
