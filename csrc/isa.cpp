// Runtime dispatch to the kernels of the best instruction set of the processor.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "params.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace polyhead {

#if defined(__x86_64__)
#if !defined(POLYHEAD_NO_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kTable;
}
#endif
namespace avx512 {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
#elif defined(__aarch64__)
namespace neon_bf16 {
extern const Kernels kTable;
}
namespace neon {
extern const Kernels kTable;
}
#endif
namespace portable {
extern const Kernels kTable;
}

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports of clang 14 lacks f16c.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#elif defined(__aarch64__)
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBF16 = 1UL << 14;  // HWCAP2_BF16, which headers of older systems lack
  return (getauxval(AT_HWCAP2) & kBF16) != 0;
#elif defined(__APPLE__)
  int is_there = 0;
  size_t size = sizeof is_there;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &is_there, &size, nullptr, 0) == 0 &&
         is_there != 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*has)();
};

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
#if !defined(POLYHEAD_NO_AVX512_BF16)
    {&avx512_bf16::kTable, has_avx512_bf16},
#endif
    {&avx512::kTable, has_avx512},
    {&avx2::kTable, has_avx2},
#elif defined(__aarch64__)
    {&neon_bf16::kTable, has_neon_bf16},
    {&neon::kTable, always},
#endif
    {&portable::kTable, always},
};

const Kernels* find(const char* name) {
  for (const Candidate& candidate : kCandidates)
    if (candidate.has() && (name == nullptr || std::strcmp(name, candidate.kernels->isa) == 0))
      return candidate.kernels;
  return nullptr;
}

const Kernels* first_choice() {
  const Kernels* named = find(std::getenv("POLYHEAD_CPU_ISA"));
  return named != nullptr ? named : find(nullptr);
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{first_choice()};
  return kernels;
}

}  // namespace

void throw_bad_alloc() { throw std::bad_alloc(); }

const Kernels& kernels() { return *chosen(); }

bool choose_isa(const char* name) {
  const Kernels* found = find(name);
  if (found == nullptr) return false;
  chosen() = found;
  return true;
}

}  // namespace polyhead
