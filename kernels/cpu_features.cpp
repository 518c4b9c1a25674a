#include "kernels/cpu_features.h"

#include <atomic>
#include <cassert>

#include "kernels/cpu_kernels.h"

namespace q4s {
namespace {

std::atomic<CpuLevel> g_level{best_cpu_level()};

}  // namespace

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kPortable: return "portable";
    case CpuLevel::kAvx2: return "avx2";
    case CpuLevel::kAvx512: return "avx512";
  }
  return "";
}

CpuLevel best_cpu_level() {
  __builtin_cpu_init();  // its answers include the operating system's support of the wide registers
  const auto avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const auto avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return avx2 && avx512 ? CpuLevel::kAvx512 : avx2 ? CpuLevel::kAvx2 : CpuLevel::kPortable;
}

CpuLevel cpu_level() { return g_level.load(std::memory_order_relaxed); }

void set_cpu_level(CpuLevel level) {
  assert(level <= best_cpu_level());
  g_level = level;
}

const CpuKernels& cpu_kernels() {
  switch (cpu_level()) {
    case CpuLevel::kAvx512: return kAvx512Kernels;
    case CpuLevel::kAvx2: return kAvx2Kernels;
    default: return kPortableKernels;
  }
}

}  // namespace q4s
