// SIMD vectors of one instruction set, as GCC vector extensions. Everything here is in the
// namespace of that instruction set, so that the linker cannot pick an inline function compiled for
// AVX-512 for an older processor. For the same reason the kernels use no inline function of std.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(POLYHEAD_NEON)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "params.hpp"
#include "tuning.hpp"

namespace polyhead::POLYHEAD_ISA {

#if defined(POLYHEAD_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define POLYHEAD_NEON_BF16
#endif

#if defined(__AVX512BF16__) || defined(POLYHEAD_NEON_BF16)
constexpr bool kHasBF16Dot = true;  // VDPBF16PS, BFDOT: a dot product of bfloat16 pairs
#else
constexpr bool kHasBF16Dot = false;
#endif

using F32 [[gnu::vector_size(kVectorBytes)]] = float;
using I32 [[gnu::vector_size(kVectorBytes)]] = int32_t;
using U32 [[gnu::vector_size(kVectorBytes)]] = uint32_t;
using U16 [[gnu::vector_size(kVectorBytes / 2)]] = uint16_t;
using U8 [[gnu::vector_size(kVectorBytes / 4)]] = uint8_t;
using I8 [[gnu::vector_size(kVectorBytes / 4)]] = int8_t;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A quantized element: value = integer * scale.
struct Int8 {
  int8_t integer;
};
// Two consecutive bfloat16 of the reduced dimension (VNNI layout), an operand of a bf16 dot
// product.
struct [[gnu::may_alias]] BF16Pair {
  uint32_t bits;
};

template <class Vector>
inline Vector load_as(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
inline void store_as(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// x - 0 is x for every x, -0 and NaN too, so this costs no subtraction.
inline F32 splat(float x) { return x - F32{}; }

// Keeps `v` in a register, where the compiler would otherwise reload it for each use. The test that
// emulates AVX-512 has no such register.
template <class Vector>
inline void keep_in_register([[maybe_unused]] Vector& v) {
#if defined(__x86_64__) && !defined(POLYHEAD_EMULATE_AVX512)
  asm("" : "+v"(v));
#elif defined(POLYHEAD_NEON)
  asm("" : "+w"(v));
#endif
}

inline F32 select(I32 mask, F32 yes, F32 no) {
  return reinterpret_cast<F32>((mask & reinterpret_cast<I32>(yes)) |
                               (~mask & reinterpret_cast<I32>(no)));
}

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }

// 0, 1, 2, ...
template <class Lanes = I32>
inline Lanes iota() {
  Lanes lanes;
  constexpr int kCount = sizeof(lanes) / sizeof(lanes[0]);
  for (int i = 0; i < kCount; ++i) lanes[i] = i;
  return lanes;
}

// Lane i of the result is lane `lane_of(i)` of a's lanes followed by b's. clang requires constant
// indices and GCC 11 an index vector, so `lane_of` accepts both a number and a vector.
template <class Vector, class LaneOf>
[[gnu::always_inline]] inline Vector shuffle(Vector a, Vector b, [[maybe_unused]] LaneOf lane_of) {
#if defined(__clang__)
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, LaneOf{}(kLane)...);
  }(std::make_integer_sequence<int, sizeof(Vector) / sizeof(a[0])>());
#else
  return __builtin_shuffle(a, b, lane_of(iota<decltype(a < b)>()));
#endif
}

// Butterfly reduction in log2(kLanes) steps: every lane holds the result.
template <int Distance = kLanes / 2, class Combine>
inline F32 reduce(F32 v, Combine combine) {
  if constexpr (Distance == 0) {
    return v;
  } else {
    const auto moved = [](auto i) { return i ^ Distance; };
    return reduce<Distance / 2>(combine(v, shuffle(v, v, moved)), combine);
  }
}

inline float reduce_add(F32 v) {
  return reduce(v, [](F32 a, F32 b) { return a + b; })[0];
}

// One step of the reduction of a and of b: both hold runs of `Run` lanes still to be added, the
// result holds runs of half the length, alternating between a and b.
template <int Run, int kHalf = Run / 2>
[[gnu::always_inline]] inline F32 reduce_step(F32 a, F32 b) {
  // One of the two terms stays in its lane: a blend is cheaper than a permutation.
  const auto staying = [](auto i) { return (i & kHalf) != 0 ? i + kLanes : i; };
  const auto moving = [](auto i) { return (i & kHalf) != 0 ? i - kHalf + kLanes : i + kHalf; };
  return shuffle(a, b, staying) + shuffle(a, b, moving);
}

// sums[i] = reduce_add(v[i]), of Count vectors at once: a reduction tree across vectors.
template <int Count, int Run = kLanes>
[[gnu::always_inline]] inline void reduce_add_each(F32 (&v)[Count], float* sums) {
  if constexpr (Count > kLanes) {
    for (int i = 0; i < Count; i += kLanes)
      reduce_add_each<kLanes>(reinterpret_cast<F32(&)[kLanes]>(v[i]), sums + i);
  } else if constexpr (Count > 1) {
    // Vector i pairs with i + Count / 2, so that the sums end up in order.
    F32 halves[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) halves[i] = reduce_step<Run>(v[i], v[i + Count / 2]);
    reduce_add_each<Count / 2, Run / 2>(halves, sums);
  } else {
    float lanes[kLanes];
    store_as(lanes, v[0]);
    for (int i = 0; i < kLanes / Run; ++i) {
      sums[i] = lanes[i * Run];
      for (int j = 1; j < Run; ++j) sums[i] += lanes[i * Run + j];
    }
  }
}

inline float reduce_max(F32 v) { return reduce(v, max)[0]; }

