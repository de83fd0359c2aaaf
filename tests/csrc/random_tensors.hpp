// Random tensors for a test of the kernels: any dtype, any strides, in memory of exactly the size
// needed, with NaN in every gap.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "attention.hpp"

namespace polyhead {

using Sizes = std::array<int64_t, 4>;

inline std::mt19937_64 generator;

inline int64_t integer(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}
inline int64_t one_of(std::initializer_list<int64_t> choices) {
  return choices.begin()[integer(0, static_cast<int64_t>(choices.size()) - 1)];
}
inline bool chance(int64_t one_in) { return integer(1, one_in) == 1; }
inline double normal() { return std::normal_distribution<double>()(generator); }

// The largest relative error of rounding to a dtype.
inline double unit_of(Dtype dtype) {
  return dtype == Dtype::f32 ? 0x1p-24 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11;
}

inline uint16_t half_bits(double x, Dtype dtype) {
  if (dtype == Dtype::f16) {
    const auto half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  const auto single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return static_cast<uint16_t>(bits >> 16);  // cut off: as good a random number as rounded
}

inline double half_value(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::f16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<double>(half);
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float single;
  std::memcpy(&single, &wide, 4);
  return single;
}

// Memory of exactly `size` numbers of a dtype, NaN at first.
class Memory {
 public:
  Memory(Dtype dtype, int64_t size) : dtype_(dtype), size_(size) {
    if (dtype == Dtype::f32) {
      floats_ = std::make_unique<float[]>(size);
      std::fill_n(floats_.get(), size, NAN);
    } else {
      halves_ = std::make_unique<uint16_t[]>(size);
      std::fill_n(halves_.get(), size, uint16_t{0x7FFF});
    }
  }
  void set(int64_t i, double x) {
    if (dtype_ == Dtype::f32) {
      floats_[i] = static_cast<float>(x);
    } else {
      halves_[i] = half_bits(x, dtype_);
    }
  }
  double get(int64_t i) const {
    return dtype_ == Dtype::f32 ? floats_[i] : half_value(halves_[i], dtype_);
  }
  const void* at(int64_t i) const {
    return dtype_ == Dtype::f32 ? static_cast<const void*>(&floats_[i]) : &halves_[i];
  }
  void* data() { return const_cast<void*>(at(0)); }
  int64_t size() const { return size_; }

 private:
  Dtype dtype_;
  int64_t size_;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<uint16_t[]> halves_;
};

// The strides of a tensor whose axes lie in memory in any order, with gaps; 0 where the size is 1.
struct Layout {
  Sizes stride{};
  int64_t extent = 1;

  Layout(const Sizes& sizes, bool last_is_dense) {
    std::array<int, 4> axes{3, 2, 1, 0};  // the innermost first
    std::shuffle(axes.begin() + (last_is_dense ? 1 : 0), axes.end(), generator);
    int64_t step = last_is_dense ? 1 : one_of({1, 1, 2});
    for (int axis : axes) {
      if (sizes[axis] > 1) {
        stride[axis] = step;
        extent += (sizes[axis] - 1) * step;
      }
      step = step * sizes[axis] + one_of({0, 0, 1, 5});
    }
  }
  int64_t at(const Sizes& i) const {
    return std::inner_product(i.begin(), i.end(), stride.begin(), int64_t{0});
  }
};

struct Tensor {
  Sizes sizes;
  Layout layout;
  int64_t skip = one_of({0, 0, 1, 3});  // so that it starts anywhere in a vector
  Memory memory;
  View view;

  Tensor(Dtype dtype, const Sizes& sizes, bool last_is_dense = true)
      : sizes(sizes), layout(sizes, last_is_dense), memory(dtype, skip + layout.extent) {
    Sizes i;
    for (i[0] = 0; i[0] < sizes[0]; ++i[0])
      for (i[1] = 0; i[1] < sizes[1]; ++i[1])
        for (i[2] = 0; i[2] < sizes[2]; ++i[2])
          for (i[3] = 0; i[3] < sizes[3]; ++i[3]) memory.set(skip + layout.at(i), normal());
    view.data = memory.at(skip);
    view.dtype = dtype;
    std::copy(layout.stride.begin(), layout.stride.end(), view.stride);
  }
  // A size of 1 broadcasts.
  double operator()(int64_t b, int64_t h, int64_t t, int64_t d) const {
    return memory.get(skip + layout.at({b, h, t, d}));
  }
};

}  // namespace polyhead
