// Flash attention of a block of packed queries with blocks of packed keys and values: QK^T, online
// softmax, PV. Scores stay in L1. Prefill and ChunkedPrefill choose the blocks and pack the keys.
#pragma once

#include "flash/epilogue.hpp"
#include "flash/key_range.hpp"
#include "flash/softmax.hpp"
#include "simd/buffer.hpp"
#include "tiles/pack.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kPackGqaMaxTokens = 16;  // with more, the queries of one head fill the tiles
constexpr int64_t kScoreStride = kKeyBlock + 16;  // no power of 2: rows fall into different sets
constexpr int64_t kRowTiles = kQueryBlock / kTileRows;
constexpr int64_t kTileGroupRows = kTileGroup * kTileRows;

template <class Element>
class FlashBlock {
 protected:
  FlashBlock(const AttentionParams& a, const ForwardOutput& out)
      : a_(a),
        out_(out),
        packed_gqa_heads_(a.T <= kPackGqaMaxTokens ? a.group() : 1),
        rows_(packed_gqa_heads_ * a.T) {}

  // GQA packing: a run is the queries of one head, or, if these would not fill a tile, of all heads
  // of the group, concatenated head by head. Runs are cut into blocks.
  int64_t runs_per_kv_head() const { return a_.group() / packed_gqa_heads_; }

  int64_t query_stride() const { return round_up(a_.D, kLanes); }
  int64_t output_stride() const { return round_up(a_.E, kLanes); }
  static constexpr int64_t kScores = kTileGroupRows * kScoreStride;

  // Packed keys and values from token `origin` on, with room for `tokens`.
  struct Panels {
    const Element* keys;
    const Element* values;
    int64_t origin, tokens;
  };

  // A block of a run of queries.
  struct Block {
    int64_t b, h;         // the first head of the run
    int64_t start, rows;  // rows [start, start + rows) of the run
    Element* queries;
    SoftmaxState* sums;
    float* acc;                 // accumulator: the sum of exp(score - row_max) * value per row
    KeyRange keys;              // of the block
    KeyRange tiles[kRowTiles];  // of each tile of rows
    float factors[kTileGroupRows];

    int64_t tile_count() const { return (rows + kTileRows - 1) / kTileRows; }
    int64_t tile_rows(int64_t tile) const { return min(kTileRows, rows - tile * kTileRows); }
    // The keys of one tile within a block of keys, in whole vectors.
    KeyRange within(int64_t tile, int64_t block) const {
      return {max(tiles[tile].begin / kLanes * kLanes, block),
              min(round_up(tiles[tile].end, kLanes), block + kKeyBlock)};
    }
  };

  // Packs the queries of a block and resets its state.
  void begin(Block& block) const {
    for (int64_t row = 0; row < block.rows; ++row) {
      const Query q = query_of(block, row);
      read_row(a_.query, q.b, q.h, q.t, a_.D, block.queries + row * query_stride());
      block.sums[row] = SoftmaxState{};
    }
    clear(block.acc, block.rows * output_stride());
    block.keys = {a_.S, 0};
    for (int64_t i = 0; i < block.tile_count(); ++i) {
      block.tiles[i] = keys_of_tile(block, i);
      block.keys.begin = min(block.keys.begin, block.tiles[i].begin);
      block.keys.end = max(block.keys.end, block.tiles[i].end);
    }
  }

  // Accumulates the block of keys at `s` into a block of queries.
  void attend(Block& block, const Panels& panels, int64_t s, float* scores) const {
    for (int64_t first = 0; first < block.tile_count(); first += kTileGroup) {
      const TileGroup tiles(block, first, s);
      if (tiles.keys.empty()) continue;
      compute_scores(block, panels, tiles, scores);
      if (out_.stats != nullptr) {
        softmax_block<true>(block, tiles, scores);
      } else {
        softmax_block<false>(block, tiles, scores);
      }
      accumulate_pv(block, panels, tiles, scores);
    }
  }

  Query query_of(const Block& block, int64_t row) const {
    const int64_t in_run = block.start + row;
    if (in_run < a_.T) return Query(a_, block.b, block.h, in_run);
    return Query(a_, block.b, block.h + in_run / a_.T, in_run % a_.T);
  }

  const AttentionParams& a_;
  const ForwardOutput& out_;
  int64_t packed_gqa_heads_, rows_;

 private:
  // Tiles [first, last) of a block of queries, and the keys of each within a block of keys.
  struct TileGroup {
    int64_t first, last;
    KeyRange keys;  // of the group
    KeyRange spans[kTileGroup];

