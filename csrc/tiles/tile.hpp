// gemm micro-kernel: a register tile of a few rows by a few vectors of columns, whose accumulators
// stay in registers over the whole depth.
//
// lhs is read element by element and broadcast, rhs is read in vectors. A step of the depth is one
// float32 element, or two consecutive bfloat16 (a BF16Pair, as in VNNI layouts).
#pragma once

#include "simd/vec.hpp"

namespace polyhead::POLYHEAD_ISA {

template <class Element>
struct Dot;  // elements of the depth per step, and the multiply-add of a step

template <>
struct Dot<float> {
  static constexpr int kElementsPerStep = 1;
  static F32 broadcast(const float* a) { return splat(*a); }
  static F32 add(F32 sum, F32 a, F32 b) { return sum + a * b; }
  static F32 right(const float* b) { return load(b); }
};

template <>
struct Dot<BF16Pair> {
  static constexpr int kElementsPerStep = 2;
  static U32 broadcast(const BF16Pair* a) { return a->bits - U32{}; }
  static U32 right(const BF16Pair* b) { return load_as<U32>(b); }
  static F32 add(F32 sum, U32 a, U32 b) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<F32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                  reinterpret_cast<__m512bh>(a),
                                                  reinterpret_cast<__m512bh>(b)));
#elif defined(POLYHEAD_NEON_BF16)
    return reinterpret_cast<F32>(vbfdotq_f32(reinterpret_cast<float32x4_t>(sum),
                                             reinterpret_cast<bfloat16x8_t>(a),
                                             reinterpret_cast<bfloat16x8_t>(b)));
#else
    const F32 first = reinterpret_cast<F32>(a << 16) * reinterpret_cast<F32>(b << 16);
    const U32 upper = U32{} + 0xFFFF0000U;
    return sum + first + reinterpret_cast<F32>(a & upper) * reinterpret_cast<F32>(b & upper);
#endif
  }
};

// rhs operands that are read unpacked, and converted when loaded.
template <>
struct Dot<BFloat16> : Dot<float> {
  static F32 right(const BFloat16* b) { return load(b); }
};
template <>
struct Dot<Float16> : Dot<float> {
  static F32 right(const Float16* b) { return load(b); }
};

template <class LhsElement>
struct Lhs {
  const LhsElement* data;
  int64_t row;   // stride of rows
  int64_t step;  // stride of steps of the depth
};

template <class Right>
struct Rhs {
  const Right* data;
  int64_t step;
  int64_t valid = kLanes;  // columns that may be read, of a single vector
};

// products = lhs (Rows x depth) @ rhs (depth x Vectors * kLanes); the epilogue
// `finish(row, vector, product)` receives each vector of the accumulators.
template <int Rows, int Vectors, bool Whole, class LhsElement, class Right, class Finish>
[[gnu::always_inline]] inline void tile(Lhs<LhsElement> left, Rhs<Right> right, int64_t steps,
                                        Finish&& finish) {
  F32 sums[Rows][Vectors] = {};
  const LhsElement* a = left.data;
  const Right* b = right.data;
  for (int64_t step = 0; step < steps; ++step, a += left.step, b += right.step) {
    decltype(Dot<Right>::right(b)) columns[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (Whole) {
        columns[v] = Dot<Right>::right(b + v * kLanes);
      } else {
        columns[v] = load_n(b, right.valid);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const auto number = Dot<LhsElement>::broadcast(a + row * left.row);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v)
        sums[row][v] = Dot<LhsElement>::add(sums[row][v], number, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) finish(row, v, sums[row][v]);
}

// A tile whose height, at most kTileRows, is known at run time. (Always inline: a call per tile
// would take a twentieth of prefill's time.)
template <int Vectors, bool Whole = true, class LhsElement, class Right, class Finish>
[[gnu::always_inline]] inline void tile_of(int64_t rows, Lhs<LhsElement> left, Rhs<Right> right,
                                           int64_t steps, Finish&& finish) {
  switch (rows) {
    case 1: return tile<1, Vectors, Whole>(left, right, steps, finish);
    case 2: return tile<2, Vectors, Whole>(left, right, steps, finish);
    case 3: return tile<3, Vectors, Whole>(left, right, steps, finish);
    case 4: return tile<4, Vectors, Whole>(left, right, steps, finish);
    case 5: return tile<5, Vectors, Whole>(left, right, steps, finish);
    default: return tile<6, Vectors, Whole>(left, right, steps, finish);
  }
}

// A tile whose width, at most kTileVectors, is known at run time too.
template <class LhsElement, class Right, class Finish>
[[gnu::always_inline]] inline void tile_of(int64_t rows, int64_t vectors, Lhs<LhsElement> left,
                                           Rhs<Right> right, int64_t steps, Finish&& finish) {
  static_assert(kTileVectors <= 4);
  switch (vectors) {
    case 1: return tile_of<1>(rows, left, right, steps, finish);
    case 2: return tile_of<2>(rows, left, right, steps, finish);
    case 3: return tile_of<(kTileVectors < 3 ? 1 : 3)>(rows, left, right, steps, finish);
    default: return tile_of<kTileVectors>(rows, left, right, steps, finish);
  }
}

}  // namespace polyhead::POLYHEAD_ISA
