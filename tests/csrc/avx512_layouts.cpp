// Runs the kernels with AVX-512's vector width and bfloat16 pairs, in plain instructions, against
// double precision. Prints what disagrees; exits 1 if anything does.
#define POLYHEAD_EMULATE_AVX512
#define POLYHEAD_ISA emulated
#define POLYHEAD_ISA_NAME "emulated"
#include "kernels.cpp"

#include <cstdio>
#include <random>
#include <vector>

using namespace polyhead;

namespace {

struct Sizes {
  int64_t T, S, D, E;
};

float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::f32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Numbers both as the kernel takes them and as floats.
struct Numbers {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Numbers(int64_t size, Dtype dtype, std::mt19937& random) : floats(size), halves(size) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) {
      floats[i] = rounded(normal(random), dtype);
      uint32_t bits;
      std::memcpy(&bits, &floats[i], 4);
      halves[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  View view(Dtype dtype, int64_t tokens, int64_t size) const {
    const void* data = dtype == Dtype::f32 ? static_cast<const void*>(floats.data())
                                           : static_cast<const void*>(halves.data());
    return {data, dtype, {tokens * size, tokens * size, size, 1}};
  }
};

// The largest difference of a causal forward pass of one head from double precision.
double forward_error(Sizes n, Dtype dtype) {
  std::mt19937 random(7);
  const Numbers query(n.T * n.D, dtype, random), key(n.S * n.D, dtype, random),
      value(n.S * n.E, dtype, random);
  std::vector<int32_t> first(n.T, 0), last(n.T);
  for (int64_t t = 0; t < n.T; ++t) last[t] = static_cast<int32_t>(std::max<int64_t>(0, n.S - n.T + t + 1));
  Attention a{};
  a.B = a.H = a.G = 1;
  a.T = n.T, a.S = n.S, a.D = n.D, a.E = n.E;
  a.query = query.view(dtype, n.T, n.D);
  a.key = key.view(dtype, n.S, n.D);
  a.value = value.view(dtype, n.S, n.E);
  a.first = first.data(), a.last = last.data();
  a.scale = 1.0F / std::sqrt(static_cast<float>(n.D));
  std::vector<float> output(n.T * n.E), lse(n.T), shifts(2 * n.T);
  emulated::kTable.forward(a, {output.data(), lse.data(), shifts.data(), nullptr});
  double worst = 0.0;
  std::vector<double> weights(n.S);
  for (int64_t t = 0; t < n.T; ++t) {
    double total = 0.0;
    for (int64_t s = 0; s < last[t]; ++s) {
      double dot = 0.0;
      for (int64_t d = 0; d < n.D; ++d) dot += double{query.floats[t * n.D + d]} * key.floats[s * n.D + d];
      total += weights[s] = std::exp(dot * a.scale);
    }
    for (int64_t e = 0; e < n.E; ++e) {
      double want = 0.0;
      for (int64_t s = 0; s < last[t]; ++s) want += weights[s] / total * value.floats[s * n.E + e];
      float got = output[t * n.E + e];
      if (dtype == Dtype::bf16) {
        const uint32_t bits = uint32_t{reinterpret_cast<uint16_t*>(output.data())[t * n.E + e]} << 16;
        std::memcpy(&got, &bits, 4);
      }
      const double error = std::abs(got - want);
      worst = error <= worst ? worst : error;  // NaN is worst
    }
  }
  return worst;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Sizes n : {Sizes{1, 1, 1, 1}, {1, 77, 24, 40}, {16, 70, 128, 65}, {17, 17, 7, 3},
                        {100, 300, 64, 64}, {97, 513, 80, 129}, {40, 20, 33, 16}}) {
    for (const auto& [dtype, allowed] : {std::pair{Dtype::f32, 4e-6}, std::pair{Dtype::bf16, 2e-2}}) {
      const double error = forward_error(n, dtype);
      if (error <= allowed) continue;
      ++failures;
      std::printf("T %ld S %ld D %ld E %ld %s: off by %g\n", long(n.T), long(n.S), long(n.D),
                  long(n.E), dtype == Dtype::f32 ? "f32" : "bf16", error);
    }
  }
  return failures > 0;
}
