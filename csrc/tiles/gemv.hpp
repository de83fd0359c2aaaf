// gemv kernels of decode, on unpacked rows read in place: dot products of a few lhs rows with each
// row of K (scores), and sums of the rows of V by weight. Each row has its own address, so that
// tokens may be contiguous or in blocks anywhere.
#pragma once

#include <type_traits>
#include <utility>

#include "tiles/pack.hpp"
#include "tiles/prefetch.hpp"

namespace polyhead::POLYHEAD_ISA {

// True if bfloat16 rows are multiplied unconverted, two elements per instruction.
template <class Element>
constexpr bool kUsesBF16Dot = kHasBF16Dot && std::is_same_v<Element, BFloat16>;

// True if bfloat16 rows are read as pairs, and their even and odd elements converted separately: a
// shift and a mask for two vectors, where converting in order takes two instructions for each.
template <class Element>
constexpr bool kDeinterleaves = !kHasBF16Dot && std::is_same_v<Element, BFloat16>;

inline F32 even_of(U32 pairs) { return reinterpret_cast<F32>(pairs << 16); }
inline F32 odd_of(U32 pairs) { return reinterpret_cast<F32>(pairs & (U32{} + 0xFFFF0000U)); }

// Element of the lhs rows.
template <class Element>
using LhsElement = std::conditional_t<kUsesBF16Dot<Element>, BFloat16, float>;

// Elements of a row per step of a dot product; rows are padded to a multiple of it.
template <class Element>
constexpr int64_t kRowStep = std::is_same_v<Element, BFloat16> ? 2 * kLanes : kLanes;

// Elements of kLanes bfloat16 pairs.
using U16x2 [[gnu::vector_size(kVectorBytes)]] = uint16_t;

// Accumulators of `count` lhs rows: a power of two, for the reduction tree of reduce_add_each.
constexpr int sums_for(int count) {
  int power = 1;
  while (power < count) power *= 2;
  return power;
}

// dots[i * dots_stride + k] = lhs row i . row k, for Count lhs rows and Keys rows: independent
// accumulators, reduced at the end. lhs rows are padded with zeros to whole steps; where rows are
// deinterleaved, each step holds its even elements first. `ahead` is nullptr if these rows were
// read before.
template <int Count, int Keys, class Element>
[[gnu::always_inline]] inline void qk_dot(const LhsElement<Element>* left, int64_t left_stride,
                                          const Element* const* rows, int64_t size,
                                          Prefetcher<Element>* ahead, float* dots,
                                          int64_t dots_stride) {
  constexpr int64_t kStep = kRowStep<Element>;
  // Rows that share each load of an lhs row. Where rows are touched, float32 rows are too long for
  // it: the prefetcher detects no stream in four of them.
  constexpr int kRowsPerLoad = sizeof(Element) == 4 && !kUsesPrefetch ? 1 : min(Keys, 4);
  // (An initializer would zero memory, by a slow instruction, before every product.)
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
  // Not a loop: accumulators stay in registers only if their indices are constants.
  [&]<int... kShares>(std::integer_sequence<int, kShares...>) {
    (share.template operator()<kShares * kRowsPerLoad>(), ...);
  }(std::make_integer_sequence<int, Keys / kRowsPerLoad>());
  float totals[kSums];
  reduce_add_each(sums, totals);
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i)
    std::memcpy(dots + i * dots_stride, totals + i * Keys, sizeof(float) * Keys);
}

// Source of lane i where the lanes of two vectors, of `lanes` lanes each, alternate.
template <class Lane>
[[gnu::always_inline]] constexpr Lane alternating(Lane i, int16_t lanes) {
  return (i >> 1) + (i & 1) * lanes;
}

// Zips two bfloat16 rows into the pairs of each column, in the order of the columns.
inline void zip_bf16(U16x2 a, U16x2 b, U32& lower, U32& upper) {
  const auto from_lower = [](auto i) { return alternating(i, 2 * kLanes); };
  const auto from_upper = [](auto i) { return kLanes + alternating(i, 2 * kLanes); };
  lower = reinterpret_cast<U32>(shuffle(a, b, from_lower));
  upper = reinterpret_cast<U32>(shuffle(a, b, from_upper));
}

// Inverse of deinterleaving: even and odd elements back in order.
[[gnu::always_inline]] inline void interleave(F32& even, F32& odd) {
  const F32 first = shuffle(even, odd, [](auto i) { return alternating(i, kLanes); });
  odd = shuffle(even, odd, [](auto i) { return alternating(i, kLanes) + kLanes / 2; });
  even = first;
}

// sums[i * sums_stride + e] += the sum over rows of weights[i * weights_stride + row] * row[e], for
// Count lhs rows and the Vectors * kLanes columns from `begin` on; if not Whole, only columns
// before `size` are read. The number of rows is even. For `ahead` see qk_dot.
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
        zip_bf16(load_row(rows[s]), load_row(rows[s + 1]), columns[v], columns[v + 1]);
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
