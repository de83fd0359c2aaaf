// Dependencies between tasks of a parallel region, in place of barriers. A barrier makes every
// thread wait for the slowest, and libgomp's threads spin while they wait: beside other busy
// processes they take the core that the awaited thread needs.
#pragma once

#include <sched.h>

#include <cstring>

#include "simd/buffer.hpp"

namespace polyhead::POLYHEAD_ISA {

// One counter of finished tasks per KV head, or per slot of packed heads.
class Progress {
 public:
  explicit Progress(int64_t counters) : counts_(counters * kLine) {
    std::memset(counts_.data(), 0, static_cast<size_t>(counters * kLine) * sizeof(int64_t));
  }

  // Adds a finished task; returns the number of finished tasks.
  int64_t add(int64_t at) { return __atomic_add_fetch(counter(at), 1, __ATOMIC_ACQ_REL); }

  // Waits until `count` tasks are finished. They must have been started by other threads.
  void wait(int64_t at, int64_t count) const {
    constexpr int kSpins = 200;  // a few microseconds
    for (int spin = 0; __atomic_load_n(counter(at), __ATOMIC_ACQUIRE) < count; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int64_t kLine = 8;  // one cache line each

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int64_t* counter(int64_t at) const { return counts_.data() + at * kLine; }

  Buffer<int64_t> counts_;
};

}  // namespace polyhead::POLYHEAD_ISA
