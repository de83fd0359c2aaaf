// Products with rows read where they lie: of a few left rows with each of many rows (scores), and
// sums of many rows by weight (values). Each row has its own address, so that keys may lie side by
// side or in blocks anywhere.
#pragma once

#include <type_traits>
#include <utility>

#include "tiles/pack.hpp"

namespace polyhead::POLYHEAD_ISA {

// Whether rows of Elements are multiplied as they are, two numbers an instruction, not widened.
template <class Element>
constexpr bool kUsesBF16Dot = kHasBF16Dot && std::is_same_v<Element, BFloat16>;

// Whether rows are read as pairs all the same, and their even and odd numbers widened apart: a
// shift and a mask for two vectors, where widening neighbours takes two instructions for each.
template <class Element>
constexpr bool kDeinterleaves = !kHasBF16Dot && std::is_same_v<Element, BFloat16>;

inline F32 even_of(U32 pairs) { return reinterpret_cast<F32>(pairs << 16); }
inline F32 odd_of(U32 pairs) { return reinterpret_cast<F32>(pairs & (U32{} + 0xFFFF0000U)); }

// What the left operand is held in.
template <class Element>
using LhsElement = std::conditional_t<kUsesBF16Dot<Element>, BFloat16, float>;

// Numbers of a row that one step of a dot product takes, and what is padded for it.
template <class Element>
constexpr int64_t kRowStep = std::is_same_v<Element, BFloat16> ? 2 * kLanes : kLanes;

// Twice as many as a vector has numbers of a row of BFloat16 in pairs.
using U16x2 [[gnu::vector_size(kVectorBytes)]] = uint16_t;

constexpr int kMaxAccumulators =
    kTileVectors == 4 ? 16 : 8;  // sums of dot products that fit in registers

// Of so many left rows with one row: sums of lanes are added up by powers of two.
constexpr int sums_for(int count) {
  int power = 1;
  while (power < count) power *= 2;
  return power;
}

// Where arithmetic takes as long as reading, lines are asked for a block before they are needed;
// elsewhere the processor sees far enough by itself, if rows are touched.
constexpr bool kUsesPrefetch = kTileVectors != 4;

// Reads a row's lines in the order of their addresses, before they are multiplied in another one:
// only so does the processor see a stream and fetch ahead.
template <class Element>
inline void touch_row(const Element* row, int64_t size) {
  const auto* bytes = reinterpret_cast<const volatile char*>(row);
  // Two lines a turn: of one the loop itself would take row_max of the time.
  const int64_t end = size * static_cast<int64_t>(sizeof(Element));
  int64_t i = 0;
  for (; i + 64 < end; i += 128) bytes[i], bytes[i + 64];
  if (i < end) bytes[i];
}

// The rows of the next block of keys and of values, whose lines are asked for while this block is
// worked on: evenly, as a burst of them would be waited for, and keys and values in turn, as two
// streams are read faster than one.
template <class Element>
struct Prefetcher {
  const Element* const* keys = nullptr;
  const Element* const* values = nullptr;
  int64_t count = 0;  // of rows
  int64_t bytes = 0;  // of the longer row
  int64_t row = 0, at = 0;

  // Asks for as many bytes as were just worked on.
  void advance(int64_t worked_on) {
    if (row == count) return;
    for (int64_t i = 0; i < worked_on; i += 2 * kLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(keys[row]) + at, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(values[row]) + at, 0, 2);
      at += kLine;
      if (at < bytes) continue;
      at = 0;
      if (++row == count) return;
    }
  }

  static constexpr int64_t kLine = 64;
};

