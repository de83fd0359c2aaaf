// Random tensors for the test of the kernels: any dtype and strides, in memory of exact size, with
// NaN in every gap.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "params.hpp"

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

#if defined(__aarch64__)  // where GCC 12's C++ has no _Float16
using Half = __fp16;
#else
using Half = _Float16;
#endif

inline uint16_t half_bits(double x, Dtype dtype) {
  if (dtype == Dtype::f16) {
    const auto half = static_cast<Half>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  const auto single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return static_cast<uint16_t>(bits >> 16);  // truncated: as random as rounded
}

inline double half_value(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::f16) {
    Half half;
    std::memcpy(&half, &bits, 2);
    return static_cast<double>(half);
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float single;
  std::memcpy(&single, &wide, 4);
  return single;
}

// Memory of exactly `size` elements of a dtype, initially NaN, or 127 for int8.
class Memory {
 public:
  Memory(Dtype dtype, int64_t size) : dtype_(dtype), size_(size) {
    if (dtype == Dtype::i8) {
      int8s_ = std::make_unique<int8_t[]>(size);
      std::fill_n(int8s_.get(), size, int8_t{127});
    } else if (dtype == Dtype::f32) {
      floats_ = std::make_unique<float[]>(size);
      std::fill_n(floats_.get(), size, NAN);
    } else {
      halves_ = std::make_unique<uint16_t[]>(size);
      std::fill_n(halves_.get(), size, uint16_t{0x7FFF});
    }
  }
  void set(int64_t i, double x) {
    if (dtype_ == Dtype::i8) {
      int8s_[i] = static_cast<int8_t>(std::lround(std::clamp(50.0 * x, -127.0, 127.0)));
    } else if (dtype_ == Dtype::f32) {
      floats_[i] = static_cast<float>(x);
    } else {
      halves_[i] = half_bits(x, dtype_);
    }
  }
  double get(int64_t i) const {
    if (dtype_ == Dtype::i8) return int8s_[i];
    return dtype_ == Dtype::f32 ? floats_[i] : half_value(halves_[i], dtype_);
  }
  const void* at(int64_t i) const {
    if (dtype_ == Dtype::i8) return &int8s_[i];
    return dtype_ == Dtype::f32 ? static_cast<const void*>(&floats_[i]) : &halves_[i];
  }
  void* data() { return const_cast<void*>(at(0)); }
  int64_t size() const { return size_; }

 private:
  Dtype dtype_;
  int64_t size_;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<uint16_t[]> halves_;
  std::unique_ptr<int8_t[]> int8s_;
};

// Strides of a tensor whose axes are in any order in memory, with gaps; 0 for a size of 1.
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
  int64_t skip = one_of({0, 0, 1, 3});  // for any alignment
  Memory memory;
  TensorView view;

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
  void set(const Sizes& i, double x) { memory.set(skip + layout.at(i), x); }
};

// Block table of a paged cache, with blocks in any order; or none, for a contiguous cache.
struct Table {
  int64_t block_size = 0, blocks = 0, columns = 0;
  std::vector<int32_t> numbers;

  Table() = default;
  Table(int64_t rows, int64_t tokens) : block_size(one_of({1, 2, 5, 16, 40, 64})) {
    columns = (tokens + block_size - 1) / block_size;
    blocks = rows * columns + integer(0, 3);
    std::vector<int32_t> pool(blocks);
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), generator);
    numbers.assign(pool.begin(), pool.begin() + rows * columns);
    // Sequences with a common prefix share their first block.
    if (rows > 1 && chance(2)) numbers[columns] = numbers[0];
  }
};

// Cached keys or values: contiguous or paged, optionally int8. Unused slots are NaN.
class CachedTensor {
 public:
  TensorView view;

  CachedTensor(Dtype dtype, bool is_int8, const Table& table, const Sizes& sizes)
      : table_(table), data_(is_int8 ? Dtype::i8 : dtype, pool_sizes(table, sizes)) {
    const Sizes& pool = data_.sizes;
    view = data_.view;
    if (is_int8) {
      scales_ = std::make_unique<Tensor>(Dtype::f32, Sizes{pool[0], pool[1], pool[2], 1}, false);
      for (int64_t i = 0; i < scales_->memory.size(); ++i)  // int8 values are about 50
        scales_->memory.set(i, scales_->memory.get(i) / 50.0);
      view.scales = static_cast<const float*>(scales_->view.data);
      std::copy_n(scales_->view.stride, 3, view.scale_stride);
    }
    if (table.block_size == 0) return;
    view.block_table = table_.numbers.data();
    view.block_table_stride = table.columns, view.block_size = table.block_size;
    std::vector<bool> is_used(pool[0] * pool[2]);
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t s = 0; s < sizes[2]; ++s) {
        const auto [block, slot] = place(b, s);
        is_used[block * pool[2] + slot] = true;
      }
    Tensor& numbers = is_int8 ? *scales_ : data_;
    for (int64_t i = 0; i < pool[0] * pool[2]; ++i)
      for (int64_t g = 0; g < pool[1]; ++g)
        for (int64_t d = 0; d < numbers.sizes[3]; ++d)
          if (!is_used[i]) numbers.set({i / pool[2], g, i % pool[2], d}, NAN);
  }

  double operator()(int64_t b, int64_t g, int64_t s, int64_t d) const {
    const auto [first, second] = place(b, s);
    const double number = data_(first, g, second, d);
    return scales_ ? number * (*scales_)(first, g, second, 0) : number;
  }

 private:
  static Sizes pool_sizes(const Table& table, const Sizes& sizes) {
    if (table.block_size == 0) return sizes;
    return {table.blocks, sizes[1], table.block_size, sizes[3]};
  }
  std::array<int64_t, 2> place(int64_t b, int64_t s) const {
    if (table_.block_size == 0) return {b, s};
    return {table_.numbers[b * table_.columns + s / table_.block_size], s % table_.block_size};
  }

  Table table_;
  Tensor data_;
  std::unique_ptr<Tensor> scales_;
};

}  // namespace polyhead
