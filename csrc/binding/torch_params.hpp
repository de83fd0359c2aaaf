// Validates the arguments of an operator, and converts them to AttentionParams.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "key_ranges.hpp"
#include "params.hpp"

namespace polyhead {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "polyhead: needs float32, bfloat16 or float16");
  }
}

using Sizes = int64_t[4];
constexpr int64_t kAny = -1;

// Strides of a tensor that broadcasts to `sizes`: 0 for dimensions of size 1.
inline void broadcast_strides(const Tensor& tensor, const char* name, const Sizes& sizes,
                              int64_t (&stride)[4]) {
  STD_TORCH_CHECK(tensor.dim() <= 4, "polyhead: ", name, " must have at most 4 dimensions");
  const int64_t missing = 4 - tensor.dim();
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t size = i < missing ? 1 : tensor.size(i - missing);
    STD_TORCH_CHECK(size == 1 || size == sizes[i], "polyhead: ", name, " must have size 1 or ",
                    sizes[i], " in dimension ", i, " of 4; got ", size);
    stride[i] = size == 1 ? 0 : tensor.stride(i - missing);
  }
}

// View of a 4-dimensional tensor of these sizes with contiguous rows.
inline TensorView rows_of(const Tensor& tensor, const char* name, const Sizes& sizes,
                          bool is_int8 = false) {
  STD_TORCH_CHECK(tensor.dim() == 4, "polyhead: ", name, " must have 4 dimensions");
  TensorView view;
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t size = tensor.size(i);
    STD_TORCH_CHECK(sizes[i] == kAny || size == sizes[i], "polyhead: ", name, " must have size ",
                    sizes[i], " in dimension ", i, "; got ", size);
    view.stride[i] = size == 1 ? 0 : tensor.stride(i);
  }
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, "polyhead: ", name,
                  " must have contiguous features (last stride 1)");
  STD_TORCH_CHECK(tensor.size(3) <= kMaxHeadSize, "polyhead: ", name, " has a head size above ",
                  kMaxHeadSize);
  view.data = tensor.const_data_ptr();
  view.dtype = is_int8 ? Dtype::i8 : dtype_of(tensor);
  return view;
}

// `count` contiguous float32 elements, or nullptr.
inline const float* floats_of(const OptionalTensor& tensor, const char* name, int64_t count) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                      tensor->numel() == count,
                  "polyhead: ", name, " must be ", count, " float32 numbers, contiguous; got ",
                  tensor->numel());
  return static_cast<const float*>(tensor->const_data_ptr());
}

// The softmax state: the first three of `saved`, which has nine with statistics.
inline const float* softmax_state_of(const Tensor& saved, int64_t rows) {
  const bool has_stats = saved.dim() == 4 && saved.size(0) == 9;
  return floats_of(saved, "saved", (has_stats ? 9 : 3) * rows);
}

// View of cached keys or values: quantized with scales, paged, or both.
inline TensorView cache_view_of(const Tensor& data, const OptionalTensor& scales,
                                const OptionalTensor& table, const char* name, const Sizes& sizes) {
  const auto [B, G, S, size] = sizes;
  const Sizes blocks{kAny, G, kAny, size};
  TensorView view = rows_of(data, name, table ? blocks : sizes, scales.has_value());
  if (scales) {
    STD_TORCH_CHECK(data.scalar_type() == ScalarType::Char, "polyhead: quantized ", name,
                    " must be int8");
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->dim() == 3,
                    "polyhead: scales must be float32, of 3 dimensions");
    for (int64_t i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(scales->size(i) == data.size(i), "polyhead: ", name,
                      " must have one scale per token and head");
      view.scale_stride[i] = scales->size(i) == 1 ? 0 : scales->stride(i);
    }
    view.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  if (!table) return view;
  view.block_size = data.size(2);
  STD_TORCH_CHECK(table->scalar_type() == ScalarType::Int && table->dim() == 2 &&
                      table->is_contiguous() && table->size(0) == B,
                  "polyhead: table must be (B, columns), int32 and contiguous");
  view.block_table = static_cast<const int32_t*>(table->const_data_ptr());
  view.block_table_stride = table->size(1);
  STD_TORCH_CHECK(S <= view.block_table_stride * view.block_size,
                  "polyhead: table must have a block for each token");
  view.blocks = data.size(0);
  return view;
}