// dots[i * dots_stride + k] = left row i . row k, for Count left rows and Keys rows. LhsElement
// rows are padded with zeros to whole steps, and where rows are split, of each step first the even
// numbers. `ahead` is nullptr where these rows were worked on before.
template <int Count, int Keys, class Element>
[[gnu::always_inline]] inline void qk_dot(const LhsElement<Element>* left, int64_t left_stride,
                                          const Element* const* rows, int64_t size,
                                          Prefetcher<Element>* ahead, float* dots,
                                          int64_t dots_stride) {
  constexpr int64_t kStep = kRowStep<Element>;
  // Rows that share each load of a left row. Where rows are touched, float32's are too long for it:
  // four were no stream any more.
  constexpr int kRowsPerLoad = sizeof(Element) == 4 && !kUsesPrefetch ? 1 : min(Keys, 4);
  // (An initializer would write zeros to memory, by a slow instruction, before every product.)
  constexpr int kSums = sums_for(Count) * Keys;
  F32 sums[kSums];
#pragma GCC unroll 16
  for (F32& sum : sums) sum = F32{};
  const auto share = [&]<int kFirst>() {
    const auto add = [&](int64_t at, int64_t d, auto&& load_row) {
      decltype(load_row(rows[0])) row[kRowsPerLoad];
#pragma GCC unroll 4
      for (int k = 0; k < kRowsPerLoad; ++k) row[k] = load_row(rows[kFirst + k] + d);
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) {
        auto number = load_as<decltype(load_row(rows[0]))>(left + i * left_stride + at);
        if constexpr (kRowsPerLoad > 1) keep_in_register(number);
#pragma GCC unroll 4
        for (int k = 0; k < kRowsPerLoad; ++k) {
          F32& sum = sums[i * Keys + kFirst + k];
          if constexpr (kUsesBF16Dot<Element>) {
            sum = Dot<BF16Pair>::add(sum, number, row[k]);
          } else {
            sum += number * row[k];
          }
        }
      }
    };
    if constexpr (kUsesPrefetch) {
      if (ahead != nullptr)
        ahead->advance(kRowsPerLoad * size * static_cast<int64_t>(sizeof(Element)));
    } else if constexpr (kRowsPerLoad > 1) {
      for (int k = 0; k < kRowsPerLoad; ++k) touch_row(rows[kFirst + k], size);
    }
    int64_t d = 0;
    if constexpr (kUsesBF16Dot<Element>) {
      for (; d + kStep <= size; d += kStep)
        add(d, d, [](const Element* from) { return load_as<U32>(from); });
      if (d < size)
        add(d, d, [&](const Element* from) { return load_partial<U32>(from, size - d); });
    } else if constexpr (kDeinterleaves<Element>) {
      const auto add_both = [&](auto&& load_pairs) {
        add(d, d, [&](const Element* from) { return even_of(load_pairs(from)); });
        add(d + kLanes, d, [&](const Element* from) { return odd_of(load_pairs(from)); });
      };
      for (; d + kStep <= size; d += kStep)
        add_both([](const Element* from) { return load_as<U32>(from); });
      if (d < size)
        add_both([&](const Element* from) { return load_partial<U32>(from, size - d); });
    } else {
      for (; d + kStep <= size; d += kStep)
        add(d, d, [](const Element* from) { return load(from); });
      if (d < size) add(d, d, [&](const Element* from) { return load_n(from, size - d); });
    }
  };
  // Not a loop: the compiler keeps sums in registers only where it knows which they are.
  [&]<int... kShares>(std::integer_sequence<int, kShares...>) {
    (share.template operator()<kShares * kRowsPerLoad>(), ...);
  }(std::make_integer_sequence<int, Keys / kRowsPerLoad>());
  float totals[kSums];
  reduce_add_each(sums, totals);
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i)
    std::memcpy(dots + i * dots_stride, totals + i * Keys, sizeof(float) * Keys);
}

// Lane i of two vectors of so many lanes, where their lanes take turns.
template <class Lane>
[[gnu::always_inline]] constexpr Lane in_turn(Lane i, int16_t lanes) {
  return (i >> 1) + (i & 1) * lanes;
}

