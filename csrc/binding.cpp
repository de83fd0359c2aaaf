// The operators that torch sees. The only file that knows of torch, through its stable ABI, so that
// one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "fork.hpp"
#include "ranges.hpp"

namespace polyhead {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "polyhead: needs float32, bfloat16 or float16");
  }
}

// The strides of a tensor broadcast to four dimensions: 0 where its size is 1.
void broadcast_strides(const Tensor& tensor, int64_t (&stride)[4]) {
  STD_TORCH_CHECK(tensor.dim() <= 4, "polyhead: at most 4 dimensions");
  const int64_t missing = 4 - tensor.dim();
  for (int64_t i = 0; i < 4; ++i)
    stride[i] = i < missing || tensor.size(i - missing) == 1 ? 0 : tensor.stride(i - missing);
}

View view_of(const Tensor& tensor, bool are_codes = false) {
  View view;
  view.data = tensor.const_data_ptr();
  view.dtype = are_codes ? Dtype::i8 : dtype_of(tensor);
  broadcast_strides(tensor, view.stride);
  return view;
}

View rows_of(const Tensor& tensor, const char* name, bool are_codes = false) {
  STD_TORCH_CHECK(tensor.dim() == 4, "polyhead: ", name, " must have 4 dimensions");
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, "polyhead: ", name,
                  " must have its features side by side (last stride 1)");
  STD_TORCH_CHECK(tensor.size(3) <= kMaxHeadSize, "polyhead: ", name,
                  " has a head size above ", kMaxHeadSize);
  return view_of(tensor, are_codes);
}

const float* floats_of(const OptionalTensor& tensor) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                  "polyhead: numbers by head must be float32 and contiguous");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// Keys or values as a cache holds them: codes with scales, in blocks found through a table, or both.
View stored_of(const Tensor& data, const OptionalTensor& scales, const OptionalTensor& table,
             int64_t B, int64_t S, const char* name) {
  View view = rows_of(data, name, scales.has_value());
  if (scales) {
    STD_TORCH_CHECK(data.scalar_type() == ScalarType::Char, "polyhead: codes must be int8");
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->dim() == 3,
                    "polyhead: scales must be float32, of 3 dimensions");
    for (int64_t i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(scales->size(i) == data.size(i), "polyhead: ", name,
                      " must have one scale for each token and head");
      view.scale_stride[i] = scales->size(i) == 1 ? 0 : scales->stride(i);
    }
    view.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  if (!table) {
    STD_TORCH_CHECK(data.size(0) == B && data.size(2) == S, "polyhead: ", name,
                    " must have a row for each of the query's, and as many tokens as said");
    return view;
  }
  view.block_size = data.size(2);
  STD_TORCH_CHECK(table->scalar_type() == ScalarType::Int && table->dim() == 2 &&
                      table->is_contiguous() && table->size(0) == B,
                  "polyhead: table must be (B, columns), int32 and contiguous");
  view.table = static_cast<const int32_t*>(table->const_data_ptr());
  view.table_stride = table->size(1);
  STD_TORCH_CHECK(S <= view.table_stride * view.block_size,
                  "polyhead: table must have a block for each token");
  for (int64_t i = 0; i < table->numel(); ++i)
    STD_TORCH_CHECK(view.table[i] >= 0 && view.table[i] < data.size(0),
                    "polyhead: table must have numbers of blocks");
  return view;
}

