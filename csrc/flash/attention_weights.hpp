// Materializes the attention weights after forward: scores are recomputed and normalized with the
// saved softmax state. The mean over heads is accumulated in place, per block of queries.
#pragma once

#include "flash/prefill.hpp"

namespace polyhead::POLYHEAD_ISA {

class WriteWeights {
 public:
  WriteWeights(const AttentionParams& a, const WeightsOutput& out)
      : a_(a),
        out_(out),
        query_blocks_((a.T + kQueryBlock - 1) / kQueryBlock),
        keys_size_(PackedLayout<float>::columns_size(a.S, a.D)),
        heads_per_task_(out.is_mean ? a.H : 1) {}

  void run() {
    const int64_t key_blocks = (a_.S + kKeyBlock - 1) / kKeyBlock;
    const int64_t tasks_per_block = a_.H / heads_per_task_;
    Buffer<float> packed(a_.G * keys_size_);
    Buffer<float> scratch(a_.threads * worker_size());
    keys_ = packed.data();
#pragma omp parallel num_threads(a_.threads)
    {
      float* worker = scratch.data() + thread_number() * worker_size();
      for (int64_t b = 0; b < a_.B; ++b) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a_.G * key_blocks; ++i)
          pack_block(b, i / key_blocks, i % key_blocks * kKeyBlock);
        // Causal masks: the longest blocks first, so that no thread ends with one.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < query_blocks_ * tasks_per_block; ++i) {
          const int64_t t = (query_blocks_ - 1 - i / tasks_per_block) * kQueryBlock;
          const int64_t h = i % tasks_per_block * heads_per_task_;
          for (int64_t head = h; head < h + heads_per_task_; ++head)
            write_block(worker, b, head, t);
        }
      }
    }
  }

 private:
  int64_t query_stride() const { return round_up(a_.D, kLanes); }
  int64_t worker_size() const { return kQueryBlock * (query_stride() + kScoreStride); }

  void pack_block(int64_t b, int64_t g, int64_t begin) const {
    const int64_t end = min(begin + kKeyBlock, a_.S);
    pack_keys(a_.key, b, g, begin, end, a_.D,
              keys_ + g * keys_size_ + PackedLayout<float>::column_panel(begin, a_.D));
  }

  // Adds the weights of one head and a block of queries.
  void write_block(float* queries, int64_t b, int64_t h, int64_t t) const {
    const int64_t rows = min(kQueryBlock, a_.T - t);
    float* scores = queries + kQueryBlock * query_stride();
    pack_queries(a_.query, b, h, t, t + rows, a_.D, queries);
    KeyRange tiles[kRowTiles];
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const KeyRange keys = key_range(a_, b, t + row, min(t + row + kTileRows, t + rows));
      tiles[row / kTileRows] = {keys.begin / kLanes * kLanes, round_up(keys.end, kLanes)};
    }
    const KeyRange keys = key_range(a_, b, t, t + rows);
    for (int64_t s = keys.begin / kKeyBlock * kKeyBlock; s < keys.end; s += kKeyBlock) {
      const int64_t end = min(s + kKeyBlock, keys.end);
      // Panel by panel of keys: each stays in L1 for all rows of the block.
      for (int64_t panel = s; panel < end; panel += kPanel)
        for (int64_t row = 0; row < rows; row += kTileRows)
          if (panel < tiles[row / kTileRows].end && tiles[row / kTileRows].begin < panel + kPanel)
            score_tile(queries + row * query_stride(), min(kTileRows, rows - row), h / a_.group(),
                       panel, scores + row * kScoreStride + (panel - s));
      for (int64_t row = 0; row < rows; ++row) {
        const KeyRange span = tiles[row / kTileRows];
        const int64_t begin = max(span.begin, s);
        add_row(Query(a_, b, h, t + row), begin, min(span.end, s + kKeyBlock),
                scores + row * kScoreStride + (begin - s));
      }
    }
  }

  void score_tile(const float* queries, int64_t rows, int64_t g, int64_t panel,
                  float* scores) const {
    const Lhs<float> left{queries, query_stride(), 1};
    const Rhs<float> right{keys_ + g * keys_size_ + PackedLayout<float>::column_panel(panel, a_.D),
                           kPanel};
    tile_of<kTileVectors>(rows, left, right, a_.D, [&](int row, int v, F32 product) {
      store(scores + row * kScoreStride + v * kLanes, product * a_.scale);
    });
  }

  void add_row(const Query& q, int64_t begin, int64_t end, float* scores) const {
    const int64_t at = (q.b * a_.H + q.h) * a_.T + q.t;
    const float row_max = out_.softmax_state[at],
                inverse = out_.softmax_state[2 * a_.B * a_.H * a_.T + at];
    if (begin >= end || row_max == -kInfinity) return;
    apply_score_mods(a_, q, begin, end, scores);
    const float share = 1.0F / static_cast<float>(heads_per_task_);
    float* row = out_.weights + (out_.is_mean ? q.b * a_.T + q.t : at) * a_.S;
    for (int64_t s = begin; s < min(end, a_.S); s += kLanes) {
      const F32 weight = inverse * exp2_of((load(scores + s - begin) - row_max) * kLog2E);
      store_n(row + s, load_n(row + s, a_.S - s) + weight * share, a_.S - s);
    }
  }

  const AttentionParams& a_;
  const WeightsOutput& out_;
  int64_t query_blocks_, keys_size_, heads_per_task_;
  float* keys_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
