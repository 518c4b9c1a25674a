// Sums and maxima over a block in a fixed order: butterflies in each warp, then over the warps. Every thread
// gets the result; `shared` holds 32 values and may be used again after the call.
#pragma once
#include <cuda_runtime.h>

namespace q4s {

template <int kThreads, typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T v, T* shared, T nothing, Combine combine) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  for (int d = 16; d > 0; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < kThreads / 32 ? shared[threadIdx.x % 32] : nothing;
  for (int d = 16; d > 0; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
  __syncthreads();
  return v;
}

template <int kThreads>
__device__ __forceinline__ float block_sum(float v, float* shared) {
  return block_reduce<kThreads>(v, shared, 0.f, [](float a, float b) { return a + b; });
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_max(T v, T* shared, T nothing) {
  return block_reduce<kThreads>(v, shared, nothing, [](T a, T b) { return a < b ? b : a; });
}

}  // namespace q4s
