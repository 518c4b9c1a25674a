// Which instruction set the fast CPU paths use. Chosen once, by CPUID, before the first kernel runs.
#pragma once

namespace q4s {

enum class CpuLevel {
  kPortable,  // what the compiler makes of plain code
  kAvx2,      // AVX2, FMA, F16C
  kAvx512,    // AVX-512 F, BW, DQ, VL, VNNI, BF16
};

const char* cpu_level_name(CpuLevel);
CpuLevel best_cpu_level();  // of this machine and operating system
CpuLevel cpu_level();       // in use: best_cpu_level() unless set
void set_cpu_level(
    CpuLevel);  // at most best_cpu_level(); not while kernels run, nor between planning and running

}  // namespace q4s
