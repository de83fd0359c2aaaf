// Blocks of queries on their way through blocks of packed keys and values: the scores of a block
// never leave the cache. Where the keys come from and which blocks meet is others' to say.
#pragma once

#include "flash/softmax.hpp"
#include "simd/buffer.hpp"
#include "tiles/pack.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kQueryBlock = 96;  // 16 tiles: as often are keys read that came from L2
#if defined(__AVX512F__)
constexpr int64_t kKeyBlock = 512;  // a tile's scores, 12 KB, stay in L1; the keys in L2
constexpr int64_t kTileGroup = 1;
#else
constexpr int64_t kKeyBlock = 256;  // a panel of values, 16 KB, stays in L1,
constexpr int64_t kTileGroup = 4;   // and so does one of keys, for as many tiles
#endif
constexpr int64_t kPackGqaMaxTokens =
    16;  // so few of each head are worth taking a group's together
constexpr int64_t kScoreStride = kKeyBlock + 16;  // not a power of 2: rows fall in different sets
constexpr int64_t kRowTiles = kQueryBlock / kTileRows;
constexpr int64_t kRowsTogether = kTileGroup * kTileRows;

// Keys [begin, end).
struct KeyRange {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The keys that any of queries [begin, end) of a batch row may attend to.
inline KeyRange key_range(const AttentionParams& a, int64_t b, int64_t begin, int64_t end) {
  KeyRange span{a.S, 0};
  for (int64_t t = begin; t < end; ++t) {
    const Query q(a, b, 0, t);
    if (q.first >= q.last) continue;
    span.begin = min(span.begin, q.first);
    span.end = max(span.end, q.last);
  }
  return span;
}

// One of so many parts of the keys, cut between blocks.
inline KeyRange split_range(KeyRange keys, int64_t block, int64_t part, int64_t parts) {
  if (keys.empty()) return {0, 0};
  const int64_t begin = keys.begin / block * block;
  const int64_t blocks = (keys.end - begin + block - 1) / block;
  return {begin + blocks * part / parts * block,
          min(keys.end, begin + blocks * (part + 1) / parts * block)};
}

inline void write_output(const TensorView& query, void* output, int64_t at, const float* from,
                         int64_t size, float factor) {
  dispatch_dtype(query.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(output) + at;
    for (int64_t e = 0; e < size; e += kLanes) store_n(to + e, load(from + e) * factor, size - e);
  });
}

// Writes what one query gives; `acc` is the sum of exp(score - row_max) * value.
inline void write_row(const AttentionParams& a, const ForwardOutput& out, const Query& q,
                      const SoftmaxState& row, const float* acc) {
  const int64_t rows = a.B * a.H * a.T, at = (q.b * a.H + q.h) * a.T + q.t;
  const RowResult result = finalize_row(a, q.h, row);
  // Written as zeros, not as a product: an empty row's buffer may hold anything.
  alignas(64) static constexpr float kZeros[kMaxHeadSize] = {};
  const bool is_empty = row.row_max == -kInfinity;
  write_output(a.query, out.output, at * a.E, is_empty ? kZeros : acc, a.E, result.factor);
  if (out.lse == nullptr) return;
  out.lse[at] = result.lse;
  out.softmax_state[at] = row.row_max;
  out.softmax_state[rows + at] = row.sum;
  out.softmax_state[2 * rows + at] = result.inverse;
  if (out.stats != nullptr) write_stats(a, q.h, row, out.stats + at, a.B * a.H * a.T);
}

// Brings what parts of the keys gave each query to their common largest score, adds it up and
// writes the query's row. Sums lie by head, part and row of a group; `acc` has `stride`
// numbers for each. The threads of a parallel region share the rows.
inline void combine_splits(const AttentionParams& a, const ForwardOutput& out, int64_t parts,
                           const SoftmaxState* sums, float* acc, int64_t stride) {
  const int64_t rows = a.group() * a.T;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < a.B * a.G * rows; ++i) {
    const int64_t head = i / rows, row = i % rows, first = head * parts * rows + row;
    SoftmaxState total = sums[first];
    float* to = acc + first * stride;
    for (int64_t part = 1; part < parts; ++part) {
      SoftmaxState more = sums[first + part * rows];
      const float* from = to + part * rows * stride;
      if (more.row_max == -kInfinity) continue;
      const float row_max = total.row_max > more.row_max ? total.row_max : more.row_max;
      const float old_factor = total.rescale_to(row_max);
      const float factor = more.rescale_to(row_max);
      for (int64_t e = 0; e < a.E; e += kLanes)
        store(to + e, load(to + e) * old_factor + load(from + e) * factor);
      total.add(more);
    }
    const Query q(a, head / a.G, head % a.G * a.group() + row / a.T, row % a.T);
    write_row(a, out, q, total, to);
  }
}

