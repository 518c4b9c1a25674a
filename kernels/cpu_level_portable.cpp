#include "kernels/cpu_level.h"

namespace q4s {

const CpuKernels kPortableKernels = kKernels;

}  // namespace q4s
