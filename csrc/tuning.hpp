// Block sizes of the kernels: one column per instruction set, with the cache level that each fits.
// README.md draws the loop nest. Thresholds that choose a kernel or a split stand with their
// kernel.
#pragma once

#include <cstdint>

namespace polyhead::POLYHEAD_ISA {

template <class Number>
constexpr Number by_isa([[maybe_unused]] Number portable, [[maybe_unused]] Number neon,
                        [[maybe_unused]] Number avx2, [[maybe_unused]] Number avx512) {
#if defined(__AVX512F__)
  return avx512;
#elif defined(__AVX2__)
  return avx2;
#elif defined(POLYHEAD_NEON)
  return neon;
#else
  return portable;
#endif
}

// clang-format off
//                                              portable   NEON    AVX2  AVX-512
constexpr int kVectorBytes     = by_isa<int>    (    16,     16,     32,      64);
constexpr int kLanes           = kVectorBytes / 4;  // of float32

// The register tile of gemm (MR x NR). AVX-512: 6 x 4 accumulators, 4 loads and a broadcast, 29 of
// 32 registers, and so for NEON. AVX2: 6 x 2 accumulators, 2 loads and a broadcast, 15 of 16. (NEON's
// column follows from sizes of registers and caches; it was never measured on a processor.)
constexpr int kTileRows        = 6;
constexpr int kTileVectors     = by_isa<int>    (     2,      4,      2,       4);
constexpr int64_t kPanel       = kTileVectors * kLanes;  // columns of a tile

// Accumulators of gemv's dot products: registers, after the operands.
constexpr int kMaxAccumulators = by_isa<int>    (     8,     16,      8,      16);

// Forward, packed (MC x KC). 96 queries are 16 tiles, so a panel that came from L2 is read 16 times.
// AVX-512: the scores of one tile, 12 KB, stay in L1 and the packed keys in L2. The others: a panel
// of values, 16 KB, stays in L1, and so does one of keys, for a group of 4 tiles.
constexpr int64_t kQueryBlock  = 96;
constexpr int64_t kKeyBlock    = by_isa<int64_t>(   256,    256,    256,     512);
constexpr int64_t kTileGroup   = by_isa<int64_t>(     4,      4,      4,       1);

// Backward: whole tiles, and whole panels. With heads of 64 a thread's scratch is 1 MB (AVX-512) or
// a third of it: the L2 of the processors that have the instruction set.
constexpr int64_t kGradQueries = by_isa<int64_t>(    48,     48,     48,      96);
constexpr int64_t kGradKeys    = by_isa<int64_t>(   192,    192,    192,     384);

// Decode: bytes of K that are read before the same amount of V, two streams. Longer blocks cost
// less arithmetic, as reductions of short vectors take more of a block; shorter ones read as one
// stream would.
constexpr int64_t kBlockBytes  = by_isa<int64_t>( 16384,  16384,  16384,    4096);

// Software prefetch of the next block, where arithmetic takes as long as reading. With AVX-512 the
// hardware prefetcher suffices, if the lines of each row are touched in order.
constexpr bool kUsesPrefetch   = by_isa<bool>   (  true,   true,   true,   false);
// clang-format on

}  // namespace polyhead::POLYHEAD_ISA
