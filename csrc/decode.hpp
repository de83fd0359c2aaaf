// Forward for few queries: every key and value is read once, straight from memory, for all query
// heads of its group; threads share the keys of a head, and their parts are merged by lse.
#pragma once

#include "prefill.hpp"

namespace polyhead::POLYHEAD_ISA {

constexpr int64_t kDecodeTokens = 16;  // more queries are worth packing keys for,
constexpr int64_t kDecodeRows = 32;    // and so are more of a group
constexpr int64_t kDecodeKeys = 64;    // keys whose scores are taken before their values are read

inline bool is_decoding(const Attention& a) {
  return a.T <= kDecodeTokens && a.group() * a.T <= kDecodeRows;
}

// dots[row * stride + key] = scale * query row . key, for Rows queries and Keys keys.
template <int Rows, int Keys, class Element>
[[gnu::always_inline]] inline void dots_of(const float* queries, int64_t query_stride,
                                           const Element* keys, int64_t key_stride, int64_t size,
                                           float scale, float* dots, int64_t stride) {
  F32 sums[Rows * Keys] = {};
  const auto add = [&](int64_t d, auto&& load_key) {
    F32 key[Keys];
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) key[k] = load_key(keys + k * key_stride + d);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      F32 query = load(queries + row * query_stride + d);
      hold(query);
#pragma GCC unroll 8
      for (int k = 0; k < Keys; ++k) sums[row * Keys + k] += query * key[k];
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) add(d, [](const Element* from) { return load(from); });
  if (d < size) add(d, [&](const Element* from) { return load_first(from, size - d); });
  float totals[Rows * Keys];
  sum_each(sums, totals);
#pragma GCC unroll 8
  for (int i = 0; i < Rows * Keys; ++i) dots[i / Keys * stride + i % Keys] = scale * totals[i];
}

// Asks for `count` tokens' rows ahead of their use: read in tiles, they are no stream that the
// processor would recognise.
template <class Element>
inline void prefetch_rows(const Element* rows, int64_t stride, int64_t count, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t token = 0; token < count; ++token)
    for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(rows + token * stride + i);
}

template <class Element>
class Decode {
 public:
  Decode(const Attention& a, const Output& out)
      : a_(a), out_(out), rows_(a.group() * a.T), splits_(splits_of(a)) {}

