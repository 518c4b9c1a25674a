#include "kernels/cpu_level.h"

namespace q4s {

const CpuKernels kAvx512Kernels = kKernels;

}  // namespace q4s
