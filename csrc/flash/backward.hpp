// Flash attention backward: scores are recomputed, and normalized with the saved softmax state (Dao
// et al. 2022).
//
// With P the weights, Z the scores, o and do a row of the output and of its gradient:
//
//   dV = dropped(P)^T dO        dP = dropped(dO V^T)        dZ = P * (dP - do . o)
//   dQ = scale * dS K           dK = scale * dS^T Q         dS = dZ * (1 - (capped / softcap)^2)
//
// A task owns some of the key blocks of one KV head, and iterates over all queries of the group: it
// accumulates their dK and dV, and dQ into a partial sum of its own if several tasks share a head.
// Tasks depend on sizes and thread count alone, and so does every bit of the result.
#pragma once

#include "flash/backward_scratch.hpp"
#include "flash/prefill.hpp"
#include "flash/progress.hpp"

namespace polyhead::POLYHEAD_ISA {

// gemm operands are float32 or bfloat16 pairs; with pairs, P and dS are computed in float32 and
// then rounded to bfloat16, as a materialized attention in bfloat16 does.
template <class Element>
class Backward {
 public:
  Backward(const AttentionParams& a, const BackwardParams& g)
      : a_(a),
        g_(g),
        rows_(a.B * a.H * a.T),
        key_blocks_((a.S + kGradKeys - 1) / kGradKeys),
        splits_(min(max(key_blocks_, 1), a.threads / gcd(a.B * a.G, a.threads))),
        parts_(shares_bias() ? a.threads : 0) {}

