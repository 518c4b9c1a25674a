// The read speed of the GPU's memory: what every kernel that streams weights is measured against.
#pragma once
#include "kernels/cuda_stream.h"

namespace q4s {

// Bytes per second of the best of several read-only sweeps over a buffer far beyond the L2 cache. Takes 2 GiB
// for the time of the call. Throws CudaError.
double read_sweep_cuda(cudaStream_t);

}  // namespace q4s
