// What crosses from the torch binding to the kernels and back: plain pointers, sizes, strides.
//
// The letters are those of src/polyhead/call.py: B batch rows, H query heads, G key/value heads,
// T queries, S keys, D and E head sizes of keys and of values. Strides count elements.
#pragma once

#include <cstdint>

namespace polyhead {

constexpr int64_t kMaxHeadSize = 576;          // of D and E: a latent key of DeepSeek
constexpr int64_t kMaxTokens = INT32_MAX - 1;  // of T and S: key ranges are int32

enum class Dtype { f32, bf16, f16, i8 };  // i8: of keys and values only, codes with scales

// (B, heads, tokens, size) with any strides; a stride of 0 broadcasts. For q, k and v the last
// stride is 1.
struct TensorView {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride[4] = {0, 0, 0, 0};

  // Keys and values of a cache. A number is code * scale, one scale for each token and head.
  const float* scales = nullptr;
  int64_t scale_stride[3] = {0, 0, 0};
  // Token s of batch row b is in block table[b * table_stride + s / block_size], at
  // s % block_size: then the first stride leads from block to block. nullptr: side by side.
  const int32_t* block_table = nullptr;
  int64_t table_stride = 0;
  int64_t block_size = 1;
};

struct AttentionParams {
  int64_t B, H, G, T, S, D, E;
  TensorView query, key, value;
  TensorView bias;                      // added to the scores; data == nullptr: none
  const uint8_t* dense_mask = nullptr;  // a bool tensor, true: may attend; nullptr: everybody
  int64_t allowed_stride[4] = {0, 0, 0, 0};

  // Query t of batch row b may attend to keys kv_begin[b * kv_range_stride + t] up to, not
  // including, kv_end[b * kv_range_stride + t].
  const int32_t* kv_begin = nullptr;
  const int32_t* kv_end = nullptr;
  int64_t kv_range_stride = 0;
  // The document of each key, where documents are not runs of keys; nullptr: ranges say it all.
  const int32_t* doc_ids = nullptr;
  int64_t document_stride = 0;

  const float* sinks = nullptr;         // (H,)
  const float* alibi_slopes = nullptr;  // (H,)
  float scale = 1.0F;
  float softcap = 0.0F;  // 0: none
  double dropout = 0.0;
  uint64_t seed = 0;
  // Backward computes the scores again, and must find those that forward found: summed in the same
  // order, and so by the same tiles.
  bool needs_grad = false;
  int threads = 1;

  [[gnu::always_inline]] int64_t group() const { return H / G; }
  // Where query t stands among the keys, for ALiBi, documents and distances.
  [[gnu::always_inline]] int64_t position(int64_t t) const { return S - T + t; }
};

struct ForwardOutput {
  void* output = nullptr;  // (B, H, T, E), contiguous, in the query's dtype
  float* lse = nullptr;    // (B, H, T); nullptr: nothing but the output is asked for
  // (3, B, H, T), for backward: each row's largest score; the sum of exp(score - largest) over its
  // keys; and the inverse of that sum with the sink's added. lse loses digits where scores are
  // large: of a row of the lowest float32 it would no longer know how many keys it has.
  float* softmax_state = nullptr;
  float* stats = nullptr;  // (6, B, H, T) in the order of HeadStats; nullptr: not asked for
};

// What of the weights is asked for after forward, in float32 and contiguous.
struct WeightsOutput {
  const float* softmax_state = nullptr;  // (3, B, H, T), what forward returned
  float* weights = nullptr;  // (B, H, T, S), or (B, T, S) for the mean over heads; given as 0
  bool is_mean = false;
};

// What backward is given beside the call, and what it fills in: float32, contiguous.
struct BackwardParams {
  TensorView grad_output;                // (B, H, T, E)
  TensorView output;                     // (B, H, T, E), what forward returned
  const float* softmax_state = nullptr;  // (3, B, H, T), likewise
  const float* grad_lse = nullptr;       // (B, H, T); nullptr: lse was not used
  float* query = nullptr;                // (B, H, T, D)
  float* key = nullptr;                  // (B, G, S, D)
  float* value = nullptr;                // (B, G, S, E)
  float* bias = nullptr;  // bias_size numbers with these strides; nullptr: not asked for
  int64_t bias_stride[4] = {0, 0, 0, 0};
  int64_t bias_size = 0;
  float* sinks = nullptr;  // (H,); nullptr: not asked for
};

enum class ForwardKernel { decode, chunked_prefill, prefill };

// One instruction set's kernels.
struct Kernels {
  const char* isa;
  // The kernel that `forward` runs: depends on sizes, threads and needs_grad alone.
  ForwardKernel (*forward_kernel)(const AttentionParams&);
  void (*forward)(const AttentionParams&, const ForwardOutput&);
  void (*backward)(const AttentionParams&, const BackwardParams&);
  void (*weights)(const AttentionParams&, const WeightsOutput&);
  // Keeps the arithmetic units busy, with products of bfloat16 pairs where there are any, and
  // returns how many operations that was: what a kernel's speed can be compared with.
  double (*multiply_add)(bool pairs, int64_t steps, int threads);
};

// The kernels of the best instruction set that this processor has; the environment variable
// POLYHEAD_CPU_ISA, or choose_isa, asks for another.
const Kernels& kernels();

// Returns whether this processor and this build have the named instruction set.
bool choose_isa(const char* name);

}  // namespace polyhead