  void run() {
    Buffer<float> deltas(rows_);
    Buffer<float> query_parts(splits_ > 1 ? splits_ * rows_ * a_.D : 0);
    Buffer<float> bias_parts(parts_ * g_.bias_size);
    const int64_t worker_size = Worker::size(a_);
    Buffer<float> scratch(a_.threads * worker_size);
    const int64_t heads = a_.B * a_.G;
    Progress prepared(heads), finished_splits(heads);
    // A task, when the rows of its KV head are prepared. The thread that ends the last split of a
    // head adds their gradients of the queries.
    const auto finish = [&](const Worker& worker, int64_t task) {
      const int64_t head = task / splits_;
      prepared.wait(head, 1);
      run_task(worker, task);
      if (splits_ > 1 && finished_splits.add(head) == splits_) add_query_parts(head);
    };
    deltas_ = deltas.data();
    query_parts_ = splits_ > 1 ? query_parts.data() : g_.query;
#pragma omp parallel num_threads(a_.threads)
    {
      Worker worker(a_, scratch.data() + thread_number() * worker_size);
      worker.bias = parts_ > 0 ? bias_parts.data() + thread_number() * g_.bias_size : g_.bias;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t head = 0; head < heads; ++head) {
        prepare_head(head);
        prepared.add(head);
      }
      if (parts_ > 0) {
        // Every part, as there may be fewer threads than requested.
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts_; ++part)
          clear(bias_parts.data() + part * g_.bias_size, g_.bias_size);
        // Static round-robin: which thread accumulates which task must not depend on timing.
#pragma omp for schedule(static, 1) nowait
        for (int64_t task = 0; task < heads * splits_; ++task) finish(worker, task);
      } else {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < heads * splits_; ++task) finish(worker, task);
      }
      if (parts_ > 0 || g_.sinks != nullptr) {
#pragma omp barrier
      }
      if (parts_ > 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g_.bias_size; i += 1024)
          add_parts(bias_parts.data() + i, parts_, g_.bias_size, min(1024, g_.bias_size - i),
                    g_.bias + i);
      }
      if (g_.sinks != nullptr) {
#pragma omp for schedule(static)
        for (int64_t h = 0; h < a_.H; ++h) g_.sinks[h] = sink_gradient(h);
      }
    }
  }

 private:
  static constexpr int kElementsPerStep = Dot<Element>::kElementsPerStep;
  using Worker = BackwardScratch<Element>;
  using Weight = typename Worker::Weight;

  int64_t size_d() const { return round_up(a_.D, kLanes); }
  int64_t size_e() const { return round_up(a_.E, kLanes); }

  // True if two tasks may add to the same element of the gradient of the bias.
  bool shares_bias() const {
    if (g_.bias == nullptr) return false;
    const bool by_head =
        (g_.bias_stride[0] != 0 || a_.B == 1) && (g_.bias_stride[1] != 0 || a_.G == 1);
    return !by_head || (g_.bias_stride[3] == 0 && splits_ > 1);
  }

  // A block of queries against a block of keys.
  struct Block {
    int64_t b, h, t, rows, s, keys;
    KeyRange tiles[kGradTiles];  // the keys of each tile, relative to s
    int64_t tile_count() const { return (rows + kTileRows - 1) / kTileRows; }
    int64_t tile_rows(int64_t tile) const { return min(kTileRows, rows - tile * kTileRows); }
    int64_t padded_keys() const { return padded(keys); }
  };

  // Keys that tiles read or write: whole tiles, and whole vectors. Only these are cleared, as
  // clearing a whole block takes longer than a short call.
  static int64_t padded(int64_t keys) { return round_up(round_up(keys, kTileRows), kLanes); }
  static_assert(kGradKeys % kTileRows == 0 && kGradKeys % kLanes == 0);

  static void add_parts(const float* parts, int64_t count, int64_t stride, int64_t size,
                        float* to) {
    for (int64_t i = 0; i < size; i += kLanes) {
      F32 total{};
      for (int64_t part = 0; part < count; ++part)
        total += load_n(parts + part * stride + i, size - i);
      store_n(to + i, total, size - i);
    }
  }

  // Rows of a KV head, which are adjacent: those of the query heads of its group.
  int64_t rows_of_head() const { return a_.group() * a_.T; }

  void prepare_head(int64_t head) const {
    const int64_t rows = rows_of_head(), first = head * rows;
    for (int64_t row = first; row < first + rows; ++row) prepare_row(row);
    for (int64_t split = 0; split < splits_; ++split)
      clear(query_parts_ + (split * rows_ + first) * a_.D, rows * a_.D);
  }

  void add_query_parts(int64_t head) const {
    const int64_t rows = rows_of_head(), first = head * rows;
    for (int64_t row = first; row < first + rows; ++row)
      add_parts(query_parts_ + row * a_.D, splits_, rows_ * a_.D, a_.D, g_.query + row * a_.D);
  }

  // delta = do . o. (The gradient of lse is added to dZ directly: exp(score - lse) * dlse.)
  void prepare_row(int64_t row) const {
    const int64_t t = row % a_.T, h = row / a_.T % a_.H, b = row / a_.T / a_.H;
    F32 total{};
    dispatch_dtype(a_.query.dtype, [&](auto number) {
      const auto* output = row_of<decltype(number)>(g_.output, b, h, t);
      const auto* grad = row_of<decltype(number)>(g_.grad_output, b, h, t);
      for (int64_t e = 0; e < a_.E; e += kLanes)
        total += load_n(output + e, a_.E - e) * load_n(grad + e, a_.E - e);
    });
    deltas_[row] = reduce_add(total);
  }

  // The weight of the sink in a row. (exp(sink - row_max) would overflow for a large sink.)
  float sink_weight(int64_t row, float sink) const {
    const float row_max = g_.softmax_state[row];
    if (sink > row_max)
      return 1.0F / (1.0F + g_.softmax_state[rows_ + row] * exp_of(row_max - sink));
    return exp_of(sink - row_max) * g_.softmax_state[2 * rows_ + row];
  }

  float sink_gradient(int64_t h) const {
    float total = 0.0F;
    for (int64_t b = 0; b < a_.B; ++b) {
      for (int64_t t = 0; t < a_.T; ++t) {
        const int64_t row = (b * a_.H + h) * a_.T + t;
        if (g_.softmax_state[row] == -kInfinity) continue;
        total -= deltas_[row] * sink_weight(row, a_.sinks[h]);
      }
    }
    return total;
  }

  void run_task(const Worker& worker, int64_t task) const {
    const int64_t head = task / splits_, split = task % splits_;
    const int64_t b = head / a_.G, g = head % a_.G;
    // Every splits_-th block: with a causal mask more queries attend to early keys.
    for (int64_t block = split; block < key_blocks_; block += splits_) {
      const int64_t s = block * kGradKeys;
      const int64_t count = min(kGradKeys, a_.S - s);
      pack_keys(a_.key, b, g, s, s + count, a_.D, worker.key_columns);
      pack_keys(a_.value, b, g, s, s + count, a_.E, worker.value_columns);
      pack_depth_major(a_.key, b, g, s, s + count, a_.D, worker.key_steps);
      const int64_t steps = PackedLayout<Element>::steps(count), end = padded(count);
      clear(worker.key_steps + steps * size_d(), (end / kElementsPerStep - steps) * size_d());
      clear(worker.key_grad, end * size_d());
      clear(worker.value_grad, end * size_e());
      for (int64_t h = g * a_.group(); h < (g + 1) * a_.group(); ++h)
        for (int64_t t = 0; t < a_.T; t += kGradQueries)
          run_block(worker, {b, h, t, min(kGradQueries, a_.T - t), s, count, {}}, split);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (b * a_.G + g) * a_.S + s + i;
        copy_row(worker.key_grad + i * size_d(), a_.D, g_.key + at * a_.D);
        copy_row(worker.value_grad + i * size_e(), a_.E, g_.value + at * a_.E);
      }
    }
  }

  static void copy_row(const float* from, int64_t size, float* to) {
    std::memcpy(to, from, static_cast<size_t>(size) * sizeof(float));
  }

  void run_block(const Worker& worker, Block block, int64_t split) const {
    bool any = false;
    for (int64_t i = 0; i < block.tile_count(); ++i) {
      const int64_t t = block.t + i * kTileRows;
      const KeyRange keys = key_range(a_, block.b, t, t + block.tile_rows(i));
      block.tiles[i] = {max(keys.begin - block.s, 0) / kLanes * kLanes,
                        min(round_up(keys.end - block.s, kLanes), round_up(block.keys, kLanes))};
      if (block.tiles[i].empty()) block.tiles[i] = {0, 0};
      any = any || !block.tiles[i].empty();
    }
    if (!any) return;
    const int64_t end = block.t + block.rows;
    pack_queries(a_.query, block.b, block.h, block.t, end, a_.D, worker.queries);
    pack_queries(g_.grad_output, block.b, block.h, block.t, end, a_.E, worker.grads);
    if constexpr (kElementsPerStep > 1) {
      pack_depth_major(a_.query, block.b, block.h, block.t, end, a_.D, worker.query_steps);
      pack_depth_major(g_.grad_output, block.b, block.h, block.t, end, a_.E, worker.grad_steps);
    }
    multiply_columns(block, worker.queries, worker.key_columns, a_.D, a_.scale, worker.weights);
    multiply_columns(block, worker.grads, worker.value_columns, a_.E, 1.0F, worker.scores);
    for (int64_t row = 0; row < block.rows; ++row) differentiate_row(worker, block, row);
    if constexpr (kElementsPerStep > 1) {
      pack_bf16_pair_rows(worker.weights, block, worker.weight_steps);
      pack_bf16_pair_rows(worker.scores, block, worker.score_steps);
    }
    add_to_keys(block, worker.weight_steps, worker.grad_steps, a_.E, worker.value_grad);
    add_to_keys(block, worker.score_steps, worker.query_steps, a_.D, worker.key_grad);
    add_to_queries(worker, block, split);
  }

  // gemm: products = factor * rows @ columns, for the keys of each tile.
  void multiply_columns(const Block& block, const Element* rows, const Element* columns,
                        int64_t depth, float factor, float* products) const {
    const int64_t row_stride = round_up(depth, kLanes);
    const int64_t steps = PackedLayout<Element>::steps(depth);
    for (int64_t panel = 0; panel < block.keys; panel += kPanel) {
      const Rhs<Element> right{columns + PackedLayout<Element>::column_panel(panel, depth), kPanel};
      for (int64_t i = 0; i < block.tile_count(); ++i) {
        if (panel >= block.tiles[i].end || panel + kPanel <= block.tiles[i].begin) continue;
        const Lhs<Element> left{rows + i * kTileRows * row_stride, row_stride, 1};
        float* to = products + i * kTileRows * kGradStride + panel;
        tile_of<kTileVectors>(block.tile_rows(i), left, right, steps,
                              [&](int row, int v, F32 product) {
                                store(to + row * kGradStride + v * kLanes, product * factor);
                              });
      }
    }
  }

  // Turns dot products into P after dropout, and dP into scale * dS, in place; 0 outside the range.
  void differentiate_row(const Worker& worker, const Block& block, int64_t row) const {
    float* weights = worker.weights + row * kGradStride;
    float* scores = worker.scores + row * kGradStride;
    auto* to_weights = reinterpret_cast<Weight*>(weights);
    auto* to_scores = reinterpret_cast<Weight*>(scores);
    const Query q(a_, block.b, block.h, block.t + row);
    const int64_t at = (q.b * a_.H + q.h) * a_.T + q.t;
    // The weights of forward up to one factor per row, so that the rounding errors of a row cancel
    // in dZ as well.
    const float row_max = g_.softmax_state[at], inverse = g_.softmax_state[2 * rows_ + at];
    const float keys_inverse = 1.0F / g_.softmax_state[rows_ + at];
    const KeyRange span = row_max == -kInfinity ? KeyRange{0, 0} : block.tiles[row / kTileRows];
    const int64_t begin = block.s + span.begin;
    apply_score_mods(a_, q, begin, block.s + span.end, weights + span.begin, worker.capped);
    const float delta = deltas_[at];
    const Dropout dropout(a_);
    const uint64_t row_key = dropout.row_key(at);
    F32 bias_sum{};
    const F32 cap = splat(a_.softcap == 0.0F ? 0.0F : 1.0F / a_.softcap);
    for (int64_t i = span.begin; i < span.end; i += kLanes) {
      const F32 power = exp2_of((load(weights + i) - row_max) * kLog2E);
      const F32 weight = inverse * power;
      F32 kept = splat(1.0F);
      if (a_.dropout > 0.0)
        kept = select(dropout.kept(row_key, block.s + i), splat(dropout.factor), F32{});
      F32 score = weight * (kept * load(scores + i) - delta);
      // d lse / d score is exp(score - lse), which is no weight: lse leaves the sink out.
      if (g_.grad_lse != nullptr) score += g_.grad_lse[at] * keys_inverse * power;
      store(to_weights + i, kept * weight);
      bias_sum += score;
      if (worker.bias != nullptr && g_.bias_stride[3] != 0)
        add_to_bias(worker.bias, q, block.s + i, score);
      const F32 capped = load(worker.capped + i - span.begin) * cap;
      if (a_.softcap != 0.0F) score *= 1.0F - capped * capped;
      store(to_scores + i, score * a_.scale);
    }
    Weight* const padded[] = {to_weights, to_scores};
    for (Weight* to : padded) {
      clear(to, span.begin);
      clear(to + span.end, block.padded_keys() - span.end);
    }
    // One element for all keys: reduced first, as that rounds less often.
    if (worker.bias != nullptr && g_.bias_stride[3] == 0)
      *bias_at(worker.bias, q) += reduce_add(bias_sum);
  }

  float* bias_at(float* bias, const Query& q) const {
    return bias + q.b * g_.bias_stride[0] + q.h * g_.bias_stride[1] + q.t * g_.bias_stride[2];
  }

  void add_to_bias(float* bias, const Query& q, int64_t s, F32 gradient) const {
    const int64_t stride = g_.bias_stride[3];
    float* to = bias_at(bias, q) + s * stride;
    const int64_t count = min(kLanes, a_.S - s);
    if (stride == 1) return store_n(to, load_n(to, count) + gradient, count);
    for (int64_t i = 0; i < count; ++i) to[i * stride] += gradient[i];
  }

  // Packs rows of P or dS, two at a time, as lhs steps of bfloat16 pairs.
  static void pack_bf16_pair_rows(const float* from, const Block& block, Element* to) {
    static constexpr Weight kZeros[kGradKeys] = {};
    for (int64_t row = 0; row < block.rows; row += 2, from += 2 * kGradStride, to += kGradStride) {
      const auto* first = reinterpret_cast<const Weight*>(from);
      const auto* second =
          row + 1 < block.rows ? reinterpret_cast<const Weight*>(from + kGradStride) : kZeros;
      for (int64_t i = 0; i < block.padded_keys(); i += kLanes)
        store_as(to + i, pack_bf16_pairs(first + i, second + i));
    }
  }

  // dK and dV: to (keys x size) += lhs^T @ rhs, of lhs (queries x keys) and rhs (queries x size).
  void add_to_keys(const Block& block, const Element* left, const Element* right, int64_t size,
                   float* to) const {
    const int64_t stride = round_up(size, kLanes);
    for (int64_t key = 0; key < block.keys; key += kTileRows) {
      // The rows whose tiles reach any of these keys.
      KeyRange rows{block.rows, 0};
      for (int64_t i = 0; i < block.tile_count(); ++i) {
        if (block.tiles[i].end <= key || key + kTileRows <= block.tiles[i].begin) continue;
        rows.begin = min(rows.begin, i * kTileRows);
        rows.end = i * kTileRows + block.tile_rows(i);
      }
      if (rows.empty()) continue;
      const int64_t first = rows.begin / kElementsPerStep;
      const Lhs<Element> a{left + first * kGradStride + key, 1, kGradStride};
      for (int64_t column = 0; column < size; column += kPanel) {
        const Rhs<Element> b{right + first * stride + column, stride};
        float* at = to + key * stride + column;
        tile_of(kTileRows, PackedLayout<Element>::panel_width(column, size) / kLanes, a, b,
                PackedLayout<Element>::steps(rows.end - rows.begin),
                [&](int row, int v, F32 product) {
                  float* sum = at + row * stride + v * kLanes;
                  store(sum, load(sum) + product);
                });
      }
    }
  }

  void add_to_queries(const Worker& worker, const Block& block, int64_t split) const {
    for (int64_t i = 0; i < block.tile_count(); ++i) {
      const KeyRange span = block.tiles[i];
      if (span.empty()) continue;
      const int64_t first = i * kTileRows;
      const auto* scores = reinterpret_cast<const Element*>(worker.scores + first * kGradStride);
      const Lhs<Element> left{scores + span.begin / kElementsPerStep, kGradStride, 1};
      for (int64_t d = 0; d < a_.D; d += kPanel) {
        const Rhs<Element> keys{worker.key_steps + span.begin / kElementsPerStep * size_d() + d,
                                size_d()};
        tile_of(block.tile_rows(i), PackedLayout<Element>::panel_width(d, a_.D) / kLanes, left,
                keys, (span.end - span.begin) / kElementsPerStep, [&](int row, int v, F32 product) {
                  store(worker.query_grad + (first + row) * size_d() + d + v * kLanes, product);
                });
      }
      for (int64_t row = first; row < first + block.tile_rows(i); ++row) {
        const int64_t at = (block.b * a_.H + block.h) * a_.T + block.t + row;
        float* to = query_parts_ + (split * rows_ + at) * a_.D;
        const float* from = worker.query_grad + row * size_d();
        for (int64_t d = 0; d < a_.D; d += kLanes)
          store_n(to + d, load_n(to + d, a_.D - d) + load(from + d), a_.D - d);
      }
    }
  }

  const AttentionParams& a_;
  const BackwardParams& g_;
  int64_t rows_, key_blocks_, splits_, parts_;
  float* deltas_ = nullptr;
  float* query_parts_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
