// Interface between the torch binding and the kernels: plain pointers, sizes and strides.
//
// Letters as in src/polyhead/call.py: B batch rows, H query heads, G KV heads,
// T queries, S keys, D and E head sizes of keys and of values. Strides count elements. Kernel
// classes hold AttentionParams as a_ and BackwardParams as g_; z is a row of scores.
#pragma once

#include <cstdint>

namespace polyhead {

constexpr int64_t kMaxHeadSize = 576;          // of D and E: a latent key of DeepSeek
constexpr int64_t kMaxTokens = INT32_MAX - 1;  // of T and S: key ranges are int32

enum class Dtype { f32, bf16, f16, i8 };  // i8: quantized keys and values, with scales

// (B, heads, tokens, size) with any strides; a stride of 0 broadcasts. The last stride of query,
// key and value is 1.
struct TensorView {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride[4] = {0, 0, 0, 0};

  // Quantized KV cache: value = int8 * scale, one scale per token and head.
  const float* scales = nullptr;
  int64_t scale_stride[3] = {0, 0, 0};
  // Paged KV cache: token s of batch row b is in slot s % block_size of block
  // block_table[b * block_table_stride + s / block_size], and stride[0] is that of blocks. nullptr:
  // contiguous cache.
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int64_t blocks = 0;  // of the pool
  int64_t block_size = 1;
};

struct AttentionParams {
  int64_t B, H, G, T, S, D, E;
  TensorView query, key, value;
  TensorView bias;                      // added to the scores; data == nullptr: none
  const uint8_t* dense_mask = nullptr;  // bool, true: may attend; nullptr: none
  int64_t dense_mask_stride[4] = {0, 0, 0, 0};

  // Query t of batch row b may attend to keys kv_begin[b * kv_range_stride + t] up to, not
  // including, kv_end[b * kv_range_stride + t].
  const int32_t* kv_begin = nullptr;
  const int32_t* kv_end = nullptr;
  int64_t kv_range_stride = 0;
  // Position of query 0 of each batch row; nullptr: S - T.
  const int64_t* query_offset = nullptr;
  int64_t query_offset_stride = 0;
  // The document of each key, if documents are not contiguous; nullptr: the ranges suffice.
  const int32_t* doc_ids = nullptr;
  int64_t doc_ids_stride = 0;

  const float* sinks = nullptr;         // (H,)
  const float* alibi_slopes = nullptr;  // (H,)
  float scale = 1.0F;
  float softcap = 0.0F;  // 0: none
  double dropout = 0.0;
  uint64_t seed = 0;
  // Backward recomputes the scores and must get the bits of forward: the same order of summation,
  // so the same tiles.
  bool needs_grad = false;
  int threads = 1;

  [[gnu::always_inline]] int64_t group() const { return H / G; }
  // Position of query t of batch row b among the keys, for ALiBi, documents and distances.
  [[gnu::always_inline]] int64_t position(int64_t b, int64_t t) const {
    return t + (query_offset == nullptr ? S - T : query_offset[b * query_offset_stride]);
  }
};

struct ForwardOutput {
  void* output = nullptr;  // (B, H, T, E), contiguous, in the query's dtype
  float* lse = nullptr;    // (B, H, T); nullptr: output only
  // (3, B, H, T), for backward, per row: row_max; row_sum, the sum of exp(score - row_max) over the
  // keys; and 1 / row_sum with the sink included. lse alone would lose digits of large scores: in a
  // row of the lowest float32 it no longer depends on the number of keys.
  float* softmax_state = nullptr;
  float* stats = nullptr;  // (6, B, H, T) in the order of HeadStats; nullptr: none
};

// Weights materialized after forward, in float32 and contiguous.
struct WeightsOutput {
  const float* softmax_state = nullptr;  // (3, B, H, T), of forward
  float* weights = nullptr;  // (B, H, T, S), or (B, T, S) for the mean over heads; zero on entry
  bool is_mean = false;
};

// Inputs of backward in addition to AttentionParams, and its outputs: float32, contiguous.
struct BackwardParams {
  TensorView grad_output;                // (B, H, T, E)
  TensorView output;                     // (B, H, T, E), of forward
  const float* softmax_state = nullptr;  // (3, B, H, T), of forward
  const float* grad_lse = nullptr;       // (B, H, T); nullptr: lse was not used
  float* query = nullptr;                // (B, H, T, D)
  float* key = nullptr;                  // (B, G, S, D)
  float* value = nullptr;                // (B, G, S, E)
  float* bias = nullptr;                 // bias_size floats with these strides; nullptr: none
  int64_t bias_stride[4] = {0, 0, 0, 0};
  int64_t bias_size = 0;
  float* sinks = nullptr;  // (H,); nullptr: none
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
  // Peak throughput: multiply-adds of registers, with bf16 dot products if `pairs` and available.
  // Returns the number of operations.
  double (*multiply_add)(bool pairs, int64_t steps, int threads);
};

// Thrown here, as an inline constructor of std would be shared by the instruction sets.
[[noreturn]] void throw_bad_alloc();

// The kernels of the best instruction set of this processor, unless the environment variable
// POLYHEAD_CPU_ISA or choose_isa names another.
const Kernels& kernels();

// Selects an instruction set; returns false if this processor or this build lacks it.
bool choose_isa(const char* name);

}  // namespace polyhead
