// The one way CUDA errors leave this layer: an exception with the call and CUDA's own words. For .cu and
// *_cuda.cpp.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace q4s {

struct CudaError : std::runtime_error {
  cudaError_t code;
  CudaError(cudaError_t c, const std::string& what)
      : std::runtime_error(what + ": " + cudaGetErrorString(c)), code(c) {}
};

inline void cuda_check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw CudaError(code, what);
}

}  // namespace q4s
