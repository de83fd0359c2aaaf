// Forward for many queries: keys and values are packed once a key head, blocks of queries walk over
// blocks of keys, and the scores of one block never leave the cache.
#pragma once

#include "buffer.hpp"
#include "pack.hpp"
#include "softmax.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kQueryBlock = 96;  // 16 tiles: as often are keys read that came from L2
#if defined(__AVX512F__)
constexpr int64_t kKeyBlock = 512;  // a tile's scores, 12 KB, stay in L1; the keys in L2
constexpr int64_t kTilesTogether = 1;
#else
constexpr int64_t kKeyBlock = 256;  // a panel of values, 16 KB, stays in L1,
constexpr int64_t kTilesTogether = 4;  // and so does one of keys, for as many tiles
#endif
constexpr int64_t kScoreStride = kKeyBlock + 16;  // not a power of 2: rows fall in different sets
constexpr int64_t kRowTiles = kQueryBlock / kTileRows;
constexpr int64_t kRowsTogether = kTilesTogether * kTileRows;

// Keys [begin, end).
struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The keys that any of queries [begin, end) of a batch row may attend to.
inline Span keys_of(const Attention& a, int64_t b, int64_t begin, int64_t end) {
  Span span{a.S, 0};
  for (int64_t t = begin; t < end; ++t) {
    const Query q(a, b, 0, t);
    if (q.first >= q.last) continue;
    span.begin = smaller(span.begin, q.first);
    span.end = greater(span.end, q.last);
  }
  return span;
}

inline void write_output(const View& query, void* output, int64_t at, const float* from,
                         int64_t size, float factor) {
  by_dtype(query.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(output) + at;
    for (int64_t e = 0; e < size; e += kLanes)
      store_first(to + e, load(from + e) * factor, size - e);
  });
}

// Writes what one query gives; `weighted` is the sum of exp(score - most) * value.
inline void write_row(const Attention& a, const Output& out, int64_t b, int64_t h, int64_t t,
                      const RowSums& row, const float* weighted) {
  const int64_t rows = a.B * a.H * a.T, at = (b * a.H + h) * a.T + t;
  const RowResult result = finish_row(a, h, row);
  // Written as zeros, not as a product: an empty row's buffer may hold anything.
  alignas(64) static constexpr float kZeros[kMaxHeadSize] = {};
  const bool is_empty = row.most == -kInfinity;
  write_output(a.query, out.output, at * a.E, is_empty ? kZeros : weighted, a.E, result.factor);
  if (out.lse == nullptr) return;
  out.lse[at] = result.lse;
  out.shifts[at] = row.most;
  out.shifts[rows + at] = result.log_total;
  out.shifts[2 * rows + at] = result.inverse;
  if (out.stats != nullptr) write_stats(a, h, row, out.stats + at, a.B * a.H * a.T);
}

template <class Element>
class Prefill {
 public:
  Prefill(const Attention& a, const Output& out)
      : a_(a), out_(out), query_blocks_((a.T + kQueryBlock - 1) / kQueryBlock) {}

