// The kernels of one instruction set: compiled once for each, with its flags and its namespace.
#include "backward.hpp"
#include "decode.hpp"
#include "prefill.hpp"

namespace polyhead::POLYHEAD_ISA {
namespace {

template <template <class> class Pass>
void run_decode(const Attention& a, const Output& out) {
  by_dtype(a.query.dtype, [&](auto element) { Pass<decltype(element)>(a, out).run(); });
}

void forward(const Attention& a, const Output& out) {
  if (a.group() * a.T <= kDecodeRows && a.T <= 16) return run_decode<Decode>(a, out);
#if defined(__AVX512BF16__)
  if (a.query.dtype == Dtype::bf16) return Prefill<Pair>(a, out).run();
#endif
  Prefill<float>(a, out).run();
}

void backward(const Attention& a, const Gradients& g) { Backward(a, g).run(); }

}  // namespace

extern const Kernels kTable;
const Kernels kTable{POLYHEAD_ISA_NAME, forward, backward};

}  // namespace polyhead::POLYHEAD_ISA
