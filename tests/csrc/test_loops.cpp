// Test of the kernels of one instruction set against a reference in double precision: random sizes,
// strides, masks and dtypes, in buffers of exact size, so that sanitizers catch every access
// beyond. Prints disagreements; exits 1 if there are any. Compiled with POLYHEAD_ISA and
// POLYHEAD_ISA_NAME, as csrc/kernels.cpp is, by tests/backends/cpu/test_ops.py.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "kernels.cpp"
#include "random_tensors.hpp"

// As in csrc/isa.cpp.
void polyhead::throw_bad_alloc() { throw std::bad_alloc(); }

using namespace polyhead;

namespace {

using Numbers = std::vector<double>;

// Expected values of one result of the kernels, and the size of the terms of each sum.
struct Result {
  const char* name;
  Numbers want, terms;
  Result(const char* name, int64_t size) : name(name), want(size), terms(size) {}
  void add(int64_t i, double x, double term) {
    want[i] += x;
    terms[i] += term;
  }
};

struct Case {
  AttentionParams a{};
  Dtype dtype;
  std::string text;
  std::unique_ptr<Tensor> query, bias, grad_output;
  bool is_int8 = chance(4), is_paged = chance(4);
  std::unique_ptr<CachedTensor> key, value;
  std::unique_ptr<bool[]> allowed;
  std::vector<int32_t> first, last, document;
  std::vector<int64_t> offsets;
  std::vector<float> sinks, slopes, grad_lse;