    TileGroup(const Block& block, int64_t first, int64_t s)
        : first(first), last(min(first + kTileGroup, block.tile_count())), keys{s + kKeyBlock, s} {
      for (int64_t i = first; i < last; ++i) {
        const KeyRange span = spans[i - first] = block.within(i, s);
        if (span.empty()) continue;
        keys.begin = min(keys.begin, span.begin);
        keys.end = max(keys.end, span.end);
      }
    }
    const KeyRange& of(int64_t tile) const { return spans[tile - first]; }
    // Offset of the score of the tile's first row and key `s`.
    int64_t offset(int64_t tile, int64_t s) const {
      return (tile - first) * kTileRows * kScoreStride + s % kKeyBlock;
    }
  };

  // The key range of a tile, whose rows may belong to several heads.
  KeyRange keys_of_tile(const Block& block, int64_t tile) const {
    const int64_t first = block.start + tile * kTileRows;
    const int64_t last = first + block.tile_rows(tile) - 1;
    if (first / a_.T != last / a_.T) return key_range(a_, block.b, 0, a_.T);
    return key_range(a_, block.b, first % a_.T, last % a_.T + 1);
  }

  // scores = scale * Q K^T, panel by panel of keys.
  void compute_scores(const Block& block, const Panels& panels, const TileGroup& tiles,
                      float* scores) const {
    const int64_t steps = PackedLayout<Element>::steps(a_.D);
    const float scale = a_.scale;
    const int64_t begin = tiles.keys.begin / kPanel * kPanel;
    for (int64_t panel = begin; panel < tiles.keys.end; panel += kPanel) {
      const Rhs<Element> keys{
          panels.keys + PackedLayout<Element>::column_panel(panel - panels.origin, a_.D), kPanel};
      for (int64_t i = tiles.first; i < tiles.last; ++i) {
        const KeyRange& span = tiles.of(i);
        if (panel >= span.end || panel + kPanel <= span.begin) continue;
        const Lhs<Element> queries{block.queries + i * kTileRows * query_stride(), query_stride(),
                                   1};
        float* to = scores + tiles.offset(i, panel);
        const int64_t width = min(kPanel, span.end - panel);
        tile_of(block.tile_rows(i), width / kLanes, queries, keys, steps,
                [&](int row, int v, F32 product) {
                  store(to + row * kScoreStride + v * kLanes, product * scale);
                });
      }
    }
  }

  template <bool kStats>
  void softmax_block(Block& block, const TileGroup& tiles, float* scores) const {
    for (int64_t i = tiles.first; i < tiles.last; ++i) {
      const KeyRange& span = tiles.of(i);
      if (span.empty()) continue;
      for (int64_t j = 0; j < block.tile_rows(i); ++j) {
        const int64_t row = i * kTileRows + j;
        const Query q = query_of(block, row);
        float* z = scores + tiles.offset(i, span.begin) + j * kScoreStride;
        apply_score_mods(a_, q, span.begin, span.end, z);
        block.factors[row - tiles.first * kTileRows] =
            online_softmax<kStats, Element>(a_, q, span.begin, span.end, z, block.sums[row]);
      }
    }
  }

  // acc = factor * acc + P V, panel by panel of features.
  void accumulate_pv(const Block& block, const Panels& panels, const TileGroup& tiles,
                     const float* scores) const {
    constexpr int kElementsPerStep = PackedLayout<Element>::kElementsPerStep;
    for (int64_t e = 0; e < a_.E; e += kPanel) {
      const int64_t width = PackedLayout<Element>::panel_width(e, a_.E);
      const Element* panel = panels.values + PackedLayout<Element>::row_panel(e, panels.tokens);
      for (int64_t i = tiles.first; i < tiles.last; ++i) {
        const KeyRange& span = tiles.of(i);
        if (span.empty()) continue;
        const float* weights = scores + tiles.offset(i, span.begin);
        const Lhs<Element> left{reinterpret_cast<const Element*>(weights), kScoreStride, 1};
        const Rhs<Element> values{panel + (span.begin - panels.origin) / kElementsPerStep * width,
                                  width};
        float* to = block.acc + i * kTileRows * output_stride() + e;
        const float* factors = block.factors + (i - tiles.first) * kTileRows;
        tile_of(block.tile_rows(i), width / kLanes, left, values,
                (span.end - span.begin) / kElementsPerStep, [&](int row, int v, F32 product) {
                  float* at = to + row * output_stride() + v * kLanes;
                  store(at, load(at) * factors[row] + product);
                });
      }
    }
  }
};

}  // namespace polyhead::POLYHEAD_ISA
