// Keys, values and queries copied into the order in which tiles read them: once per key head, for
// every query of every head of its group. Conversion to float32 happens here, once, too.
#pragma once

#include <type_traits>

#include "tiles/tile.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of a tile

// Where a token lies: a batch row and a token of it, or a block and a slot of it.
struct TokenAddress {
  int64_t first, second;

  TokenAddress(const TensorView& view, int64_t b, int64_t token) : first(b), second(token) {
    if (view.block_table == nullptr) return;
    first = view.block_table[b * view.table_stride + token / view.block_size];
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

// One token's numbers of one head as float32, 0 up to the next whole vector.
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

// Rows of one head as float32, each `stride` numbers long.
inline void widen_rows(const TensorView& view, int64_t b, int64_t head, int64_t begin, int64_t end,
                       int64_t size, float* to, int64_t stride) {
  dispatch_kv_dtype(view.dtype, [&](auto source) {
    for (int64_t token = begin; token < end; ++token, to += stride)
      widen_row<decltype(source)>(view, b, head, token, size, to);
  });
}

// One token's numbers of one head as bfloat16; codes are followed by 0 up to the next whole vector.
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

// Two rows of bfloat16 as pairs, a column after the other.
inline U32 pair_up(const void* first, const void* second) {
  return to_f32(load_as<U16>(first)) | (to_f32(load_as<U16>(second)) << 16);
}

// How a tensor is held for tiles that take Elements.
template <class Element>
struct PackedLayout {
  static constexpr int kElementsPerStep = Dot<Element>::kElementsPerStep;

  static int64_t steps(int64_t depth) {
    return round_up(depth, kElementsPerStep) / kElementsPerStep;
  }

  // Panels of kPanel tokens: [panel][step of the size][token].
  static int64_t columns_size(int64_t tokens, int64_t size) {
    return round_up(tokens, kPanel) * steps(size);
  }
  static int64_t column_panel(int64_t token, int64_t size) { return token * steps(size); }

  // Panels of kPanel features, the last one narrower: [panel][step of the tokens][feature].
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

// As many zeros as are asked for: of a whole buffer they would cost more than short calls take.
template <class Number>
inline void clear(Number* numbers, int64_t count) {
  std::memset(numbers, 0, static_cast<size_t>(count) * sizeof *numbers);
}

// One token's numbers of one head as tiles take them: whole steps of them.
inline void read_row(const TensorView& view, int64_t b, int64_t head, int64_t token, int64_t size,
                     float* to) {
  widen_rows(view, b, head, token, token + 1, size, to, 0);
}
inline void read_row(const TensorView& view, int64_t b, int64_t head, int64_t token, int64_t size,
                     BF16Pair* to) {
  to[(size - 1) / 2].bits = 0;  // an odd size ends with half a pair
  copy_row(view, b, head, token, size, to);
}

// Queries, row by row, as left operand.
template <class Number>
inline void pack_queries(const TensorView& view, int64_t b, int64_t h, int64_t begin, int64_t end,
                         int64_t size, Number* to) {
  const int64_t stride = round_up(size, kLanes);
  for (int64_t token = begin; token < end; ++token, to += stride)
    read_row(view, b, h, token, size, to);
}

// Rows of a square become its columns: blocks of half its size change places, then of a quarter.
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

// Tokens [begin, end) as columns, in panels from `to` on; the last panel is filled up with zeros.
template <class Number>
inline void pack_keys(const TensorView& view, int64_t b, int64_t head, int64_t begin, int64_t end,
                      int64_t size, Number* to) {
  using Vector = std::conditional_t<std::is_same_v<Number, float>, F32, U32>;
  const int64_t steps = PackedLayout<Number>::steps(size);
  // An odd number of lines apart: else the rows would share a few sets of the cache.
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

// Tokens [begin, end) as rows `at` .. of panels for so many `tokens`; `at` is even.
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
      } else if (s + i < end + 2) {  // then both rows are
        clear(rows[i], padded_size);
      }
    }
    for (int64_t e = 0; e < padded_size; e += kLanes) {
      const int64_t first = e / kPanel * kPanel;
      const int64_t width = PackedLayout<BF16Pair>::panel_width(first, size);
      BF16Pair* panel = to + PackedLayout<BF16Pair>::row_panel(first, tokens);
      store_as(panel + (at + s - begin) / 2 * width + (e - first),
               pair_up(rows[0] + e, rows[1] + e));
    }
  }
}

// Tokens [begin, end) as right operand in one piece, not in panels: [step of the tokens][feature].
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
      store_as(to, pair_up(rows[0] + i, rows[1] + i));
  }
}

}  // namespace polyhead::POLYHEAD_ISA
