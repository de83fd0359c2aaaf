// Operators registered with torch. Only this file and torch_params.hpp include torch, through its
// stable ABI, so that one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "binding/torch_params.hpp"
#include "fork_safety.hpp"
#include "mask_rows.hpp"

namespace polyhead {
namespace {

Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// Zero-filled here after a fork, where torch would fill large tensors with a lost team and hang.
Tensor zero_floats(const Tensor& like, std::vector<int64_t> sizes) {
  if (!omp_team_lost()) return torch::stable::new_zeros(like, sizes, ScalarType::Float);
  const Tensor zeros = empty_floats(like, std::move(sizes));
  std::memset(zeros.mutable_data_ptr(), 0, static_cast<size_t>(zeros.numel()) * sizeof(float));
  return zeros;
}

float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor empty_output(const AttentionParams& a, const Tensor& query) {
  return torch::stable::new_empty(query, std::vector<int64_t>{a.B, a.H, a.T, a.E});
}

void attend(const AttentionParams& a, const ForwardOutput& out) {
  if (a.B * a.H * a.T > 0) run_fork_safe(a.threads, [&] { kernels().forward(a, out); });
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const AttentionParams& a, const Tensor& query,
                                               bool stats) {
  const Tensor output = empty_output(a, query);
  const Tensor lse = empty_floats(query, {a.B, a.H, a.T});
  const Tensor saved = empty_floats(query, {stats ? 9 : 3, a.B, a.H, a.T});
  attend(a, {output.mutable_data_ptr(), data_of(lse), data_of(saved),
             stats ? data_of(saved) + 3 * lse.numel() : nullptr});
  return {output, lse, saved};
}

template <bool kNeedsGrad>
std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
    const OptionalTensor& allowed, const OptionalTensor& lengths, const OptionalTensor& padding,
    const OptionalTensor& documents, const OptionalTensor& query_offset,
    const OptionalTensor& sinks, const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
    const std::vector<int64_t>& band, double scale, double softcap, double dropout, bool stats) {
  ParamsFromTensors call(query, key, value, bias, allowed, lengths, padding, documents,
                         query_offset, sinks, alibi_slopes, seed, band, scale, softcap, dropout);
  call.attention.needs_grad = kNeedsGrad;
  return run_forward(call.attention, query, stats);
}

Tensor attention_output(const Tensor& query, const Tensor& key, const Tensor& value,
                        const OptionalTensor& bias, const OptionalTensor& allowed,
                        const OptionalTensor& lengths, const OptionalTensor& padding,
                        const OptionalTensor& documents, const OptionalTensor& query_offset,
                        const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
                        const OptionalTensor& seed, const std::vector<int64_t>& band, double scale,
                        double softcap, double dropout) {
  const ParamsFromTensors call(query, key, value, bias, allowed, lengths, padding, documents,
                               query_offset, sinks, alibi_slopes, seed, band, scale, softcap,
                               dropout);
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

// Fast path: no mask or a causal one, in inference; nullopt takes the general path.
std::optional<Tensor> attention_fast(const Tensor& query, const Tensor& key, const Tensor& value,
                                     std::optional<double> scale, bool decode_only,
                                     bool is_causal) {
  if (!is_plain(query, key, value)) return std::nullopt;
  if (decode_only) {
    AttentionParams sizes;
    set_sizes(sizes, query.size(0), query.size(1), key.size(1), query.size(2), key.size(2),
              query.size(3), value.size(3));
    if (kernels().forward_kernel(sizes) != ForwardKernel::decode) return std::nullopt;
  }
  constexpr int64_t kUnbounded = int64_t{1} << 40;
  const double factor = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(query.size(3)));
  const ParamsFromTensors call(query, key, value, {}, {}, {}, {}, {}, {}, {}, {}, {},
                               {-kUnbounded, is_causal ? key.size(2) - query.size(2) : kUnbounded,
                                kUnbounded, kUnbounded, 0},
                               factor, 0.0, 0.0);
  const Tensor output = empty_output(call.attention, query);
  attend(call.attention, {output.mutable_data_ptr()});
  return output;
}

std::tuple<Tensor, Tensor, Tensor> attention_cached(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_scales,
    const OptionalTensor& value_scales, const OptionalTensor& table, int64_t tokens,
    const OptionalTensor& bias, const OptionalTensor& allowed, const OptionalTensor& lengths,
    const OptionalTensor& padding, const OptionalTensor& documents,
    const OptionalTensor& query_offset, const OptionalTensor& sinks,
    const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
    const std::vector<int64_t>& band, double scale, double softcap, double dropout, bool stats) {
  const int64_t B = query.size(0);
  const ParamsFromTensors call(
      query, key.size(1), tokens, value.size(3),
      cache_view_of(key, key_scales, table, "key", {B, kAny, tokens, query.size(3)}),
      cache_view_of(value, value_scales, table, "value", {B, key.size(1), tokens, kAny}), bias,
      allowed, lengths, padding, documents, query_offset, sinks, alibi_slopes, seed, band, scale,
      softcap, dropout);
  return run_forward(call.attention, query, stats);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& output,
    const Tensor& saved, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& bias, const OptionalTensor& allowed, const OptionalTensor& lengths,
    const OptionalTensor& padding, const OptionalTensor& documents,
    const OptionalTensor& query_offset, const OptionalTensor& sinks,
    const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
    const std::vector<int64_t>& band, double scale, double softcap, double dropout, bool bias_grad,
    bool sinks_grad) {
  const ParamsFromTensors call(query, key, value, bias, allowed, lengths, padding, documents,
                               query_offset, sinks, alibi_slopes, seed, band, scale, softcap,
                               dropout);
  const AttentionParams& a = call.attention;
  const auto sizes_if = [](bool needed, const OptionalTensor& tensor) {
    if (!needed) return std::vector<int64_t>{0};
    return std::vector<int64_t>(tensor->sizes().begin(), tensor->sizes().end());
  };
  const Tensor query_grad = empty_floats(query, {a.B, a.H, a.T, a.D});
  const Tensor key_grad = zero_floats(query, {a.B, a.G, a.S, a.D});
  const Tensor value_grad = zero_floats(query, {a.B, a.G, a.S, a.E});
  const Tensor bias_gradient = zero_floats(query, sizes_if(bias_grad, bias));
  const Tensor sinks_gradient = zero_floats(query, sizes_if(sinks_grad, sinks));
  const int64_t rows = a.B * a.H * a.T;
  BackwardParams g;
  g.grad_output = rows_of(grad_output, "grad_output", {a.B, a.H, a.T, a.E});
  g.output = rows_of(output, "output", {a.B, a.H, a.T, a.E});
  g.softmax_state = softmax_state_of(saved, rows);
  g.grad_lse = floats_of(grad_lse, "grad_lse", rows);
  g.query = data_of(query_grad);
  g.key = data_of(key_grad);
  g.value = data_of(value_grad);
  if (bias_grad) {
    g.bias = data_of(bias_gradient);
    g.bias_size = bias_gradient.numel();
    broadcast_strides(bias_gradient, "bias", {a.B, a.H, a.T, a.S}, g.bias_stride);
  }
  if (sinks_grad) g.sinks = data_of(sinks_gradient);
  if (rows > 0) run_fork_safe(a.threads, [&] { kernels().backward(a, g); });
  return {query_grad, key_grad, value_grad, bias_gradient, sinks_gradient};
}

Tensor attention_weights(const Tensor& query, const Tensor& key, const OptionalTensor& bias,
                         const OptionalTensor& allowed, const OptionalTensor& lengths,
                         const OptionalTensor& padding, const OptionalTensor& documents,
                         const OptionalTensor& query_offset, const OptionalTensor& alibi_slopes,
                         const std::vector<int64_t>& band, double scale, double softcap,
                         const Tensor& saved, bool mean) {
  const ParamsFromTensors call(query, key, key, bias, allowed, lengths, padding, documents,
                               query_offset, std::nullopt, alibi_slopes, std::nullopt, band, scale,
                               softcap, 0.0);
  const AttentionParams& a = call.attention;
  const auto sizes =
      mean ? std::vector<int64_t>{a.B, a.T, a.S} : std::vector<int64_t>{a.B, a.H, a.T, a.S};
  const Tensor weights = zero_floats(query, sizes);
  if (weights.numel() > 0)
    run_fork_safe(a.threads, [&] {
      kernels().weights(a, {softmax_state_of(saved, a.B * a.H * a.T), data_of(weights), mean});
    });
  return weights;
}

// One range of keys per row of a dense (B, T, S) mask: (B, T, 2), and a MaskRows.
std::tuple<Tensor, int64_t> dense_mask_rows(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 3 && (mask.size(2) <= 1 || mask.stride(2) == 1),
                  "polyhead: mask must have 3 dimensions, and contiguous keys");
  DenseMask dense{mask.const_data_ptr(), MaskElement::boolean, mask.size(0),  mask.size(1),
                  mask.size(2),          mask.stride(0),       mask.stride(1)};
  switch (mask.scalar_type()) {
    case ScalarType::Bool: break;
    case ScalarType::Float: dense.element = MaskElement::f32; break;
    case ScalarType::BFloat16: dense.element = MaskElement::bf16; break;
    case ScalarType::Half: dense.element = MaskElement::f16; break;
    default: STD_TORCH_CHECK(false, "polyhead: mask must be bool, float32, bfloat16 or float16");
  }
  const Tensor ranges = torch::stable::new_empty(
      mask, std::vector<int64_t>{dense.batches, dense.rows, 2}, ScalarType::Long);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  MaskRows kind = MaskRows::ranges;
  run_fork_safe(threads, [&] {
    kind = mask_rows(dense, threads, static_cast<int64_t*>(ranges.mutable_data_ptr()));
  });
  return {ranges, static_cast<int64_t>(kind)};
}

