// Launches with programmatic dependent launch: a kernel may start while its predecessor still runs, loads what no
// predecessor writes (weights), and then waits. Every block of every kernel calls pdl_wait() before it reads or
// writes anything that a predecessor touches; a block that skipped it would lose the order two kernels on.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda_check.h"

namespace q4s {

// Lets the successor start now. First statement of a kernel.
__device__ __forceinline__ void pdl_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once every predecessor has ended and its writes are visible.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename... Formal, typename... Actual>
void launch_pdl(void (*kernel)(Formal...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                Actual&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(args)...), "kernel launch");
}

}  // namespace q4s
