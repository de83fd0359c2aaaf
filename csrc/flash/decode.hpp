// Flash-decoding: GQA-packed queries; K and V are streamed once, unpacked and in place, for all
// query heads of a group; split-KV across the threads, partial results combined by LSE.
#pragma once

#include "flash/flash_block.hpp"
#include "flash/progress.hpp"
#include "tiles/gemv.hpp"

namespace polyhead::POLYHEAD_ISA {

// Beyond these packing K and V pays off.
constexpr int64_t kDecodeMaxTokens = 16;       // queries
constexpr int64_t kDecodeMaxRows = 32;         // queries of a group
constexpr int64_t kDecodeMinKeysPerQuery = 4;  // if there are several queries

constexpr int64_t kMaxBlockKeys = 64;
constexpr int64_t kMinPagedBlockKeys = 32;  // with fewer, fetching accumulators from L2 dominates
constexpr int64_t kBandwidthBoundRows = 8;  // with more, arithmetic is the limit
constexpr int64_t kMinSplitKeys = 256;      // smaller splits cost more in the reduction
constexpr int64_t kStateBytes = 1 << 18;    // per task: queries and accumulators stay in L2

inline bool is_decoding(const AttentionParams& a) {
  const bool has_keys = a.T == 1 || a.S >= kDecodeMinKeysPerQuery * a.T;
  return a.T <= kDecodeMaxTokens && a.group() * a.T <= kDecodeMaxRows && has_keys && !a.needs_grad;
}

template <class Element>
class Decode {
  static constexpr bool kHasScales = std::is_same_v<Element, Int8>;

 public:
  Decode(const AttentionParams& a, const ForwardOutput& out)
      : a_(a),
        out_(out),
        rows_(a.group() * a.T),
        block_keys_(block_keys_of(a)),
        heads_(heads_of_task()),
        splits_(splits_of_heads()) {}

  void run() {
    const int64_t parts = a_.B * a_.G * splits_;
    Buffer<float> partial(parts * rows_ * output_stride());
    Buffer<SoftmaxState> sums(parts * rows_);
    Buffer<float> scratch(a_.threads * worker_size());
    Progress finished_splits(a_.B * a_.G / heads_);
    acc_ = partial.data();
    sums_ = sums.data();
#pragma omp parallel num_threads(a_.threads)
    {
      float* mine = scratch.data() + thread_number() * worker_size();
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < parts / heads_; ++task) {
        attend(mine, task);
        // The thread that ends the last split combines them.
        const int64_t heads = task / splits_;
        if (finished_splits.add(heads) < splits_) continue;
        for (int64_t head = heads * heads_; head < (heads + 1) * heads_; ++head)
          combine_splits(a_, out_, head, splits_, sums_, acc_, output_stride());
      }
    }
  }

 private:
  // Rows of a block of keys or values, and the scales of int8 ones; 0 for padding.
  struct Rows {
    const Element* row[kMaxBlockKeys];
    float scale[kHasScales ? kMaxBlockKeys : 1];
  };
  // Keys [begin, end) of one KV head.
  struct Block {
    int64_t head, begin, end;
    Rows keys, values;
    int64_t count() const { return end - begin; }
  };

  int64_t query_stride() const { return round_up(a_.D, kRowStep<Element>); }
  int64_t output_stride() const { return round_up(a_.E, kRowStep<Element>); }
  int64_t worker_size() const {
    return round_up(rows_ * (heads_ * query_stride() + block_keys_), 16);
  }

  // Small blocks read as one stream does, large ones cost less arithmetic (see kBlockBytes).
  static int64_t block_keys_of(const AttentionParams& a) {
    if (a.group() * a.T > kBandwidthBoundRows) return kMaxBlockKeys;
    const int64_t row = max(a.D, a.E) * static_cast<int64_t>(sizeof(Element));
    int64_t keys = max(kLanes, kBlockBytes / row / kLanes * kLanes);
    if (a.key.block_table != nullptr)
      keys = max(max(keys, kMinPagedBlockKeys), round_up(a.key.block_size, kLanes));
    return min(kMaxBlockKeys, keys);
  }

  // KV heads per task. In a block of a paged cache heads are adjacent: all of them together read
  // memory in order, a single one in leaps too short for the hardware prefetcher.
  int64_t heads_of_task() const {
    if (a_.key.block_table == nullptr || a_.key.block_size > block_keys_) return 1;
    const int64_t bytes = rows_ * (query_stride() + output_stride()) * 4;
    int64_t heads = max(1, min(a_.G, kStateBytes / bytes));
    while (a_.G % heads != 0) --heads;
    return heads;
  }

  // Splits of the keys of each KV head: several tasks per thread balance the load.
  int64_t splits_of_heads() const {
    if (a_.threads == 1) return 1;
    const int64_t tasks = a_.B * a_.G / heads_;
    const int64_t wanted = (8 * a_.threads + tasks - 1) / tasks;
    return max(1, min(wanted, a_.S / kMinSplitKeys));
  }