// Checks the entries of a block table that are read: those of keys before the last kv_end of a row.
inline void check_block_table(const AttentionParams& a, const TensorView& view) {
  if (view.block_table == nullptr) return;
  for (int64_t b = 0; b < a.B; ++b) {
    const int32_t* kv_end = a.kv_end + b * a.kv_range_stride;
    const int64_t tokens = a.T == 0 ? 0 : *std::max_element(kv_end, kv_end + a.T);
    const int32_t* row = view.block_table + b * view.block_table_stride;
    for (int64_t i = 0; i * view.block_size < tokens; ++i)
      STD_TORCH_CHECK(row[i] >= 0 && row[i] < view.blocks,
                      "polyhead: block_table must have numbers of blocks, 0 to ", view.blocks - 1,
                      "; got ", row[i], " in row ", b, ", column ", i);
  }
}

// Elements of an int32 or int64 tensor with any strides: (size,) or (batch rows, size).
inline std::vector<int64_t> integers_of(const OptionalTensor& tensor, const char* name,
                                        int64_t size, int64_t B = 1) {
  std::vector<int64_t> integers;
  if (!tensor) return integers;
  const bool is_matrix = tensor->dim() == 2;
  const int64_t rows = is_matrix ? tensor->size(0) : 1;
  const int64_t columns = tensor->size(is_matrix ? 1 : 0);
  const int64_t row_stride = is_matrix ? tensor->stride(0) : 0;
  const int64_t column_stride = tensor->stride(is_matrix ? 1 : 0);
  const bool is_wide = tensor->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_wide || tensor->scalar_type() == ScalarType::Int, "polyhead: ", name,
                  " must be int32 or int64");
  STD_TORCH_CHECK(tensor->dim() <= 2 && columns == size && (rows == 1 || rows == B),
                  "polyhead: ", name, " must be ", size,
                  " numbers, for all batch rows or for each of ", B);
  integers.reserve(static_cast<size_t>(rows * columns));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t at = row * row_stride + column * column_stride;
      integers.push_back(is_wide ? static_cast<const int64_t*>(tensor->const_data_ptr())[at]
                                 : static_cast<const int32_t*>(tensor->const_data_ptr())[at]);
    }
  }
  return integers;
}

// Torch's number of threads, or 1 if waking a second one takes longer than the work.
inline int threads_for(const AttentionParams& a) {
  constexpr double kSmall = 1 << 17;  // multiplications
  const double work = static_cast<double>(a.B) * a.H * a.T * a.S * (a.D + a.E);
  return work < kSmall ? 1 : static_cast<int>(torch::stable::get_num_threads());
}

// Sets what `Kernels::forward_kernel` depends on, apart from needs_grad.
inline void set_sizes(AttentionParams& a, int64_t B, int64_t H, int64_t G, int64_t T, int64_t S,
                      int64_t D, int64_t E) {
  STD_TORCH_CHECK(T <= kMaxTokens && S <= kMaxTokens, "polyhead: at most ", kMaxTokens, " tokens");
  STD_TORCH_CHECK(G > 0 && H % G == 0, "polyhead: H must be a multiple of G");
  a.B = B, a.H = H, a.G = G, a.T = T, a.S = S, a.D = D, a.E = E;
  a.threads = threads_for(a);
}

// AttentionParams, and the storage of its key ranges and query offsets.
struct ParamsFromTensors {
  AttentionParams attention;
  Ranges ranges;
  std::vector<int64_t> offsets;

