// Software prefetch for rows of keys and values that are read in place (see kUsesPrefetch).
#pragma once

#include "simd/vec.hpp"

namespace polyhead::POLYHEAD_ISA {

// Touches the cache lines of a row in address order, before they are multiplied in another order:
// only then does the hardware prefetcher detect a stream.
template <class Element>
inline void touch_row(const Element* row, int64_t size) {
  const auto* bytes = reinterpret_cast<const volatile char*>(row);
  // Two lines per iteration: with one the loop itself would take most of the time.
  const int64_t end = size * static_cast<int64_t>(sizeof(Element));
  int64_t i = 0;
  for (; i + 64 < end; i += 128) bytes[i], bytes[i + 64];
  if (i < end) bytes[i];
}

// Software prefetch of the next K and V block, paced with the current block's work (a burst would
// stall) and alternating between the two streams, which are read faster than one.
template <class Element>
struct Prefetcher {
  const Element* const* keys = nullptr;
  const Element* const* values = nullptr;
  int64_t count = 0;  // rows of each
  int64_t bytes = 0;  // of the longer row
  int64_t row = 0, at = 0;

  // Prefetches the number of bytes that were just worked on.
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

}  // namespace polyhead::POLYHEAD_ISA