  // Calls `with(row, query)` for the GQA-packed queries of a group: head by head, token by token.
  template <class Function>
  void each_query(int64_t head, Function&& with) const {
    const int64_t first = head % a_.G * a_.group();
    int64_t row = 0;
    for (int64_t h = first; h < first + a_.group(); ++h)
      for (int64_t t = 0; t < a_.T; ++t) with(row++, Query(a_, head / a_.G, h, t));
  }

  void attend(float* scratch, int64_t task) const {
    const int64_t first = task / splits_ * heads_, split = task % splits_;
    auto* queries = reinterpret_cast<LhsElement<Element>*>(scratch);
    float* scores = scratch + heads_ * rows_ * query_stride();
    for (int64_t i = 0; i < heads_; ++i) {
      const int64_t part = (first + i) * splits_ + split;
      load_queries(first + i, queries + i * rows_ * query_stride());
      for (int64_t row = 0; row < rows_; ++row) sums_[part * rows_ + row] = SoftmaxState{};
      clear(acc_ + part * rows_ * output_stride(), rows_ * output_stride());
    }
    const KeyRange keys =
        split_range(key_range(a_, first / a_.G, 0, a_.T), block_keys_, split, splits_);
    Block blocks[2];
    if (!keys.empty()) locate(first, keys.begin, keys.end, blocks[0]);
    int64_t i = 0, s = keys.begin;
    for (int now = 0; s < keys.end; now = 1 - now) {
      const Block& block = blocks[now];
      Block& next = blocks[1 - now];
      const int64_t part = block.head * splits_ + split;
      const LhsElement<Element>* own = queries + i * rows_ * query_stride();
      if (++i == heads_) i = 0, s += block_keys_;
      Prefetcher<Element> ahead;
      if (s < keys.end) {
        locate(first + i, s, keys.end, next);
        ahead = {next.keys.row, next.values.row, next.count(), longer_row()};
      }
      attend_block(block, part, own, scores, ahead);
    }
  }

  // The queries of a group against one block of keys, accumulated into one split.
  void attend_block(const Block& block, int64_t part, const LhsElement<Element>* queries,
                    float* scores, Prefetcher<Element>& ahead) const {
    float* acc = acc_ + part * rows_ * output_stride();
    SoftmaxState* sums = sums_ + part * rows_;
    compute_scores(block, queries, scores, ahead);
    if (out_.stats != nullptr) {
      softmax_block<true>(block, scores, acc, sums);
    } else {
      softmax_block<false>(block, scores, acc, sums);
    }
    accumulate_pv(block, scores, acc, ahead);
  }

  void load_queries(int64_t head, LhsElement<Element>* queries) const {
    each_query(head, [&](int64_t row, const Query& q) {
      LhsElement<Element>* to = queries + row * query_stride();
      if constexpr (kUsesBF16Dot<Element>) {
        clear(to, query_stride());
        std::memcpy(to, row_of<BFloat16>(a_.query, q.b, q.h, q.t),
                    static_cast<size_t>(a_.D) * sizeof *to);
      } else if constexpr (kDeinterleaves<Element>) {
        const auto* from = row_of<BFloat16>(a_.query, q.b, q.h, q.t);
        for (int64_t d = 0; d < a_.D; d += kRowStep<Element>) {
          const U32 pairs = a_.D - d < kRowStep<Element> ? load_partial<U32>(from + d, a_.D - d)
                                                         : load_as<U32>(from + d);
          store(to + d, even_of(pairs));
          store(to + d + kLanes, odd_of(pairs));
        }
      } else {
        widen_rows(a_.query, q.b, q.h, q.t, q.t + 1, a_.D, to, 0);
      }
    });
  }

  // Sets the block of keys of a KV head that starts at `begin`.
  void locate(int64_t head, int64_t begin, int64_t end, Block& block) const {
    block.head = head;
    block.begin = begin;
    block.end = min(begin + block_keys_, end);
    locate(a_.key, block, block.keys);
    locate(a_.value, block, block.values);
  }

  // The rows of the tokens of a block, padded with rows of zeros: a repeated last row, times a
  // weight of 0, would be NaN if it is infinite.
  void locate(const TensorView& view, const Block& block, Rows& rows) const {
    int64_t i = 0;
    while (i < block.count()) {
      // A run of tokens at a constant stride.
      const TokenAddress place(view, block.head / a_.G, block.begin + i);
      int64_t run = block.count() - i;
      if (view.block_table != nullptr) run = min(run, view.block_size - place.second);
      const Element* row = place.row<Element>(view, block.head % a_.G);
      const float* scale = kHasScales ? place.scale(view, block.head % a_.G) : nullptr;
      for (; run > 0; --run, ++i, row += view.stride[2]) {
        rows.row[i] = row;
        if constexpr (kHasScales) rows.scale[i] = *scale, scale += view.scale_stride[2];
      }
    }
    alignas(64) static constexpr Element kZeros[kMaxHeadSize] = {};
    for (; i < block_keys_; ++i) {
      rows.row[i] = kZeros;
      if constexpr (kHasScales) rows.scale[i] = 0.0F;
    }
  }

