#include "kernels/cpu_level.h"

namespace q4s {

const CpuKernels kAvx2Kernels = kKernels;

}  // namespace q4s