  Case();
  bool may_attend(int64_t b, int64_t h, int64_t t, int64_t s) const;
  double score(int64_t b, int64_t h, int64_t t, int64_t s, double& terms, double& slope) const;
  int check() const;
};

Case::Case() {
  a.B = integer(1, 2), a.G = integer(1, 2), a.H = a.G * one_of({1, 2, 3, 7});
  a.T = chance(2) ? integer(1, 5) : integer(1, 110);
  a.S = std::max(a.T, chance(2) ? integer(1, 40) : integer(1, 300));
  a.D = one_of({1, 2, 3, 8, 15, 16, 17, 24, 33, 64, 65, 80, 96});
  a.E = one_of({1, 3, 8, 16, 31, 48, 64, 66, 80, 129});
  if (chance(30))
    a.D = one_of({512, 576}), a.E = one_of({511, 575}), a.T = integer(1, 20), a.S = a.T + 7;
  if (chance(40)) a.S = integer(2048, 4500), a.T = integer(1, 20), a.D = 17, a.E = 24;
  a.threads = static_cast<int>(integer(1, 3));
  dtype = static_cast<Dtype>(integer(0, 2));
  query = std::make_unique<Tensor>(dtype, Sizes{a.B, a.H, a.T, a.D});
  const Table table = is_paged ? Table(a.B, a.S) : Table();
  key = std::make_unique<CachedTensor>(dtype, is_int8, table, Sizes{a.B, a.G, a.S, a.D});
  value = std::make_unique<CachedTensor>(dtype, is_int8, table, Sizes{a.B, a.G, a.S, a.E});
  grad_output = std::make_unique<Tensor>(dtype, Sizes{a.B, a.H, a.T, a.E});
  a.query = query->view, a.key = key->view, a.value = value->view;
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.D)));
  const Sizes scores{a.B, a.H, a.T, a.S};
  const auto some_axes = [&] {
    Sizes sizes = scores;
    for (int64_t& size : sizes)
      if (chance(3)) size = 1;
    return sizes;
  };
  if (chance(3)) {
    bias = std::make_unique<Tensor>(chance(2) ? dtype : Dtype::f32, some_axes(), false);
    a.bias = bias->view;
  }
  if (chance(3)) {
    const Layout layout(some_axes(), false);
    allowed = std::make_unique<bool[]>(layout.extent);
    std::generate_n(allowed.get(), layout.extent, [] { return chance(2); });
    a.dense_mask = reinterpret_cast<const uint8_t*>(allowed.get());
    std::copy(layout.stride.begin(), layout.stride.end(), a.dense_mask_stride);
  }
  if (chance(3)) {
    a.query_offset_stride = chance(2);
    for (int64_t b = 0; b < a.B; ++b) offsets.push_back(integer(0, a.S + 2) - 2);
    a.query_offset = offsets.data();
  }
  const bool by_batch = a.query_offset_stride || chance(2), is_causal = chance(2);
  a.kv_range_stride = by_batch ? a.T : 0;
  for (int64_t row = 0; row < (by_batch ? a.B : 1) * a.T; ++row) {
    const int64_t position = a.position(row / a.T, row % a.T);
    const int64_t end = is_causal ? std::clamp<int64_t>(position + 1, 0, a.S) : integer(0, a.S);
    last.push_back(static_cast<int32_t>(end));
    first.push_back(static_cast<int32_t>(chance(2) ? 0 : integer(0, end)));
    if (first.back() == end) first.back() = last.back() = 0;
  }
  a.kv_begin = first.data(), a.kv_end = last.data();
  if (chance(4)) {
    a.doc_ids_stride = chance(2) ? a.S : 0;
    for (int64_t i = 0; i < (a.doc_ids_stride ? a.B : 1) * a.S; ++i)
      document.push_back(static_cast<int32_t>(integer(0, 2)));
    a.doc_ids = document.data();
  }
  const auto by_head = [&](std::vector<float>& numbers, double factor) {
    for (int64_t h = 0; h < a.H; ++h) numbers.push_back(static_cast<float>(factor * normal()));
    return numbers.data();
  };
  if (chance(3)) a.sinks = by_head(sinks, 1.0);
  if (chance(3)) a.alibi_slopes = by_head(slopes, 0.1);
  if (chance(3)) a.softcap = 1.5F;
  if (chance(3)) a.dropout = 0.3, a.seed = generator();
  if (chance(3)) {
    for (int64_t i = 0; i < a.B * a.H * a.T; ++i) grad_lse.push_back(static_cast<float>(normal()));
  }
  const auto add_text = [&](const char* name, int64_t x) {
    text += std::string(name) + " " + std::to_string(x) + " ";
  };
  for (auto [name, x] : std::initializer_list<std::pair<const char*, int64_t>>{
           {"B", a.B},
           {"H", a.H},
           {"G", a.G},
           {"T", a.T},
           {"S", a.S},
           {"D", a.D},
           {"E", a.E},
           {"threads", a.threads},
           {"dtype", static_cast<int64_t>(dtype)}})
    add_text(name, x);
  for (auto [name, is_there] :
       std::initializer_list<std::pair<const char*, bool>>{{"bias ", bias != nullptr},
                                                           {"allowed ", allowed != nullptr},
                                                           {"documents ", a.doc_ids != nullptr},
                                                           {"offset ", a.query_offset != nullptr},
                                                           {"sinks ", a.sinks != nullptr},
                                                           {"alibi ", a.alibi_slopes != nullptr},
                                                           {"softcap ", a.softcap != 0.0F},
                                                           {"dropout ", a.dropout != 0.0},
                                                           {"grad_lse ", !grad_lse.empty()},
                                                           {"int8 ", is_int8},
                                                           {"paged ", is_paged}})
    if (is_there) text += name;
}

bool Case::may_attend(int64_t b, int64_t h, int64_t t, int64_t s) const {
  const int64_t row = b * a.kv_range_stride + t;
  if (s < first[row] || s >= last[row]) return false;
  const int64_t* stride = a.dense_mask_stride;
  if (allowed && !allowed[b * stride[0] + h * stride[1] + t * stride[2] + s * stride[3]])
    return false;
  const int32_t* documents = document.data() + b * a.doc_ids_stride;
  const int64_t position = a.position(b, t);
  const bool has_document = 0 <= position && position < a.S;
  return document.empty() || (has_document && documents[s] == documents[position]);
}

