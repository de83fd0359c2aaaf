// The kernels of one instruction set: compiled once for each, with its flags and its namespace.
#include <type_traits>

#include "backward.hpp"
#include "ceiling.hpp"
#include "decode.hpp"
#include "prefill.hpp"
#include "stream.hpp"
#include "weights.hpp"

namespace polyhead::POLYHEAD_ISA {
namespace {

using PairIfAny = std::conditional_t<kHasPairs, Pair, float>;

template <class Element>
void forward_packed(const Attention& a, const Output& out) {
  if (is_streaming(a)) {
    Stream<Element>(a, out).run();
  } else {
    Prefill<Element>(a, out).run();
  }
}

void forward(const Attention& a, const Output& out) {
  if (is_decoding(a)) {
    by_stored_dtype(a.key.dtype, [&](auto element) { Decode<decltype(element)>(a, out).run(); });
  } else if (kHasPairs && a.query.dtype == Dtype::bf16) {
    forward_packed<PairIfAny>(a, out);
  } else {
    forward_packed<float>(a, out);
  }
}

void backward(const Attention& a, const Gradients& g) {
  if (kHasPairs && a.query.dtype == Dtype::bf16) {
    Backward<PairIfAny>(a, g).run();
  } else {
    Backward<float>(a, g).run();
  }
}

void weights(const Attention& a, const Weights& out) { WriteWeights(a, out).run(); }

}  // namespace

extern const Kernels kTable;
const Kernels kTable{POLYHEAD_ISA_NAME, forward, backward, weights, multiply_add_everywhere};

}  // namespace polyhead::POLYHEAD_ISA
