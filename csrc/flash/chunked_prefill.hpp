// Flash attention for a chunk of queries after a long past: split-KV over the threads. Each block
// of K and V is packed by its thread into L2, used at once for all queries of the group, and not
// stored.
#pragma once

#include "flash/flash_block.hpp"
#include "flash/progress.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kChunkMaxRows = 512;        // queries of a group whose accumulators stay in L2
constexpr int64_t kChunkMinKeys = 2048;       // fewer, packed, stay in the cache anyway
constexpr int64_t kChunkMinKeysPerQuery = 4;  // with fewer, packing once per KV head pays off
constexpr int64_t kMinSplitBlocks = 4;        // smaller splits cost more in the reduction

// Splits of the keys of each KV head, for at least one task per thread.
inline int64_t chunked_prefill_splits(const AttentionParams& a) {
  const int64_t heads = max(1, a.B * a.G);
  const int64_t wanted = a.threads == 1 ? 1 : (4 * a.threads + heads - 1) / heads;
  return max(1, min(wanted, a.S / (kMinSplitBlocks * kKeyBlock)));
}

inline bool use_chunked_prefill(const AttentionParams& a) {
  return a.group() * a.T <= kChunkMaxRows && a.S >= kChunkMinKeys &&
         a.S >= kChunkMinKeysPerQuery * a.T && a.B * a.G * chunked_prefill_splits(a) >= a.threads;
}

template <class Element>
class ChunkedPrefill : FlashBlock<Element> {
  using Base = FlashBlock<Element>;
  using typename Base::Block;
  using Base::a_, Base::out_, Base::packed_gqa_heads_, Base::rows_;
  using Base::query_stride, Base::output_stride, Base::runs_per_kv_head;

 public:
  ChunkedPrefill(const AttentionParams& a, const ForwardOutput& out)
      : Base(a, out),
        splits_(chunked_prefill_splits(a)),
        group_rows_(a.group() * a.T),
        blocks_per_run_((rows_ + kQueryBlock - 1) / kQueryBlock) {}

  void run() {
    const int64_t parts = a_.B * a_.G * splits_;
    const int64_t blocks_per_head = runs_per_kv_head() * blocks_per_run_;
    Buffer<float> partial(parts * group_rows_ * output_stride());
    Buffer<SoftmaxState> sums(parts * group_rows_);
    Buffer<float> scratch(a_.threads * worker_size());
    Buffer<Block> blocks(a_.threads * blocks_per_head);
    Progress finished_splits(a_.B * a_.G);
    acc_ = partial.data();
    sums_ = sums.data();
#pragma omp parallel num_threads(a_.threads)
    {
      float* worker = scratch.data() + thread_number() * worker_size();
      Block* mine = blocks.data() + thread_number() * blocks_per_head;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t part = 0; part < parts; ++part) {
        attend_part(worker, mine, part);
        const int64_t head = part / splits_;
        if (finished_splits.add(head) == splits_)
          combine_splits(a_, out_, head, splits_, sums_, acc_, output_stride());
      }
    }
  }

 private:
  int64_t keys_size() const { return PackedLayout<Element>::columns_size(kKeyBlock, a_.D); }
  int64_t values_size() const { return PackedLayout<Element>::rows_size(kKeyBlock, a_.E); }

  // Scratch per thread: packed queries of a group, scores, and a packed block of keys and values.
  int64_t worker_size() const {
    return round_up(group_rows_ * query_stride() + Base::kScores + keys_size() + values_size(), 16);
  }

  // All queries of a group against one split of their keys.
  void attend_part(float* worker, Block* blocks, int64_t part) const {
    const int64_t head = part / splits_, b = head / a_.G, g = head % a_.G;
    float* scores = worker + group_rows_ * query_stride();
    auto* keys = reinterpret_cast<Element*>(scores + Base::kScores);
    Element* values = keys + keys_size();
    int64_t count = 0;
    for (int64_t run = 0; run < runs_per_kv_head(); ++run)
      for (int64_t start = 0; start < rows_; start += kQueryBlock) {
        const int64_t row = run * rows_ + start;
        Block& block = blocks[count++];
        block.b = b;
        block.h = g * a_.group() + run * packed_gqa_heads_;
        block.start = start;
        block.rows = min(kQueryBlock, rows_ - start);
        block.queries = reinterpret_cast<Element*>(worker) + row * query_stride();
        block.sums = sums_ + part * group_rows_ + row;
        block.acc = acc_ + (part * group_rows_ + row) * output_stride();
        this->begin(block);
      }
    const KeyRange span =
        split_range(key_range(a_, b, 0, a_.T), kKeyBlock, part % splits_, splits_);
    for (int64_t s = span.begin / kKeyBlock * kKeyBlock; s < span.end; s += kKeyBlock) {
      const int64_t end = min(s + kKeyBlock, span.end);
      pack_keys(a_.key, b, g, s, end, a_.D, keys);
      pack_values(a_.value, b, g, s, end, 0, kKeyBlock, a_.E, values);
      for (int64_t i = 0; i < count; ++i)
        this->attend(blocks[i], {keys, values, s, kKeyBlock}, s, scores);
    }
  }

  int64_t splits_, group_rows_, blocks_per_run_;
  float* acc_ = nullptr;
  SoftmaxState* sums_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
