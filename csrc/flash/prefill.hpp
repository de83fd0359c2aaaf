// Flash attention for many queries: K and V are packed once per KV head, and the threads share the
// blocks of queries, each of which iterates over all keys.
#pragma once

#include "flash/flash_block.hpp"
#include "flash/progress.hpp"

namespace polyhead::POLYHEAD_ISA {

// Of the packed heads of a wave; malloc would return more to the system after each call.
constexpr int64_t kPackedBytes = 1 << 24;

template <class Element>
class Prefill : FlashBlock<Element> {
  using Base = FlashBlock<Element>;
  using typename Base::Block;
  using Base::a_, Base::out_, Base::packed_gqa_heads_, Base::rows_;
  using Base::query_stride, Base::output_stride, Base::runs_per_kv_head;

 public:
  Prefill(const AttentionParams& a, const ForwardOutput& out)
      : Base(a, out),
        block_rows_(block_rows_of()),
        query_blocks_((rows_ + block_rows_ - 1) / block_rows_) {}

  void run() {
    const int64_t heads = a_.B * a_.G;
    const int64_t tasks_per_head = runs_per_kv_head() * query_blocks_;
    const int64_t key_blocks = (a_.S + kKeyBlock - 1) / kKeyBlock;
    keys_size_ = PackedLayout<Element>::columns_size(a_.S, a_.D);
    values_size_ = PackedLayout<Element>::rows_size(a_.S, a_.E);
    const int64_t wave = heads_per_wave(tasks_per_head);
    Buffer<Element> packed(wave * (keys_size_ + values_size_));
    Buffer<KeyRange> needed(a_.B);
    Progress packed_blocks(wave), attended_tasks(wave);
    Buffer<float> scratch(a_.threads * worker_size());
    for (int64_t b = 0; b < a_.B; ++b) needed.data()[b] = key_range(a_, b, 0, a_.T);
    needed_ = needed.data();
    keys_ = packed.data();
    values_ = keys_ + wave * keys_size_;
#pragma omp parallel num_threads(a_.threads)
    {
      float* worker = scratch.data() + thread_number() * worker_size();
      int64_t finished = 0;  // waves
      for (int64_t start = 0; start < heads; start += wave, ++finished) {
        const int64_t count = min(wave, heads - start);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count * key_blocks; ++i) {
          const int64_t slot = i / key_blocks;
          attended_tasks.wait(slot, finished * tasks_per_head);
          pack_block(start, slot, i % key_blocks * kKeyBlock);
          packed_blocks.add(slot);
        }
        // Causal masks: the longest blocks first, so that no thread ends with one.
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count * tasks_per_head; ++i) {
          const int64_t slot = i / tasks_per_head, in_head = i % tasks_per_head;
          const int64_t block = query_blocks_ - 1 - in_head / runs_per_kv_head();
          packed_blocks.wait(slot, (finished + 1) * key_blocks);
          attend_all(worker, start, slot, in_head % runs_per_kv_head(), block * block_rows_);
          attended_tasks.add(slot);
        }
      }
    }
  }

 private:
  // Smaller blocks if there would be fewer than threads.
  int64_t block_rows_of() const {
    const int64_t runs = max(1, a_.B * a_.G * runs_per_kv_head());
    const int64_t blocks_per_run = (a_.threads + runs - 1) / runs;
    const int64_t rows = (rows_ + blocks_per_run - 1) / blocks_per_run;
    return min(kQueryBlock, round_up(rows, kTileRows));
  }

  // KV heads packed at a time: enough to keep the threads busy, while their panels stay in cache.
  int64_t heads_per_wave(int64_t tasks_per_head) const {
    const int64_t bytes = (keys_size_ + values_size_) * static_cast<int64_t>(sizeof(Element));
    const int64_t busy = (16 * a_.threads + tasks_per_head - 1) / tasks_per_head;
    const int64_t heads = max(a_.threads, min(busy, kPackedBytes / max(1, bytes)));
    return min(a_.B * a_.G, heads);
  }

  // Scratch per thread: packed queries, scores of a group of tiles, accumulators. (Adjacent,
  // queries and accumulators would mostly be a multiple of a page apart, and share cache sets.)
  int64_t worker_size() const {
    return kQueryBlock * (query_stride() + output_stride()) + Base::kScores;
  }

  void pack_block(int64_t start, int64_t slot, int64_t begin) const {
    const int64_t b = (start + slot) / a_.G;
    const int64_t g = (start + slot) % a_.G;
    // Keys that no query attends to are not read: those beyond a row's length may be NaN.
    const int64_t end = min(begin + kKeyBlock, needed_[b].end);
    if (end <= begin || begin + kKeyBlock <= needed_[b].begin) return;
    pack_keys(a_.key, b, g, begin, end, a_.D,
              keys_ + slot * keys_size_ + PackedLayout<Element>::column_panel(begin, a_.D));
    pack_values(a_.value, b, g, begin, end, begin, a_.S, a_.E, values_ + slot * values_size_);
  }

  // One block of queries against all its keys.
  void attend_all(float* worker, int64_t start, int64_t slot, int64_t run,
                  int64_t start_of_block) const {
    SoftmaxState sums[kQueryBlock];
    Block block;
    block.b = (start + slot) / a_.G;
    block.h = (start + slot) % a_.G * a_.group() + run * packed_gqa_heads_;
    block.start = start_of_block;
    block.rows = min(block_rows_, rows_ - start_of_block);
    block.sums = sums;
    block.queries = reinterpret_cast<Element*>(worker);
    float* scores = worker + kQueryBlock * query_stride();
    block.acc = scores + Base::kScores;
    this->begin(block);
    for (int64_t s = block.keys.begin / kKeyBlock * kKeyBlock; s < block.keys.end; s += kKeyBlock)
      this->attend(block, {keys_ + slot * keys_size_, values_ + slot * values_size_, 0, a_.S}, s,
                   scores);
    for (int64_t row = 0; row < block.rows; ++row)
      write_row(a_, out_, this->query_of(block, row), sums[row], block.acc + row * output_stride());
  }

  int64_t block_rows_, query_blocks_;
  int64_t keys_size_ = 0, values_size_ = 0;
  const KeyRange* needed_ = nullptr;  // the key range of each batch row
  Element* keys_ = nullptr;
  Element* values_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