  ParamsFromTensors(const Tensor& query, const Tensor& key, const Tensor& value,
                    const OptionalTensor& bias, const OptionalTensor& allowed,
                    const OptionalTensor& lengths, const OptionalTensor& padding,
                    const OptionalTensor& documents, const OptionalTensor& query_offset,
                    const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
                    const OptionalTensor& seed, const std::vector<int64_t>& band, double scale,
                    double softcap, double dropout)
      : ParamsFromTensors(query, key.size(1), key.size(2), value.size(3),
                          rows_of(key, "key", {query.size(0), kAny, kAny, query.size(3)}),
                          rows_of(value, "value", {query.size(0), key.size(1), key.size(2), kAny}),
                          bias, allowed, lengths, padding, documents, query_offset, sinks,
                          alibi_slopes, seed, band, scale, softcap, dropout) {}

  ParamsFromTensors(const Tensor& query, int64_t G, int64_t S, int64_t E, const TensorView& key,
                    const TensorView& value, const OptionalTensor& bias,
                    const OptionalTensor& allowed, const OptionalTensor& lengths,
                    const OptionalTensor& padding, const OptionalTensor& documents,
                    const OptionalTensor& query_offset, const OptionalTensor& sinks,
                    const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
                    const std::vector<int64_t>& band, double scale, double softcap,
                    double dropout) {
    AttentionParams& a = attention;
    a.query = rows_of(query, "query", {kAny, kAny, kAny, kAny});
    a.key = key;
    a.value = value;
    set_sizes(a, query.size(0), query.size(1), G, query.size(2), S, query.size(3), E);
    STD_TORCH_CHECK(
        a.key.dtype == a.value.dtype && (a.key.dtype == a.query.dtype || a.key.scales != nullptr),
        "polyhead: query, key and value must have one dtype, or key and value be quantized");
    STD_TORCH_CHECK(band.size() == 5, "polyhead: band must have 5 numbers");
    const Sizes scores{a.B, a.H, a.T, a.S};
    if (bias) {
      a.bias.data = bias->const_data_ptr();
      a.bias.dtype = dtype_of(*bias);
      broadcast_strides(*bias, "bias", scores, a.bias.stride);
    }
    if (allowed) {
      STD_TORCH_CHECK(allowed->scalar_type() == ScalarType::Bool, "polyhead: allowed must be bool");
      a.dense_mask = static_cast<const uint8_t*>(allowed->const_data_ptr());
      broadcast_strides(*allowed, "allowed", scores, a.dense_mask_stride);
    }
    STD_TORCH_CHECK(!documents || a.T <= a.S, "polyhead: documents need a key for each query");
    if (query_offset)
      offsets = integers_of(query_offset, "query_offset", query_offset->size(0) == 1 ? 1 : a.B);
    if (!offsets.empty()) a.query_offset = offsets.data();
    a.query_offset_stride = offsets.size() > 1 ? 1 : 0;
    ranges = ranges_of({band[0], band[1], band[2], band[3], band[4]}, a.B, a.T, a.S,
                       integers_of(lengths, "lengths", a.B), integers_of(padding, "padding", a.B),
                       integers_of(documents, "documents", a.S, a.B), offsets);
    a.kv_begin = ranges.kv_begin.data();
    a.kv_end = ranges.kv_end.data();
    a.kv_range_stride = ranges.batches > 1 ? a.T : 0;
    if (!ranges.doc_ids.empty()) {
      a.doc_ids = ranges.doc_ids.data();
      a.doc_ids_stride = ranges.doc_batches > 1 ? a.S : 0;
    }
    a.sinks = floats_of(sinks, "sinks", a.H);
    a.alibi_slopes = floats_of(alibi_slopes, "alibi_slopes", a.H);
    a.scale = static_cast<float>(scale);
    a.softcap = static_cast<float>(softcap);
    a.dropout = dropout;
    if (seed) a.seed = static_cast<uint64_t>(integers_of(seed, "seed", 1).at(0));
    check_block_table(a, a.key);
    check_block_table(a, a.value);
  }
};

}  // namespace polyhead