template <class Element>
class FlashBlock {
 protected:
  FlashBlock(const AttentionParams& a, const ForwardOutput& out)
      : a_(a),
        out_(out),
        packed_gqa_heads_(a.T <= kPackGqaMaxTokens ? a.group() : 1),
        rows_(packed_gqa_heads_ * a.T) {}

  // Queries of one key head that are cut into blocks together: of one head, or of its whole group,
  // head by head, where one head's alone would not fill a tile.
  int64_t runs_per_kv_head() const { return a_.group() / packed_gqa_heads_; }

  int64_t query_stride() const { return round_up(a_.D, kLanes); }
  int64_t output_stride() const { return round_up(a_.E, kLanes); }
  static constexpr int64_t kScores = kRowsTogether * kScoreStride;

  // PackedLayout keys and values from token `origin` on, of at most so many tokens.
  struct Panels {
    const Element* keys;
    const Element* values;
    int64_t origin, tokens;
  };

  // A block of a run of queries.
  struct Block {
    int64_t b, h;         // the first head of the run
    int64_t start, rows;  // where in the run it begins
    Element* queries;
    SoftmaxState* sums;
    float* acc;                 // of each row, the sum of exp(score - row_max) * value
    KeyRange keys;              // those that any of them may attend to
    KeyRange tiles[kRowTiles];  // and those of each tile of rows
    float factors[kRowsTogether];

    int64_t tile_count() const { return (rows + kTileRows - 1) / kTileRows; }
    int64_t tile_rows(int64_t tile) const { return min(kTileRows, rows - tile * kTileRows); }
    // Of one tile's keys those in a block of keys, in whole vectors.
    KeyRange within(int64_t tile, int64_t block) const {
      return {max(tiles[tile].begin / kLanes * kLanes, block),
              min(round_up(tiles[tile].end, kLanes), block + kKeyBlock)};
    }
  };

  // Reads the queries of a block whose place is known, and clears its sums.
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

  // Adds what the block of keys at `s` gives to a block of queries.
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
  // Tiles [first, last) of a block of queries, and of a block of keys those that each takes.
  struct TileGroup {
    int64_t first, last;
    KeyRange keys;  // of any of them
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
    // Where the scores of a tile's first row and of key `s` are.
    int64_t place(int64_t tile, int64_t s) const {
      return (tile - first) * kTileRows * kScoreStride + s % kKeyBlock;
    }
  };

  // The keys that a tile's queries may attend to; those of one head, or of several.
  KeyRange keys_of_tile(const Block& block, int64_t tile) const {
    const int64_t first = block.start + tile * kTileRows;
    const int64_t last = first + block.tile_rows(tile) - 1;
    if (first / a_.T != last / a_.T) return key_range(a_, block.b, 0, a_.T);
    return key_range(a_, block.b, first % a_.T, last % a_.T + 1);
  }

  // scale * query @ key^T, a panel of keys after the other.
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
        float* to = scores + tiles.place(i, panel);
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
        float* z = scores + tiles.place(i, span.begin) + j * kScoreStride;
        apply_score_mods(a_, q, span.begin, span.end, z);
        block.factors[row - tiles.first * kTileRows] =
            online_softmax<kStats, Element>(a_, q, span.begin, span.end, z, block.sums[row]);
      }
    }
  }

  // acc = factor * acc + weights @ value.
  void accumulate_pv(const Block& block, const Panels& panels, const TileGroup& tiles,
                     const float* scores) const {
    constexpr int kElementsPerStep = PackedLayout<Element>::kElementsPerStep;
    for (int64_t e = 0; e < a_.E; e += kPanel) {
      const int64_t width = PackedLayout<Element>::panel_width(e, a_.E);
      const Element* panel = panels.values + PackedLayout<Element>::row_panel(e, panels.tokens);
      for (int64_t i = tiles.first; i < tiles.last; ++i) {
        const KeyRange& span = tiles.of(i);
        if (span.empty()) continue;
        const float* weights = scores + tiles.place(i, span.begin);
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
