// Scratch memory of one call, and the number of the calling thread.
#pragma once

#include <omp.h>

#include <cstdlib>

#include "simd/vec.hpp"

namespace polyhead::POLYHEAD_ISA {

// Uninitialized, aligned to a cache line. Allocated before threads start, where throwing is
// allowed.
template <class Element>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<Element*>(std::aligned_alloc(
            64, static_cast<size_t>(round_up(size * static_cast<int64_t>(sizeof(Element)), 64))))) {
    if (data_ == nullptr && size > 0) throw_bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Element* data() const { return data_; }

 private:
  Element* data_;
};

inline int64_t thread_number() { return omp_get_thread_num(); }

}  // namespace polyhead::POLYHEAD_ISA