// `terms` is the sum of the absolute terms, `slope` the derivative by the scaled dot product.
double Case::score(int64_t b, int64_t h, int64_t t, int64_t s, double& terms, double& slope) const {
  double dot = 0.0;
  terms = 0.0;
  for (int64_t d = 0; d < a.D; ++d) {
    const double product = a.scale * (*query)(b, h, t, d) * (*key)(b, h / a.group(), s, d);
    dot += product;
    terms += std::abs(product);
  }
  slope = 1.0;
  if (a.softcap != 0.0F) {
    const double capped = std::tanh(dot / a.softcap);
    dot = a.softcap * capped;
    slope = 1.0 - capped * capped;
    terms += a.softcap;
  }
  if (a.alibi_slopes != nullptr) {
    const double distance = slopes[h] * std::abs(static_cast<double>(a.position(b, t) - s));
    dot -= distance;
    terms += std::abs(distance);
  }
  if (bias) {
    dot += (*bias)(b, h, t, s);
    terms += std::abs((*bias)(b, h, t, s));
  }
  return dot;
}

int Case::check() const {
  const int64_t rows = a.B * a.H * a.T;
  Memory output(dtype, rows * a.E), lse(Dtype::f32, rows), softmax_state(Dtype::f32, 3 * rows),
      stats(Dtype::f32, 6 * rows);
  const auto floats = [](Memory& memory) { return static_cast<float*>(memory.data()); };
  POLYHEAD_ISA::kTable.forward(
      a, {output.data(), floats(lse), floats(softmax_state), chance(2) ? floats(stats) : nullptr});
  const bool has_stats = !std::isnan(stats.get(0));
  const auto zeros = [](int64_t size) {
    Memory memory(Dtype::f32, size);
    for (int64_t i = 0; i < size; ++i) memory.set(i, 0.0);
    return memory;
  };
  const Sizes bias_sizes = bias ? bias->sizes : Sizes{};
  const int64_t bias_size = bias_sizes[0] * bias_sizes[1] * bias_sizes[2] * bias_sizes[3];
  Memory query_grad(Dtype::f32, rows * a.D), key_grad = zeros(a.B * a.G * a.S * a.D),
                                             value_grad = zeros(a.B * a.G * a.S * a.E),
                                             bias_grad = zeros(bias_size), sinks_grad = zeros(a.H);
  BackwardParams g;
  g.grad_output = grad_output->view;
  g.output = {output.data(), dtype, {a.H * a.T * a.E, a.T * a.E, a.E, 1}};
  g.softmax_state = floats(softmax_state);
  g.grad_lse = grad_lse.empty() ? nullptr : grad_lse.data();
  g.query = floats(query_grad), g.key = floats(key_grad), g.value = floats(value_grad);
  Sizes bias_stride{};
  if (bias) {
    g.bias = floats(bias_grad), g.bias_size = bias_size;
    for (int64_t axis = 3, step = 1; axis >= 0; step *= bias_sizes[axis--])
      if (bias_sizes[axis] > 1) g.bias_stride[axis] = bias_stride[axis] = step;
  }
  if (a.sinks != nullptr) g.sinks = floats(sinks_grad);
  const bool is_plain = !is_int8 && !is_paged;
  if (is_plain) POLYHEAD_ISA::kTable.backward(a, g);
  const bool is_mean = chance(2);
  Memory weights = zeros((is_mean ? a.B * a.T : rows) * a.S);
  if (is_plain) POLYHEAD_ISA::kTable.weights(a, {floats(softmax_state), floats(weights), is_mean});

  // Tolerance: this many roundings of all terms of a sum, those of the scores included, and the
  // 16-bit roundings of weights and output.
  constexpr double kRoundings = 16.0;
  constexpr double kFlushed = 0x1p-126;  // a weight below float32's normal numbers may be 0
  const double loss = dtype == Dtype::f32 ? 0.0 : 2.1 * unit_of(dtype);
  // bf16 dot products take P and dS rounded to bfloat16.
  const bool has_pairs = POLYHEAD_ISA::kHasBF16Dot && dtype == Dtype::bf16;
  const double pair_loss = has_pairs ? 1.01 * unit_of(dtype) : 0.0;
  // And dequantized keys and values, too.
  const double int8_loss = is_int8 ? pair_loss : 0.0;
  Result outputs("output", output.size()), lses("lse", rows), all_stats("stats", 6 * rows);
  Result to_query("query", query_grad.size()), to_key("key", key_grad.size()),
      to_value("value", value_grad.size()), to_bias("bias", bias_size), to_sinks("sinks", a.H),
      all_weights("weights", weights.size());
  const POLYHEAD_ISA::Dropout dropout(a);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = row % a.T, h = row / a.T % a.H, b = row / a.T / a.H, group = h / a.group();
    Numbers scores(a.S, -INFINITY), slope(a.S), kept(a.S, 1.0);
    double largest_terms = 0.0;
    for (int64_t s = 0; s < a.S; ++s) {
      if (!may_attend(b, h, t, s)) continue;
      double terms;
      scores[s] = score(b, h, t, s, terms, slope[s]);
      largest_terms = std::max(largest_terms, terms);
      if (a.dropout > 0.0)
        kept[s] = dropout.kept(dropout.row_key(row), s)[0] ? 1.0 / (1.0 - a.dropout) : 0.0;
    }
    const double row_max = *std::max_element(scores.begin(), scores.end());
    if (row_max == -INFINITY) {
      lses.want[row] = all_stats.want[5 * rows + row] = -INFINITY;
      continue;
    }
    const double rounding = kRoundings * unit_of(Dtype::f32) * (4.0 + 2.0 * largest_terms) +
                            2.0 * int8_loss * largest_terms;
    double keys_total = 0.0;
    for (double x : scores) keys_total += std::exp(x - row_max);
    // Shifted by the max: exp(sink - row_max) would overflow for a large sink.
    const double sink = a.sinks == nullptr ? -INFINITY : sinks[h], shift = std::max(row_max, sink);
    const double total = keys_total * std::exp(row_max - shift) + std::exp(sink - shift);
    lses.add(row, row_max + std::log(keys_total), rounding);
    Numbers row_stats(6), row_terms(6), o(a.E), o_terms(a.E);
    row_stats[5] = row_max, row_terms[5] = 1.0;
    for (int64_t s = 0; s < a.S; ++s) {
      if (scores[s] == -INFINITY) continue;
      const double weight = std::exp(scores[s] - shift) / total;
      const double log_weight = scores[s] - shift - std::log(total);
      const double share = is_mean ? weight / static_cast<double>(a.H) : weight;
      all_weights.add((is_mean ? b * a.T + t : row) * a.S + s, share, rounding * share);
      const int64_t ahead = s - a.position(b, t);
      const double numbers[] = {-weight * log_weight, weight * std::abs(static_cast<double>(ahead)),
                                s == 0 ? weight : 0.0, ahead == -1 ? weight : 0.0,
                                ahead == 0 ? weight : 0.0};
      for (int i = 0; i < 5; ++i) {
        row_stats[i] += numbers[i];
        row_terms[i] += std::abs(numbers[i]) + (i == 0 ? weight : 0.0);
      }
      for (int64_t e = 0; e < a.E; ++e) {
        const double x = weight * kept[s] * (*value)(b, group, s, e);
        o[e] += x;
        o_terms[e] += std::abs(x);
      }
    }
    for (int i = 0; i < 6; ++i)
      all_stats.add(i * rows + row, row_stats[i], rounding * row_terms[i]);
    double delta = 0.0, delta_terms = 0.0;
    for (int64_t e = 0; e < a.E; ++e) {
      const double grad = (*grad_output)(b, h, t, e);
      delta += grad * o[e];
      delta_terms += std::abs(grad) * o_terms[e];
      outputs.add(row * a.E + e, o[e], (rounding + loss + int8_loss) * o_terms[e]);
    }
    const double delta_loss = loss * delta_terms;
    if (a.sinks != nullptr) {
      const double weight = std::exp(sink - shift) / total;
      to_sinks.add(h, -weight * delta, weight * (rounding * delta_terms + delta_loss));
    }
    for (int64_t s = 0; s < a.S; ++s) {
      if (scores[s] == -INFINITY) continue;
      const double weight = std::exp(scores[s] - shift) / total;
      double dP = 0.0, dP_terms = 0.0;
      for (int64_t e = 0; e < a.E; ++e) {
        const double grad = (*grad_output)(b, h, t, e), x = kept[s] * (*value)(b, group, s, e);
        dP += grad * x;
        dP_terms += std::abs(grad * x);
        const double dV = weight * kept[s] * grad;
        to_value.add(((b * a.G + group) * a.S + s) * a.E + e, dV,
                     (rounding + pair_loss) * std::abs(dV) + kFlushed * std::abs(kept[s] * grad));
      }
      const double from_lse =
          grad_lse.empty() ? 0.0 : grad_lse[row] * std::exp(scores[s] - row_max) / keys_total;
      const double dZ = weight * (dP - delta) + from_lse;
      const double dZ_error = weight * (rounding * (dP_terms + delta_terms) + delta_loss) +
                              rounding * std::abs(from_lse) + kFlushed * (dP_terms + delta_terms);
      if (bias) {
        int64_t at = 0;
        const Sizes i{b, h, t, s};
        for (int axis = 0; axis < 4; ++axis) at += i[axis] * bias_stride[axis];
        to_bias.add(at, dZ, dZ_error);
      }
      // 1 - capped^2 loses digits where it is small.
      const double dS = a.scale * dZ * slope[s];
      const double dS_error =
          a.scale * (dZ_error + (rounding + pair_loss) * (std::abs(dZ) + dZ_error));
      for (int64_t d = 0; d < a.D; ++d) {
        const double k = (*key)(b, group, s, d), q = (*query)(b, h, t, d);
        to_query.add(row * a.D + d, dS * k, dS_error * std::abs(k));
        to_key.add(((b * a.G + group) * a.S + s) * a.D + d, dS * q, dS_error * std::abs(q));
      }
    }
  }

  int failures = 0;
  const auto compare = [&](const Result& result, const Memory& got) {
    for (size_t i = 0; i < result.want.size(); ++i) {
      const double want = result.want[i], x = got.get(static_cast<int64_t>(i));
      // Subnormal in float16 or float32.
      const double smallest = dtype == Dtype::f16 ? 0x1p-24 : 0x1p-126;
      if (x == want || std::abs(x - want) <= result.terms[i] + smallest) continue;
      ++failures;
      std::printf("%s%s[%zu]: got %g, want %g +- %g\n", text.c_str(), result.name, i, x, want,
                  result.terms[i]);
      return;
    }
  };
  compare(outputs, output);
  compare(lses, lse);
  if (has_stats) compare(all_stats, stats);
  if (!is_plain) return failures;
  compare(all_weights, weights);
  compare(to_query, query_grad);
  compare(to_key, key_grad);
  compare(to_value, value_grad);
  if (bias) compare(to_bias, bias_grad);
  if (a.sinks != nullptr) compare(to_sinks, sinks_grad);
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 100;
  const int start = count > 2 ? std::atoi(arguments[2]) : 0;
  int failures = 0;
  for (int i = start; i < start + cases; ++i) {
    generator.seed(static_cast<uint64_t>(i));
    failures += Case().check();
  }
  std::printf("%s: %d cases, %d failures\n", POLYHEAD_ISA_NAME, cases, failures);
  return failures > 0;
}