  void run() {
    const int64_t heads = a_.B * a_.G;
    const int64_t tasks_a_head = a_.group() * query_blocks_;
    // As many key heads at a time as keep the threads busy; their panels stay in the cache.
    const int64_t wave = smaller(heads, (16 * a_.threads + tasks_a_head - 1) / tasks_a_head);
    const int64_t key_blocks = (a_.S + kKeyBlock - 1) / kKeyBlock;
    keys_size_ = Packed<Element>::columns_size(a_.S, a_.D);
    values_size_ = Packed<Element>::rows_size(a_.S, a_.E);
    Buffer<Element> packed(wave * (keys_size_ + values_size_));
    Buffer<Span> needed(a_.B);
    Buffer<float> scratch(a_.threads * worker_size());
    for (int64_t b = 0; b < a_.B; ++b) needed.data()[b] = keys_of(a_, b, 0, a_.T);
    needed_ = needed.data();
    keys_ = packed.data();
    values_ = keys_ + wave * keys_size_;
#pragma omp parallel num_threads(a_.threads)
    {
      const Worker worker(*this, scratch.data() + thread_number() * worker_size());
      for (int64_t start = 0; start < heads; start += wave) {
        const int64_t count = smaller(wave, heads - start);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * key_blocks; ++i)
          pack_block(start, i / key_blocks, i % key_blocks * kKeyBlock);
        // The longest rows of a causal mask come first, so that no thread ends with one.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * tasks_a_head; ++i) {
          const int64_t in_head = i % tasks_a_head;
          const int64_t block = query_blocks_ - 1 - in_head / a_.group();
          attend(worker, start, i / tasks_a_head, in_head % a_.group(), block * kQueryBlock);
        }
      }
    }
  }

 private:
  int64_t query_stride() const { return round_up(a_.D, kLanes); }
  int64_t output_stride() const { return round_up(a_.E, kLanes); }
  int64_t worker_size() const {
    return kQueryBlock * (query_stride() + output_stride()) + kRowsTogether * kScoreStride;
  }

  // One thread's scratch: a block of queries, their scores and their output.
  struct Worker {
    Element* queries;
    float* scores;
    float* weighted;
    Worker(const Prefill& p, float* scratch)
        : queries(reinterpret_cast<Element*>(scratch)),
          scores(scratch + kQueryBlock * p.query_stride()),
          weighted(scores + kRowsTogether * kScoreStride) {}
  };

  // A block of queries of one head, on its way through the keys.
  struct Block {
    int64_t b, h, t, rows;
    const Element* keys;
    const Element* values;
    Span tiles[kRowTiles];  // the keys that each tile of rows may attend to
    RowSums sums[kQueryBlock];
    float factors[kRowsTogether];

    int64_t tile_count() const { return (rows + kTileRows - 1) / kTileRows; }
    int64_t tile_rows(int64_t tile) const { return smaller(kTileRows, rows - tile * kTileRows); }
    // Of one tile's keys those in a block of keys, in whole vectors.
    Span within(int64_t tile, int64_t block) const {
      return {greater(tiles[tile].begin / kLanes * kLanes, block),
              smaller(round_up(tiles[tile].end, kLanes), block + kKeyBlock)};
    }
  };

  // Tiles [first, last) of a block of queries, and of a block of keys those that each takes.
  struct Together {
    int64_t first, last;
    Span keys;  // of any of them
    Span spans[kTilesTogether];

    Together(const Block& block, int64_t first, int64_t s)
        : first(first),
          last(smaller(first + kTilesTogether, block.tile_count())),
          keys{s + kKeyBlock, s} {
      for (int64_t i = first; i < last; ++i) {
        const Span span = spans[i - first] = block.within(i, s);
        if (span.empty()) continue;
        keys.begin = smaller(keys.begin, span.begin);
        keys.end = greater(keys.end, span.end);
      }
    }
    const Span& of(int64_t tile) const { return spans[tile - first]; }
    // Where the scores of a tile's first row and of key `s` are.
    int64_t place(int64_t tile, int64_t s) const {
      return (tile - first) * kTileRows * kScoreStride + s % kKeyBlock;
    }
  };

  void pack_block(int64_t start, int64_t slot, int64_t begin) const {
    const int64_t b = (start + slot) / a_.G;
    const int64_t g = (start + slot) % a_.G;
    const int64_t end = smaller(begin + kKeyBlock, a_.S);
    if (needed_[b].end <= begin || end <= needed_[b].begin) return;
    pack_columns(a_.key, b, g, begin, end, a_.D,
                 keys_ + slot * keys_size_ + Packed<Element>::column_panel(begin, a_.D));
    pack_rows(a_.value, b, g, begin, end, a_.S, a_.E, values_ + slot * values_size_);
  }

  void attend(const Worker& worker, int64_t start, int64_t slot, int64_t in_group,
              int64_t t) const {
    Block block;
    block.b = (start + slot) / a_.G;
    const int64_t g = (start + slot) % a_.G;
    block.h = g * a_.group() + in_group;
    block.t = t;
    block.rows = smaller(kQueryBlock, a_.T - t);
    block.keys = keys_ + slot * keys_size_;
    block.values = values_ + slot * values_size_;
    pack_queries(a_.query, block.b, block.h, t, t + block.rows, a_.D, worker.queries);
    clear(worker.weighted, block.rows * output_stride());
    Span keys{a_.S, 0};
    for (int64_t i = 0; i < block.tile_count(); ++i) {
      const int64_t row = t + i * kTileRows;
      block.tiles[i] = keys_of(a_, block.b, row, row + block.tile_rows(i));
      keys.begin = smaller(keys.begin, block.tiles[i].begin);
      keys.end = greater(keys.end, block.tiles[i].end);
    }
    for (int64_t s = keys.begin / kKeyBlock * kKeyBlock; s < keys.end; s += kKeyBlock) {
      for (int64_t first = 0; first < block.tile_count(); first += kTilesTogether) {
        const Together tiles(block, first, s);
        if (tiles.keys.empty()) continue;
        score_keys(worker, block, tiles);
        if (out_.stats != nullptr) {
          weigh_keys<true>(worker, block, tiles);
        } else {
          weigh_keys<false>(worker, block, tiles);
        }
        add_values(worker, block, tiles);
      }
    }
    for (int64_t row = 0; row < block.rows; ++row)
      write_row(a_, out_, block.b, block.h, t + row, block.sums[row],
                worker.weighted + row * output_stride());
  }

  // scale * query @ key^T, a panel of keys after the other.
  void score_keys(const Worker& worker, const Block& block, const Together& tiles) const {
    const int64_t steps = Packed<Element>::steps(a_.D);
    const float scale = a_.scale;
    const int64_t begin = tiles.keys.begin / kPanel * kPanel;
    for (int64_t panel = begin; panel < tiles.keys.end; panel += kPanel) {
      const RightOperand<Element> keys{
          block.keys + Packed<Element>::column_panel(panel, a_.D), kPanel};
      for (int64_t i = tiles.first; i < tiles.last; ++i) {
        const Span& span = tiles.of(i);
        if (panel >= span.end || panel + kPanel <= span.begin) continue;
        const LeftOperand<Element> queries{worker.queries + i * kTileRows * query_stride(),
                                           query_stride(), 1};
        float* to = worker.scores + tiles.place(i, panel);
        const int64_t width = smaller(kPanel, span.end - panel);
        tile_of(block.tile_rows(i), width / kLanes, queries, keys, steps,
                [&](int row, int v, F32 product) {
                  store(to + row * kScoreStride + v * kLanes, product * scale);
                });
      }
    }
  }

  template <bool kStats>
  void weigh_keys(const Worker& worker, Block& block, const Together& tiles) const {
    for (int64_t i = tiles.first; i < tiles.last; ++i) {
      const Span& span = tiles.of(i);
      if (span.empty()) continue;
      for (int64_t j = 0; j < block.tile_rows(i); ++j) {
        const int64_t row = i * kTileRows + j;
        const Query q(a_, block.b, block.h, block.t + row);
        float* scores = worker.scores + tiles.place(i, span.begin) + j * kScoreStride;
        shape_scores(a_, q, span.begin, span.end, scores);
        block.factors[row - tiles.first * kTileRows] =
            online_softmax<kStats, Element>(a_, q, span.begin, span.end, scores, block.sums[row]);
      }
    }
  }

  // weighted = factor * weighted + weights @ value.
  void add_values(const Worker& worker, const Block& block, const Together& tiles) const {
    constexpr int kDepth = Packed<Element>::kDepth;
    for (int64_t e = 0; e < a_.E; e += kPanel) {
      const int64_t width = Packed<Element>::panel_width(e, a_.E);
      const Element* panel = block.values + Packed<Element>::row_panel(e, a_.S);
      for (int64_t i = tiles.first; i < tiles.last; ++i) {
        const Span& span = tiles.of(i);
        if (span.empty()) continue;
        const float* weights = worker.scores + tiles.place(i, span.begin);
        const LeftOperand<Element> left{reinterpret_cast<const Element*>(weights), kScoreStride, 1};
        const RightOperand<Element> values{panel + span.begin / kDepth * width, width};
        float* to = worker.weighted + i * kTileRows * output_stride() + e;
        const float* factors = block.factors + (i - tiles.first) * kTileRows;
        tile_of(block.tile_rows(i), width / kLanes, left, values,
                (span.end - span.begin) / kDepth, [&](int row, int v, F32 product) {
                  float* at = to + row * output_stride() + v * kLanes;
                  store(at, load(at) * factors[row] + product);
                });
      }
    }
  }

  const Attention& a_;
  const Output& out_;
  int64_t query_blocks_;
  int64_t keys_size_ = 0, values_size_ = 0;
  const Span* needed_ = nullptr;  // of each batch row, the keys that any query may attend to
  Element* keys_ = nullptr;
  Element* values_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