inline U32 to_f32(U16 bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  // GCC 12 compiles the conversion below to five instructions.
  return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#elif defined(POLYHEAD_NEON)
  return reinterpret_cast<U32>(vmovl_u16(reinterpret_cast<uint16x4_t>(bits)));
#else
  return __builtin_convertvector(bits, U32);
#endif
}

inline F32 to_f32(U16 bits, BFloat16) { return reinterpret_cast<F32>(to_f32(bits) << 16); }

inline F32 to_f32(U16 bits, Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#elif defined(POLYHEAD_NEON)
  return reinterpret_cast<F32>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(bits)));
#else
  const U32 wide = to_f32(bits);
  const U32 sign = (wide & 0x8000) << 16;
  const U32 magnitude = wide & 0x7FFF;
  // Shifted to float32's position the exponent is 112 too small; a multiplication corrects it, for
  // subnormal numbers too. Infinities and NaNs keep an exponent of all ones.
  const F32 finite = reinterpret_cast<F32>(magnitude << 13) * splat(0x1p112F);
  const U32 special = (magnitude << 13) | 0x7F800000;
  const F32 value =
      select(reinterpret_cast<I32>(magnitude >= 0x7C00), reinterpret_cast<F32>(special), finite);
  return reinterpret_cast<F32>(reinterpret_cast<U32>(value) | sign);
#endif
}

// Not yet scaled.
inline F32 to_f32(I8 int8s) {
#if defined(__AVX512F__)
  const __m512i integers = _mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(int8s));
#elif defined(__AVX2__)
  const __m256i integers =
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i*>(&int8s)));
#elif defined(POLYHEAD_NEON)
  // GCC 12 converts each lane by itself.
  const int8x8_t twice = vreinterpret_s8_u32(vdup_n_u32(reinterpret_cast<uint32_t>(int8s)));
  const int32x4_t integers = vmovl_s16(vget_low_s16(vmovl_s8(twice)));
#else
  const I32 integers = __builtin_convertvector(int8s, I32);
#endif
  return __builtin_convertvector(reinterpret_cast<I32>(integers), F32);
}

inline F32 load(const float* from) { return load_as<F32>(from); }
inline F32 load(const BFloat16* from) { return to_f32(load_as<U16>(from), BFloat16{}); }
inline F32 load(const Float16* from) { return to_f32(load_as<U16>(from), Float16{}); }
inline F32 load(const Int8* from) { return to_f32(load_as<I8>(from)); }

// Masked load of the first `count` elements, 0 in the other lanes: reads nothing beyond them.
template <class Vector, class Element>
inline Vector load_partial(const Element* from, int64_t count) {
#if defined(__AVX512F__) && !defined(POLYHEAD_EMULATE_AVX512)
  if constexpr (sizeof(Element) == 4) {
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi32((1U << count) - 1, from));
  } else if constexpr (sizeof(Element) == 2 && sizeof(Vector) == 64) {
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16((1U << count) - 1, from));
  } else if constexpr (sizeof(Element) == 2) {
    return reinterpret_cast<Vector>(_mm256_maskz_loadu_epi16((1U << count) - 1, from));
  }
#endif
  Element lanes[sizeof(Vector) / sizeof(Element)] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load_as<Vector>(lanes);
}

inline F32 load_n(const float* from, int64_t count) {
  return count >= kLanes ? load(from) : load_partial<F32>(from, count);
}
template <class Element>
inline F32 load_n(const Element* from, int64_t count) {
  return count >= kLanes ? load(from) : to_f32(load_partial<U16>(from, count), Element{});
}
inline F32 load_n(const Int8* from, int64_t count) {
  return count >= kLanes ? load(from) : to_f32(load_partial<I8>(from, count));
}

inline void store(float* to, F32 v) { store_as(to, v); }

// Round to nearest, ties to even.
inline U16 round_to_bf16(F32 v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<U16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#elif defined(POLYHEAD_NEON_BF16)
  return reinterpret_cast<U16>(vcvt_bf16_f32(reinterpret_cast<float32x4_t>(v)));
#else
  const U32 bits = reinterpret_cast<U32>(v);
  const U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const U32 quiet_nan = (bits >> 16) | 0x40;
  const U32 is_nan = reinterpret_cast<U32>(v != v);
  return __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), U16);
#endif
}

inline void store(BFloat16* to, F32 v) { store_as(to, round_to_bf16(v)); }

inline uint16_t narrow_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (bits >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (bits < 0x38800000) {
    // Adding 0.5 leaves the subnormal's mantissa, rounded to even, in the low bits.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5F;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13));
}

inline void store(Float16* to, F32 v) {
#if defined(__AVX512F__)
  store_as(to, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store_as(to, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(POLYHEAD_NEON)
  store_as(to, vcvt_f16_f32(reinterpret_cast<float32x4_t>(v)));
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = narrow_to_f16(v[i]);
#endif
}

template <class Element>
inline void store_n(Element* to, F32 v, int64_t count) {
  if (count >= kLanes) return store(to, v);
  Element lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Calls `with` on a value of the C++ element type of this dtype.
template <class Function>
inline auto dispatch_dtype(Dtype dtype, Function&& with) {
  switch (dtype) {
    case Dtype::bf16: return with(BFloat16{});
    case Dtype::f16: return with(Float16{});
    default: return with(float{});
  }
}

// The same for keys and values, which may be quantized in the cache.
template <class Function>
inline auto dispatch_kv_dtype(Dtype dtype, Function&& with) {
  return dtype == Dtype::i8 ? with(Int8{}) : dispatch_dtype(dtype, with);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

}  // namespace polyhead::POLYHEAD_ISA