constexpr char kKeys[] = "(Tensor query, Tensor key, Tensor value, ";
constexpr char kStoredKeys[] =
    "(Tensor query, Tensor key, Tensor value, Tensor? key_scales, Tensor? value_scales, "
    "Tensor? table, SymInt tokens, ";
constexpr char kVariant[] =
    "Tensor? bias, Tensor? allowed, Tensor? lengths, Tensor? padding, Tensor? documents, "
    "Tensor? query_offset, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, SymInt[] band, float "
    "scale, "
    "float softcap, float dropout";

std::string forward_schema(const char* name, const char* keys) {
  return std::string(name) + keys + kVariant +
         ", bool stats) -> (Tensor output, Tensor lse, Tensor saved)";
}

STABLE_TORCH_LIBRARY_FRAGMENT(polyhead, m) {
  m.def(forward_schema("attention_forward", kKeys).c_str());
  // The same without a derivative: torch's autograd takes longer than decoding one token of a small
  // model.
  m.def(forward_schema("attention_inference", kKeys).c_str());
  // The output only: allocating two more tensors takes as long.
  m.def((std::string("attention_output") + kKeys + kVariant + ") -> Tensor").c_str());
  // Fast path, for one token of a small model. It validates its arguments; None: not eligible, take
  // the general path, which also reports errors. `decode_only`: None unless the decode kernel runs.
  m.def(
      "attention_fast(Tensor query, Tensor key, Tensor value, float? scale, "
      "bool decode_only=False, bool is_causal=False) -> Tensor?");
  // Inference over keys and values in the cache: `tokens` per batch row; int8 with scales, or paged
  // (the first dimension is blocks, addressed by a block table), or both.
  m.def(forward_schema("attention_cached", kStoredKeys).c_str());
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor output, "
      "Tensor saved, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? allowed, "
      "Tensor? lengths, Tensor? padding, Tensor? documents, Tensor? query_offset, Tensor? sinks, "
      "Tensor? alibi_slopes, "
      "Tensor? seed, SymInt[] band, float scale, float softcap, float dropout, bool bias_grad, "
      "bool sinks_grad) -> (Tensor query, Tensor key, Tensor value, Tensor bias, Tensor sinks)");
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor? bias, Tensor? allowed, Tensor? lengths, "
      "Tensor? padding, Tensor? documents, Tensor? query_offset, Tensor? alibi_slopes, SymInt[] "
      "band, float scale, "
      "float softcap, Tensor saved, bool mean) -> Tensor");
  m.def("dense_mask_rows(Tensor mask) -> (Tensor ranges, int kind)");
  m.def("cpu_isa(str name) -> str");
  m.def("cpu_kernel(int B, int H, int G, int T, int S, int D, int E, bool needs_grad) -> str");
  m.def("cpu_limits() -> (int head_size, int tokens)");
  m.def("cpu_multiply_add(bool pairs, int steps) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(polyhead, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward<true>));
  m.impl("attention_inference", TORCH_BOX(&attention_forward<false>));
  m.impl("attention_output", TORCH_BOX(&attention_output));
  m.impl("attention_fast", TORCH_BOX(&attention_fast));
  m.impl("attention_cached", TORCH_BOX(&attention_cached));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_weights", TORCH_BOX(&attention_weights));
  m.impl("dense_mask_rows", TORCH_BOX(&dense_mask_rows));
}