  void run() {
    const int64_t tasks = a_.B * a_.G * splits_;
    Buffer<float> partial(tasks * rows_ * output_stride());
    Buffer<RowSums> sums(tasks * rows_);
    Buffer<float> scratch(a_.threads * worker_size());
    weighted_ = partial.data();
    sums_ = sums.data();
#pragma omp parallel num_threads(a_.threads)
    {
      float* mine = scratch.data() + thread_number() * worker_size();
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) attend(mine, task);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < a_.B * a_.G * rows_; ++row) merge(row / rows_, row % rows_);
    }
  }

 private:
  int64_t query_stride() const { return round_up(a_.D, kLanes); }
  int64_t output_stride() const { return round_up(a_.E, kLanes); }
  int64_t worker_size() const { return round_up(rows_ * (query_stride() + kDecodeKeys), 16); }

  // How many parts the keys of a head are cut into: four tasks a thread even out uneven threads.
  static int64_t splits_of(const Attention& a) {
    if (a.threads == 1) return 1;
    const int64_t wanted = (4 * a.threads + a.B * a.G - 1) / (a.B * a.G);
    return greater(1, smaller(wanted, a.S / (2 * kDecodeKeys)));
  }

  // Rows are the queries of a group: head by head, token by token.
  Query query_of(int64_t head, int64_t row) const {
    return {a_, head / a_.G, head % a_.G * a_.group() + row / a_.T, row % a_.T};
  }

  Span keys_of_split(int64_t b, int64_t split) const {
    const Span all_keys = keys_of(a_, b, 0, a_.T);
    if (all_keys.empty()) return {0, 0};
    const int64_t begin = all_keys.begin / kDecodeKeys * kDecodeKeys;
    const int64_t blocks = (all_keys.end - begin + kDecodeKeys - 1) / kDecodeKeys;
    return {begin + blocks * split / splits_ * kDecodeKeys,
            smaller(all_keys.end, begin + blocks * (split + 1) / splits_ * kDecodeKeys)};
  }

  void attend(float* scratch, int64_t task) const {
    const int64_t head = task / splits_;
    const int64_t b = head / a_.G;
    float* queries = scratch;
    float* scores = scratch + rows_ * query_stride();
    float* weighted = weighted_ + task * rows_ * output_stride();
    RowSums* sums = sums_ + task * rows_;
    for (int64_t row = 0; row < rows_; ++row) {
      const Query q = query_of(head, row);
      widen_rows(a_.query, b, q.h, q.t, q.t + 1, a_.D, queries + row * query_stride(), 0);
      sums[row] = {};
    }
    std::memset(weighted, 0, static_cast<size_t>(rows_ * output_stride()) * sizeof(float));
    const Span keys = keys_of_split(b, task % splits_);
    for (int64_t s = keys.begin; s < keys.end; s += kDecodeKeys) {
      const int64_t end = smaller(s + kDecodeKeys, keys.end);
      score_keys(head, s, end, queries, scores);
      if (out_.stats != nullptr) {
        weigh_keys<true>(head, s, end, scores, weighted, sums);
      } else {
        weigh_keys<false>(head, s, end, scores, weighted, sums);
      }
      add_values(head, s, end, scores, weighted);
    }
  }

  void score_keys(int64_t head, int64_t begin, int64_t end, const float* queries,
                  float* scores) const {
    int64_t s = begin;
    const Element* values = row_of<Element>(a_.value, head / a_.G, head % a_.G, begin);
    for (; s + 8 <= end; s += 8) {
      prefetch_rows(values + (s - begin) * a_.value.stride[2], a_.value.stride[2], 8, a_.E);
      score_some<8>(head, s, s - begin, queries, scores);
    }
    for (; s < end; ++s) score_some<1>(head, s, s - begin, queries, scores);
    for (; s < round_up(end, kLanes); ++s)
      for (int64_t row = 0; row < rows_; ++row) scores[row * kDecodeKeys + s - begin] = 0.0F;
  }

  // Keys s .. s + Count - 1 against all rows; eight sums at a time hide the latency of each.
  template <int Count>
  void score_some(int64_t head, int64_t s, int64_t at, const float* queries, float* scores) const {
    const Element* keys = row_of<Element>(a_.key, head / a_.G, head % a_.G, s);
    const int64_t stride = a_.key.stride[2];
    const auto rows = [&]<int Rows, int Keys>(int64_t row) {
      for (int k = 0; k < Count; k += Keys)
        dots_of<Rows, Keys>(queries + row * query_stride(), query_stride(), keys + k * stride,
                            stride, a_.D, a_.scale, scores + row * kDecodeKeys + at + k,
                            kDecodeKeys);
    };
    constexpr int kTwo = Count < 2 ? 1 : 2;
    constexpr int kFour = Count < 4 ? 1 : 4;
    int64_t row = 0;
    for (; row + 4 <= rows_; row += 4) rows.template operator()<4, kTwo>(row);
    for (; row + 2 <= rows_; row += 2) rows.template operator()<2, kFour>(row);
    for (; row < rows_; ++row) rows.template operator()<1, Count>(row);
  }

  template <bool kStats>
  void weigh_keys(int64_t head, int64_t begin, int64_t end, float* scores, float* weighted,
                  RowSums* sums) const {
    for (int64_t row = 0; row < rows_; ++row) {
      const Query q = query_of(head, row);
      float* z = scores + row * kDecodeKeys;
      const int64_t padded_end = begin + round_up(end - begin, kLanes);
      shape_scores(a_, q, begin, padded_end, z);
      const float factor = online_softmax<kStats, float>(a_, q, begin, padded_end, z, sums[row]);
      if (factor == 1.0F) continue;
      float* to = weighted + row * output_stride();
      for (int64_t e = 0; e < a_.E; e += kLanes) store(to + e, load(to + e) * factor);
    }
  }

  // weighted += weights @ value. Fetches the keys of the next block meanwhile, as score_keys
  // fetches the values of this one.
  void add_values(int64_t head, int64_t begin, int64_t end, const float* weights,
                  float* weighted) const {
    const Element* values = row_of<Element>(a_.value, head / a_.G, head % a_.G, begin);
    const int64_t count = end - begin;
    const int64_t to_fetch = greater(0, smaller(kDecodeKeys, a_.S - end));
    int64_t fetched = 0;
    for (int64_t row = 0; row < rows_; row += kTileRows) {
      const int64_t rows = smaller(kTileRows, rows_ - row);
      const LeftOperand<float> left{weights + row * kDecodeKeys, kDecodeKeys, 1};
      float* to = weighted + row * output_stride();
      for (int64_t e = 0; e < a_.E;) {
        const int64_t next = e + kPanel <= a_.E ? e + kPanel : e + kLanes;
        // A little at a time: memory serves only so many requests at once.
        const int64_t fetch = row > 0 ? to_fetch : smaller(to_fetch, next * to_fetch / a_.E);
        if (fetched < fetch)
          prefetch_rows(row_of<Element>(a_.key, head / a_.G, head % a_.G, end + fetched),
                        a_.key.stride[2], fetch - fetched, a_.D);
        fetched = fetch;
        if (next - e == kPanel) {
          add_tile<kTileVectors, true>(rows, left, values + e, count, a_.E - e, to + e);
        } else {
          add_tile<1, false>(rows, left, values + e, count, a_.E - e, to + e);
        }
        e = next;
      }
    }
  }

  template <int Vectors, bool Whole>
  void add_tile(int64_t rows, LeftOperand<float> left, const Element* values, int64_t count,
                int64_t valid, float* to) const {
    const RightOperand<Element> right{values, a_.value.stride[2], valid};
    tile_of<Vectors, Whole>(rows, left, right, count, [&](int row, int v, F32 product) {
      float* at = to + row * output_stride() + v * kLanes;
      store(at, load(at) + product);
    });
  }

  // Brings the parts of one row to their common largest score, adds them up and writes the row.
  void merge(int64_t head, int64_t row) const {
    const int64_t first = head * splits_ * rows_ + row;
    RowSums total = sums_[first];
    float* weighted = weighted_ + first * output_stride();
    for (int64_t split = 1; split < splits_; ++split) {
      RowSums part = sums_[first + split * rows_];
      const float* from = weighted_ + (first + split * rows_) * output_stride();
      if (part.most == -kInfinity) continue;
      const float most = total.most > part.most ? total.most : part.most;
      const float old_factor = total.move_to(most);
      const float factor = part.move_to(most);
      for (int64_t e = 0; e < a_.E; e += kLanes)
        store(weighted + e, load(weighted + e) * old_factor + load(from + e) * factor);
      total.add(part);
    }
    const Query q = query_of(head, row);
    write_row(a_, out_, q.b, q.h, q.t, total, weighted);
  }

  const Attention& a_;
  const Output& out_;
  int64_t rows_, splits_;
  float* weighted_ = nullptr;
  RowSums* sums_ = nullptr;
};

}  // namespace polyhead::POLYHEAD_ISA