  int64_t longer_row() const { return max(a_.D, a_.E) * static_cast<int64_t>(sizeof(Element)); }

  // scores = Q K^T for a block of keys, a few keys at a time.
  void compute_scores(const Block& block, const LhsElement<Element>* queries, float* scores,
                      Prefetcher<Element>& ahead) const {
    for (int64_t s = 0; s < block.count(); s += kLanes) {
      const auto some = [&]<int Rows>(int64_t row) {
        constexpr int kKeys = min(kMaxAccumulators / sums_for(Rows), kLanes);
#pragma GCC unroll 1
        for (int64_t k = s; k < s + kLanes; k += kKeys)
          qk_dot<Rows, kKeys>(queries + row * query_stride(), query_stride(), block.keys.row + k,
                              a_.D, row == 0 ? &ahead : nullptr, scores + row * block_keys_ + k,
                              block_keys_);
      };
      int64_t row = 0;
      for (; row + 4 <= rows_; row += 4) some.template operator()<4>(row);
      switch (rows_ - row) {
        case 1: some.template operator()<1>(row); break;
        case 2: some.template operator()<2>(row); break;
        case 3: some.template operator()<3>(row); break;
        default: break;
      }
    }
  }

  template <bool kStats>
  void softmax_block(const Block& block, float* scores, float* acc, SoftmaxState* sums) const {
    using Operand = std::conditional_t<kUsesBF16Dot<Element>, BF16Pair, float>;
    const int64_t begin = block.begin, padded_end = begin + round_up(block.count(), kLanes);
    each_query(block.head, [&](int64_t row, const Query& q) {
      float* z = scores + row * block_keys_;
      for (int64_t i = 0; i < padded_end - begin; i += kLanes) {
        F32 scale = splat(a_.scale);
        if constexpr (kHasScales) scale *= load(block.keys.scale + i);
        store(z + i, load(z + i) * scale);
      }
      apply_score_mods(a_, q, begin, padded_end, z);
      const float factor = online_softmax<kStats, Operand>(a_, q, begin, padded_end, z, sums[row]);
      if constexpr (kHasScales) {
        for (int64_t i = 0; i < padded_end - begin; i += kLanes)
          store(z + i, load(z + i) * load(block.values.scale + i));
      }
      if (factor == 1.0F) return;
      float* to = acc + row * output_stride();
      for (int64_t e = 0; e < a_.E; e += kLanes) store(to + e, load(to + e) * factor);
    });
  }

  // Vectors of a tile of `rows`: eight independent accumulators hide the latency of two FMA units.
  // (With AVX-512 the tile itself is wide enough.)
  static constexpr int vectors_for(int rows) {
    return kTileVectors == 2 && rows <= 2 ? 8 / rows : kTileVectors;
  }

  // acc += P V, tile by tile of rows and columns.
  void accumulate_pv(const Block& block, const float* weights, float* acc,
                     Prefetcher<Element>& ahead) const {
    constexpr int kNarrow = kRowStep<Element> / kLanes;
    const int64_t even = round_up(block.count(), 2);
    for (int64_t row = 0; row < rows_; row += kTileRows) {
      const auto columns = [&]<int Rows, int Vectors, bool Whole>(int64_t e) {
        pv_accumulate<Rows, Vectors, Whole>(
            weights + row * block_keys_, block_keys_, block.values.row, even, e, a_.E,
            row == 0 ? &ahead : nullptr, acc + row * output_stride() + e, output_stride());
      };
      const auto tiles = [&]<int Rows>() {
        constexpr int kWide = vectors_for(Rows);
        int64_t e = 0;
        for (; e + kWide * kLanes <= a_.E; e += kWide * kLanes)
          columns.template operator()<Rows, kWide, true>(e);
        for (; kWide > kTileVectors && e + kPanel <= a_.E; e += kPanel)
          columns.template operator()<Rows, kTileVectors, true>(e);
        for (; e + kNarrow * kLanes <= a_.E; e += kNarrow * kLanes)
          columns.template operator()<Rows, kNarrow, true>(e);
        if (e < a_.E) columns.template operator()<Rows, kNarrow, false>(e);
      };
      switch (min(kTileRows, rows_ - row)) {
        case 1: tiles.template operator()<1>(); break;
        case 2: tiles.template operator()<2>(); break;
        case 3: tiles.template operator()<3>(); break;
        case 4: tiles.template operator()<4>(); break;
        case 5: tiles.template operator()<5>(); break;
        default: tiles.template operator()<6>(); break;
      }
    }
  }

  const AttentionParams& a_;
  const ForwardOutput& out_;
  int64_t rows_, block_keys_, heads_, splits_;
  float* acc_ = nullptr;
  SoftmaxState* sums_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
