// Kernels of one instruction set: compiled once per instruction set, with its flags, into its
// namespace.
#include <type_traits>

#include "flash/attention_weights.hpp"
#include "flash/backward.hpp"
#include "flash/chunked_prefill.hpp"
#include "flash/decode.hpp"
#include "flash/peak_flops.hpp"
#include "flash/prefill.hpp"

namespace polyhead::POLYHEAD_ISA {
namespace {

using PairIfAny = std::conditional_t<kHasBF16Dot, BF16Pair, float>;

ForwardKernel forward_kernel(const AttentionParams& a) {
  if (is_decoding(a)) return ForwardKernel::decode;
  return use_chunked_prefill(a) ? ForwardKernel::chunked_prefill : ForwardKernel::prefill;
}

template <class Element>
void forward_packed(const AttentionParams& a, const ForwardOutput& out, ForwardKernel kernel) {
  if (kernel == ForwardKernel::chunked_prefill) {
    ChunkedPrefill<Element>(a, out).run();
  } else {
    Prefill<Element>(a, out).run();
  }
}

void forward(const AttentionParams& a, const ForwardOutput& out) {
  const ForwardKernel kernel = forward_kernel(a);
  if (kernel == ForwardKernel::decode) {
    dispatch_kv_dtype(a.key.dtype, [&](auto element) { Decode<decltype(element)>(a, out).run(); });
  } else if (kHasBF16Dot && a.query.dtype == Dtype::bf16) {
    forward_packed<PairIfAny>(a, out, kernel);
  } else {
    forward_packed<float>(a, out, kernel);
  }
}

void backward(const AttentionParams& a, const BackwardParams& g) {
  if (kHasBF16Dot && a.query.dtype == Dtype::bf16) {
    Backward<PairIfAny>(a, g).run();
  } else {
    Backward<float>(a, g).run();
  }
}

void weights(const AttentionParams& a, const WeightsOutput& out) { WriteWeights(a, out).run(); }

}  // namespace

extern const Kernels kTable;
const Kernels kTable{POLYHEAD_ISA_NAME, forward_kernel, forward,
                     backward,          weights,        multiply_add_everywhere};

}  // namespace polyhead::POLYHEAD_ISA