// Selects the named instruction set, unless "", and returns the one in use.
std::string cpu_isa(const std::string& name) {
  STD_TORCH_CHECK(name.empty() || choose_isa(name.c_str()),
                  "polyhead: this processor or build lacks instruction set ", name);
  return kernels().isa;
}

// The name of the kernel that runs a forward call of these sizes.
std::string cpu_kernel(int64_t B, int64_t H, int64_t G, int64_t T, int64_t S, int64_t D, int64_t E,
                       bool needs_grad) {
  AttentionParams a;
  set_sizes(a, B, H, G, T, S, D, E);
  a.needs_grad = needs_grad;
  switch (kernels().forward_kernel(a)) {
    case ForwardKernel::decode: return "decode";
    case ForwardKernel::chunked_prefill: return "chunked prefill";
    default: return "prefill";
  }
}

std::tuple<int64_t, int64_t> cpu_limits() { return {kMaxHeadSize, kMaxTokens}; }

// See Kernels::multiply_add.
double cpu_multiply_add(bool pairs, int64_t steps) {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  double count = 0.0;
  run_fork_safe(threads, [&] { count = kernels().multiply_add(pairs, steps, threads); });
  return count;
}

STABLE_TORCH_LIBRARY_IMPL(polyhead, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_kernel", TORCH_BOX(&cpu_kernel));
  m.impl("cpu_limits", TORCH_BOX(&cpu_limits));
  m.impl("cpu_multiply_add", TORCH_BOX(&cpu_multiply_add));
}

}  // namespace
}  // namespace polyhead