// int32 or int64 of any strides, one or two dimensions.
std::vector<int64_t> integers_of(const OptionalTensor& tensor) {
  std::vector<int64_t> integers;
  if (!tensor) return integers;
  const bool is_matrix = tensor->dim() == 2;
  const int64_t rows = is_matrix ? tensor->size(0) : 1;
  const int64_t columns = tensor->size(is_matrix ? 1 : 0);
  const int64_t row_stride = is_matrix ? tensor->stride(0) : 0;
  const int64_t column_stride = tensor->stride(is_matrix ? 1 : 0);
  const bool is_wide = tensor->scalar_type() == ScalarType::Long;
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

// Torch's number of threads, or one where waking a second takes longer than the work.
int threads_for(const Attention& a) {
  constexpr double kSmall = 1 << 17;  // multiplications
  const double work = static_cast<double>(a.B) * a.H * a.T * a.S * (a.D + a.E);
  return work < kSmall ? 1 : static_cast<int>(torch::stable::get_num_threads());
}

// An `Attention`, and what its pointers point to beside the tensors.
struct Call {
  Attention attention;
  Ranges ranges;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
       const OptionalTensor& allowed, const OptionalTensor& lengths, const OptionalTensor& padding,
       const OptionalTensor& documents, const OptionalTensor& sinks,
       const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
       const std::vector<int64_t>& band, double scale, double softcap, double dropout)
      : Call(query, key.size(1), key.size(2), value.size(3), rows_of(key, "key"),
             rows_of(value, "value"), bias, allowed, lengths, padding, documents, sinks,
             alibi_slopes, seed, band, scale, softcap, dropout) {}

  Call(const Tensor& query, int64_t G, int64_t S, int64_t E, const View& key, const View& value,
       const OptionalTensor& bias, const OptionalTensor& allowed, const OptionalTensor& lengths,
       const OptionalTensor& padding, const OptionalTensor& documents, const OptionalTensor& sinks,
       const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
       const std::vector<int64_t>& band, double scale, double softcap, double dropout) {
    Attention& a = attention;
    a.query = rows_of(query, "query");
    a.key = key;
    a.value = value;
    a.B = query.size(0), a.H = query.size(1), a.T = query.size(2), a.D = query.size(3);
    a.G = G, a.S = S, a.E = E;
    STD_TORCH_CHECK(a.T < INT32_MAX && a.S < INT32_MAX, "polyhead: at most 2^31 - 2 tokens");
    STD_TORCH_CHECK(
        a.key.dtype == a.value.dtype && (a.key.dtype == a.query.dtype || a.key.scales != nullptr),
        "polyhead: query, key and value must have one dtype, or key and value be codes");
    STD_TORCH_CHECK(a.G > 0 && a.H % a.G == 0, "polyhead: H must be a multiple of G");
    STD_TORCH_CHECK(band.size() == 5, "polyhead: band must have 5 numbers");
    if (bias) a.bias = view_of(*bias);
    if (allowed) {
      a.allowed = static_cast<const uint8_t*>(allowed->const_data_ptr());
      broadcast_strides(*allowed, a.allowed_stride);
    }
    ranges = ranges_of({band[0], band[1], band[2], band[3], band[4]}, a.B, a.T, a.S,
                       integers_of(lengths), integers_of(padding), integers_of(documents));
    a.first = ranges.first.data();
    a.last = ranges.last.data();
    a.range_stride = ranges.batches > 1 ? a.T : 0;
    if (!ranges.documents.empty()) {
      a.document = ranges.documents.data();
      a.document_stride = ranges.document_batches > 1 ? a.S : 0;
    }
    a.sinks = floats_of(sinks);
    a.alibi_slopes = floats_of(alibi_slopes);
    a.scale = static_cast<float>(scale);
    a.softcap = static_cast<float>(softcap);
    a.dropout = dropout;
    if (seed) a.seed = static_cast<uint64_t>(integers_of(seed).at(0));
    a.threads = threads_for(a);
  }
};

Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// Filled here where torch, which would fill large ones with a team of its own, could hang.
Tensor zero_floats(const Tensor& like, std::vector<int64_t> sizes) {
  if (!may_miss_its_team()) return torch::stable::new_zeros(like, sizes, ScalarType::Float);
  const Tensor zeros = empty_floats(like, std::move(sizes));
  std::memset(zeros.mutable_data_ptr(), 0, static_cast<size_t>(zeros.numel()) * sizeof(float));
  return zeros;
}

float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor empty_output(const Attention& a, const Tensor& query) {
  return torch::stable::new_empty(query, std::vector<int64_t>{a.B, a.H, a.T, a.E});
}

void attend(const Attention& a, const Output& out) {
  if (a.B * a.H * a.T > 0) run_with_team(a.threads, [&] { kernels().forward(a, out); });
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const Attention& a, const Tensor& query,
                                               bool stats) {
  const Tensor output = empty_output(a, query);
  const Tensor lse = empty_floats(query, {a.B, a.H, a.T});
  const Tensor details = empty_floats(query, {stats ? 9 : 3, a.B, a.H, a.T});
  attend(a, {output.mutable_data_ptr(), data_of(lse), data_of(details),
             stats ? data_of(details) + 3 * lse.numel() : nullptr});
  return {output, lse, details};
}

template <bool kIsLearnt>
std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
    const OptionalTensor& allowed, const OptionalTensor& lengths, const OptionalTensor& padding,
    const OptionalTensor& documents, const OptionalTensor& sinks,
    const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
    const std::vector<int64_t>& band, double scale, double softcap, double dropout, bool stats) {
  Call call(query, key, value, bias, allowed, lengths, padding, documents, sinks, alibi_slopes,
            seed, band, scale, softcap, dropout);
  call.attention.is_learnt = kIsLearnt;
  return run_forward(call.attention, query, stats);
}

