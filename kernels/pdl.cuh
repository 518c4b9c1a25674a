// Launches with programmatic dependent launch: a kernel may start while its predecessor still runs, loads
// what no predecessor writes (weights), and then waits. Every block of every kernel calls pdl_wait() before
// it reads or writes anything that a predecessor touches; a block that skipped it would lose the order two
// kernels on.
#pragma once
#include <cuda_runtime.h>

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

// Facts of the current device; a process uses devices of one kind.
struct DeviceFacts {
  int multiprocessors, shared_bytes;  // shared memory one block may have
  bool hopper;                        // clusters, bulk copies, dependent launch
};
inline const DeviceFacts& device_facts() {
  static const DeviceFacts facts = [] {
    int device = 0, major = 0;
    DeviceFacts f{};
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaDeviceGetAttribute(&f.multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "multiprocessors");
    cuda_check(cudaDeviceGetAttribute(&f.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "shared memory");
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "compute capability");
    f.hopper = major == 9;
    return f;
  }();
  return facts;
}

// Launches with `cluster` blocks a cluster (1: none) and, if asked, as a programmatic dependent of the
// stream's last kernel. Raises the kernel's limit of dynamic shared memory where it must.
template <typename... Params, typename... Values>
void launch(const char* what, void (*kernel)(Params...), dim3 grid, int threads, size_t shared, int cluster,
            bool pdl, cudaStream_t stream, const Values&... values) {
  if (shared > 47 * 1024)  // of 48 KB without asking, in which what a kernel declares itself counts too
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), what);
  // Kernels that follow each other share the multiprocessors only if they divide L1 and shared memory alike.
  if (pdl)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               what);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (pdl && device_facts().hopper) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = unsigned(cluster);
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  cuda_check(cudaLaunchKernelEx(&config, kernel, values...), what);
}

// How many clusters of so many blocks the device takes at once.
template <typename... Params>
int clusters_fit(const char* what, void (*kernel)(Params...), int threads, size_t shared, int cluster) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(cluster));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cuda_check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), what);
  return clusters;
}

}  // namespace q4s