// Two rows of numbers as the pairs of each column, in the order of the columns.
inline void pair_up(U16x2 a, U16x2 b, U32& lower, U32& upper) {
  const auto from_lower = [](auto i) { return in_turn(i, 2 * kLanes); };
  const auto from_upper = [](auto i) { return kLanes + in_turn(i, 2 * kLanes); };
  lower = reinterpret_cast<U32>(shuffle(a, b, from_lower));
  upper = reinterpret_cast<U32>(shuffle(a, b, from_upper));
}

// From even and odd numbers to all in their order.
[[gnu::always_inline]] inline void interleave(F32& even, F32& odd) {
  const F32 first = shuffle(even, odd, [](auto i) { return in_turn(i, kLanes); });
  odd = shuffle(even, odd, [](auto i) { return in_turn(i, kLanes) + kLanes / 2; });
  even = first;
}

// sums[i * sums_stride + e] += the sum over rows of weights[i * weights_stride + row] * row[e], for
// Count left rows and the Vectors * kLanes columns from `begin` on, of which those before `size`
// may be read where not Whole. The number of rows is even. For `ahead` see qk_dot.
template <int Count, int Vectors, bool Whole, class Element>
[[gnu::always_inline]] inline void pv_accumulate(const float* weights, int64_t weights_stride,
                                                 const Element* const* rows, int64_t count,
                                                 int64_t begin, int64_t size,
                                                 Prefetcher<Element>* ahead, float* sums,
                                                 int64_t sums_stride) {
  constexpr int64_t kBytes = Vectors * kLanes * static_cast<int64_t>(sizeof(Element));
  constexpr int64_t kPrefetchPeriod = max(1, 2 * Prefetcher<Element>::kLine / kBytes);
  F32 products[Count][Vectors] = {};
  for (int64_t s = 0; s < count; s += kUsesBF16Dot<Element> ? 2 : 1) {
    if constexpr (kUsesPrefetch) {
      if (ahead != nullptr && s % kPrefetchPeriod == 0) ahead->advance(kBytes);
    } else if (begin == 0) {
      touch_row(rows[s], size);
      if constexpr (kUsesBF16Dot<Element>) touch_row(rows[s + 1], size);
    }
    if constexpr (kUsesBF16Dot<Element>) {
      static_assert(Vectors % 2 == 0);
      U32 columns[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v += 2) {
        const auto load_row = [&](const Element* row) {
          return Whole ? load_as<U16x2>(row + begin + v * kLanes)
                       : load_partial<U16x2>(row + begin, size - begin);
        };
        pair_up(load_row(rows[s]), load_row(rows[s + 1]), columns[v], columns[v + 1]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        const BF16Pair* pairs =
            reinterpret_cast<const BF16Pair*>(weights + i * weights_stride) + s / 2;
        const U32 weight = Dot<BF16Pair>::broadcast(pairs);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
          products[i][v] = Dot<BF16Pair>::add(products[i][v], weight, columns[v]);
      }
    } else {
      F32 columns[Vectors];
      if constexpr (kDeinterleaves<Element>) {
        static_assert(Vectors % 2 == 0);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v += 2) {
          const Element* from = rows[s] + begin + v * kLanes;
          const U32 pairs = Whole ? load_as<U32>(from) : load_partial<U32>(from, size - begin);
          columns[v] = even_of(pairs);
          columns[v + 1] = odd_of(pairs);
        }
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
          columns[v] =
              Whole ? load(rows[s] + begin + v * kLanes) : load_n(rows[s] + begin, size - begin);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
          products[i][v] += weights[i * weights_stride + s] * columns[v];
    }
  }
  if constexpr (kDeinterleaves<Element>) {
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v += 2) interleave(products[i][v], products[i][v + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      float* to = sums + i * sums_stride + v * kLanes;
      store(to, load(to) + products[i][v]);
    }
}

}  // namespace polyhead::POLYHEAD_ISA