Tensor attention_output(const Tensor& query, const Tensor& key, const Tensor& value,
                        const OptionalTensor& bias, const OptionalTensor& allowed,
                        const OptionalTensor& lengths, const OptionalTensor& padding,
                        const OptionalTensor& documents, const OptionalTensor& sinks,
                        const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
                        const std::vector<int64_t>& band, double scale, double softcap,
                        double dropout) {
  const Call call(query, key, value, bias, allowed, lengths, padding, documents, sinks,
                  alibi_slopes, seed, band, scale, softcap, dropout);
  const Tensor output = empty_output(call.attention, query);
  attend(call.attention, {output.mutable_data_ptr()});
  return output;
}

bool is_plain(const Tensor& query, const Tensor& key, const Tensor& value) {
  const Tensor* const tensors[] = {&query, &key, &value};
  const ScalarType dtype = query.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    return false;
  for (const Tensor* tensor : tensors) {
    if (tensor->dim() != 4 || tensor->scalar_type() != dtype) return false;
    const int64_t size = tensor->size(3);
    if (size > kMaxHeadSize || (size > 1 && tensor->stride(3) != 1)) return false;
  }
  const int64_t H = query.size(1), G = key.size(1), D = query.size(3);
  for (int64_t i = 0; i < 3; ++i)
    if (key.size(i) != value.size(i)) return false;
  return key.size(0) == query.size(0) && key.size(3) == D && G > 0 && H > 0 && H % G == 0 && D > 0;
}

// Attention of every query to every key, where nothing is amiss and nothing has to be copied.
std::optional<Tensor> attention_plain(const Tensor& query, const Tensor& key, const Tensor& value,
                                      std::optional<double> scale) {
  if (!is_plain(query, key, value)) return std::nullopt;
  constexpr int64_t kUnbounded = int64_t{1} << 40;
  const double factor = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(query.size(3)));
  const Call call(query, key, value, {}, {}, {}, {}, {}, {}, {}, {},
                  {-kUnbounded, kUnbounded, kUnbounded, kUnbounded, 0}, factor, 0.0, 0.0);
  const Tensor output = empty_output(call.attention, query);
  attend(call.attention, {output.mutable_data_ptr()});
  return output;
}

std::tuple<Tensor, Tensor, Tensor> attention_stored(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_scales,
    const OptionalTensor& value_scales, const OptionalTensor& table, int64_t tokens,
    const OptionalTensor& bias, const OptionalTensor& allowed, const OptionalTensor& lengths,
    const OptionalTensor& padding, const OptionalTensor& documents, const OptionalTensor& sinks,
    const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
    const std::vector<int64_t>& band, double scale, double softcap, double dropout, bool stats) {
  const int64_t B = query.size(0);
  const Call call(query, key.size(1), tokens, value.size(3),
                  stored_of(key, key_scales, table, B, tokens, "key"),
                  stored_of(value, value_scales, table, B, tokens, "value"), bias, allowed, lengths,
                  padding, documents, sinks, alibi_slopes, seed, band, scale, softcap, dropout);
  return run_forward(call.attention, query, stats);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& output,
    const Tensor& lse, const Tensor& details, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& bias, const OptionalTensor& allowed,
    const OptionalTensor& lengths, const OptionalTensor& padding, const OptionalTensor& documents,
    const OptionalTensor& sinks, const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
    const std::vector<int64_t>& band, double scale, double softcap, double dropout,
    bool bias_grad, bool sinks_grad) {
  const Call call(query, key, value, bias, allowed, lengths, padding, documents, sinks,
                  alibi_slopes, seed, band, scale, softcap, dropout);
  const Attention& a = call.attention;
  const auto sizes_if = [](bool asked, const OptionalTensor& tensor) {
    if (!asked) return std::vector<int64_t>{0};
    return std::vector<int64_t>(tensor->sizes().begin(), tensor->sizes().end());
  };
  const Tensor query_grad = empty_floats(query, {a.B, a.H, a.T, a.D});
  const Tensor key_grad = zero_floats(query, {a.B, a.G, a.S, a.D});
  const Tensor value_grad = zero_floats(query, {a.B, a.G, a.S, a.E});
  const Tensor bias_gradient = zero_floats(query, sizes_if(bias_grad, bias));
  const Tensor sinks_gradient = zero_floats(query, sizes_if(sinks_grad, sinks));
  Gradients g;
  g.grad_output = rows_of(grad_output, "grad_output");
  g.output = rows_of(output, "output");
  g.lse = data_of(lse);
  g.shifts = data_of(details);
  g.grad_lse = floats_of(grad_lse);
  g.query = data_of(query_grad);
  g.key = data_of(key_grad);
  g.value = data_of(value_grad);
  if (bias_grad) {
    g.bias = data_of(bias_gradient);
    g.bias_size = bias_gradient.numel();
    broadcast_strides(bias_gradient, g.bias_stride);
  }
  if (sinks_grad) g.sinks = data_of(sinks_gradient);
  if (lse.numel() > 0) run_with_team(a.threads, [&] { kernels().backward(a, g); });
  return {query_grad, key_grad, value_grad, bias_gradient, sinks_gradient};
}

