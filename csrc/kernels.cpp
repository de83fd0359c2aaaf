// The kernels of one instruction set: compiled once for each, with its flags and its namespace.
#include "backward.hpp"
#include "decode.hpp"
#include "prefill.hpp"

#include <type_traits>

namespace polyhead::POLYHEAD_ISA {
namespace {

void forward(const Attention& a, const Output& out) {
  if (is_decoding(a)) {
    by_dtype(a.query.dtype, [&](auto element) { Decode<decltype(element)>(a, out).run(); });
  } else if (kHasPairs && a.query.dtype == Dtype::bf16) {
    Prefill<std::conditional_t<kHasPairs, Pair, float>>(a, out).run();
  } else {
    Prefill<float>(a, out).run();
  }
}

void backward(const Attention& a, const Gradients& g) { Backward(a, g).run(); }

}  // namespace

extern const Kernels kTable;
const Kernels kTable{POLYHEAD_ISA_NAME, forward, backward};

}  // namespace polyhead::POLYHEAD_ISA
