#include "mask_rows.hpp"

#include <atomic>
#include <cstring>

namespace polyhead {
namespace {

// Below this many bytes the threads of a team cost more than they save.
constexpr int64_t kSerialBytes = 1 << 17;
constexpr int64_t kStep = 128, kShortStep = 16;

// Kinds of elements by their bits. Negative floats are ordered as their bits are.
struct Boolean {
  using Bits = uint8_t;
  static bool allows(Bits bits) { return bits != 0; }
  static bool forbids(Bits bits) { return bits == 0; }
  static bool is_finite(Bits) { return false; }
};

// kLowest: the bits of the largest float that forbids; kInfinity: those of -inf.
template <class T, T kLowest, T kInfinity>
struct Float {
  using Bits = T;
  static bool allows(Bits bits) { return static_cast<Bits>(bits << 1) == 0; }
  static bool forbids(Bits bits) { return bits >= kLowest && bits <= kInfinity; }
  static bool is_finite(Bits bits) { return bits != kInfinity; }
};

using F32 = Float<uint32_t, 0xF149F2CAu, 0xFF800000u>;  // -1e30f
using BF16 = Float<uint16_t, 0xF14A, 0xFF80>;           // the first bfloat16 below -1e30
// The lowest float16, -65504, is a score that queries and keys can outweigh.
using F16 = Float<uint16_t, 0xFC00, 0xFC00>;

// True if the test accepts kCount elements: without a branch, so that it is compiled to vectors.
template <int64_t kCount, class Bits, class Test>
bool accepts(const Bits* elements, Test test) {
  Bits refused = 0;
  for (int64_t i = 0; i < kCount; ++i) refused |= static_cast<Bits>(test(elements[i]) ? 0 : 1);
  return refused == 0;
}

// First position from `at` on whose element the test refuses, or `end`.
template <class Bits, class Test>
int64_t run_of(const Bits* row, int64_t at, int64_t end, Test test) {
  while (at + kStep <= end && accepts<kStep>(row + at, test)) at += kStep;
  while (at + kShortStep <= end && accepts<kShortStep>(row + at, test)) at += kShortStep;
  while (at < end && test(row[at])) ++at;
  return at;
}

template <class Element>
MaskRows read(const DenseMask& mask, int threads, int64_t* ranges) {
  using Bits = typename Element::Bits;
  const int64_t rows = mask.batches * mask.rows;
  const int64_t bytes = rows * mask.keys * static_cast<int64_t>(sizeof(Bits));
  std::atomic<bool> is_structured{true}, has_lowest{false};
#pragma omp parallel for num_threads(threads) if (threads > 1 && bytes > kSerialBytes)
  for (int64_t i = 0; i < rows; ++i) {
    if (!is_structured.load(std::memory_order_relaxed)) continue;
    const Bits* row = static_cast<const Bits*>(mask.data) + i / mask.rows * mask.batch_stride +
                      i % mask.rows * mask.row_stride;
    const int64_t begin = run_of(row, 0, mask.keys, Element::forbids);
    const int64_t end = run_of(row, begin, mask.keys, Element::allows);
    if (run_of(row, end, mask.keys, Element::forbids) < mask.keys) is_structured = false;
    const auto is_infinite = [](Bits bits) { return !Element::is_finite(bits); };
    if (sizeof(Bits) > 1 && (run_of(row, 0, begin, is_infinite) < begin ||
                             run_of(row, end, mask.keys, is_infinite) < mask.keys))
      has_lowest = true;
    ranges[2 * i] = begin < end ? begin : 0;
    ranges[2 * i + 1] = begin < end ? end : 0;
  }
  if (!is_structured) return MaskRows::unstructured;
  return has_lowest ? MaskRows::lowest : MaskRows::ranges;
}

}  // namespace

MaskRows mask_rows(const DenseMask& mask, int threads, int64_t* ranges) {
  switch (mask.element) {
    case MaskElement::boolean: return read<Boolean>(mask, threads, ranges);
    case MaskElement::f32: return read<F32>(mask, threads, ranges);
    case MaskElement::bf16: return read<BF16>(mask, threads, ranges);
    default: return read<F16>(mask, threads, ranges);
  }
}

}  // namespace polyhead
