// What *_cuda.cpp files of the layers above may ask of the CUDA backend beside Backend.
#pragma once
#include "kernels/cuda_stream.h"
#include "runtime/backend.h"

namespace q4s {

// The stream on which the backend runs everything: work put there is ordered with its graphs, reads and
// writes. Throws Error(kRuntime) where b is another backend.
cudaStream_t cuda_stream(Backend& b);

}  // namespace q4s