Tensor attention_weights(const Tensor& query, const Tensor& key, const OptionalTensor& bias,
                         const OptionalTensor& allowed, const OptionalTensor& lengths,
                         const OptionalTensor& padding, const OptionalTensor& documents,
                         const OptionalTensor& alibi_slopes, const std::vector<int64_t>& band,
                         double scale, double softcap, const Tensor& details, bool mean) {
  const Call call(query, key, key, bias, allowed, lengths, padding, documents, std::nullopt,
                  alibi_slopes, std::nullopt, band, scale, softcap, 0.0);
  const Attention& a = call.attention;
  const auto sizes = mean ? std::vector<int64_t>{a.B, a.T, a.S}
                          : std::vector<int64_t>{a.B, a.H, a.T, a.S};
  const Tensor weights = zero_floats(query, sizes);
  if (weights.numel() > 0)
    run_with_team(a.threads, [&] {
      kernels().weights(a, {floats_of(details), data_of(weights), mean});
    });
  return weights;
}

constexpr char kKeys[] = "(Tensor query, Tensor key, Tensor value, ";
constexpr char kStoredKeys[] =
    "(Tensor query, Tensor key, Tensor value, Tensor? key_scales, Tensor? value_scales, "
    "Tensor? table, SymInt tokens, ";
constexpr char kVariant[] =
    "Tensor? bias, Tensor? allowed, Tensor? lengths, Tensor? padding, Tensor? documents, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, SymInt[] band, float scale, "
    "float softcap, float dropout";

std::string forward_schema(const char* name, const char* keys) {
  return std::string(name) + keys + kVariant +
         ", bool stats) -> (Tensor output, Tensor lse, Tensor details)";
}

STABLE_TORCH_LIBRARY_FRAGMENT(polyhead, m) {
  m.def(forward_schema("attention_forward", kKeys).c_str());
  // The same without a derivative: asking torch's autograd for one takes longer than to decode a
  // token of a small model.
  m.def(forward_schema("attention_inference", kKeys).c_str());
  // Likewise, where nothing but the output is asked for: to make two more tensors takes as long.
  m.def((std::string("attention_output") + kKeys + kVariant + ") -> Tensor").c_str());
  // The shortest way, for one token of a small model: it checks its arguments, too, and answers
  // nothing where another way has to be taken, or to say what is wrong.
  m.def("attention_plain(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor?");
  // Inference over keys and values where a cache holds them: `tokens` of each row, as int8 codes
  // with scales, in blocks (the first dimension) found through a table, or both.
  m.def(forward_schema("attention_stored", kStoredKeys).c_str());
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse, "
      "Tensor details, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? allowed, "
      "Tensor? lengths, Tensor? padding, Tensor? documents, Tensor? sinks, Tensor? alibi_slopes, "
      "Tensor? seed, SymInt[] band, float scale, float softcap, float dropout, bool bias_grad, "
      "bool sinks_grad) -> (Tensor query, Tensor key, Tensor value, Tensor bias, Tensor sinks)");
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor? bias, Tensor? allowed, Tensor? lengths, "
      "Tensor? padding, Tensor? documents, Tensor? alibi_slopes, SymInt[] band, float scale, "
      "float softcap, Tensor details, bool mean) -> Tensor");
  m.def("cpu_isa(str name) -> str");
  m.def("cpu_multiply_add(bool pairs, int steps) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(polyhead, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward<true>));
  m.impl("attention_inference", TORCH_BOX(&attention_forward<false>));
  m.impl("attention_output", TORCH_BOX(&attention_output));
  m.impl("attention_plain", TORCH_BOX(&attention_plain));
  m.impl("attention_stored", TORCH_BOX(&attention_stored));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_weights", TORCH_BOX(&attention_weights));
}

// The instruction set in use, after asking for the one named; "" asks for none.
std::string cpu_isa(const std::string& name) {
  STD_TORCH_CHECK(name.empty() || choose_isa(name.c_str()),
                  "polyhead: this processor or build lacks instruction set ", name);
  return kernels().isa;
}

// See Kernels::multiply_add.
double cpu_multiply_add(bool pairs, int64_t steps) {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  double count = 0.0;
  run_with_team(threads, [&] { count = kernels().multiply_add(pairs, steps, threads); });
  return count;
}

STABLE_TORCH_LIBRARY_IMPL(polyhead, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_multiply_add", TORCH_BOX(&cpu_multiply_add));
}

}  // namespace
}  // namespace polyhead
