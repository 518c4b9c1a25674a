// convert.h: a thread an element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/convert.h"
#include "kernels/pdl.cuh"
#include "kernels/types.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__global__ void f16_kernel(const float* x, int64_t k, __half* y, int64_t ld) {
  pdl_trigger();
  const int64_t j = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x;
  pdl_wait();
  if (j < ld) y[t * ld + j] = __float2half_rn(j < k ? x[t * k + j] : 0);
}

// Rows without a gap, four values a thread.
__global__ void f16_flat_kernel(const float4* x, uint2* y, int64_t fours) {
  pdl_trigger();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  pdl_wait();
  if (i >= fours) return;
  const float4 v = x[i];
  const __half2 h[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
  y[i] = *reinterpret_cast<const uint2*>(h);
}

__global__ void bf16_pair_kernel(const float* x, int64_t k, __nv_bfloat16* high, __nv_bfloat16* low) {
  pdl_trigger();
  const int64_t j = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x;
  pdl_wait();
  if (j >= k) return;
  const float v = x[t * k + j];
  const __nv_bfloat16 h = __float2bfloat16_rn(v);
  high[t * k + j] = h;
  low[t * k + j] = __float2bfloat16_rn(v - __bfloat162float(h));
}

__global__ void copy_kernel(const float* x, float* y, int64_t count) {
  pdl_trigger();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  pdl_wait();
  if (i < count) y[i] = x[i];
}

}  // namespace

int probe_kernel_image() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, copy_kernel);
}

void copy_cuda(const float* x, float* y, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  launch("convert", copy_kernel, unsigned(ceil_div(count, kThreads)), kThreads, 0, 1, true, stream, x, y,
         count);
}

void to_f16_cuda(const float* x, int64_t tokens, int64_t k, void* y, int64_t ld, cudaStream_t stream) {
  if (tokens == 0) return;
  if (k == ld && tokens * k % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
      reinterpret_cast<uintptr_t>(y) % 8 == 0) {
    const int64_t fours = tokens * k / 4;
    launch("convert", f16_flat_kernel, unsigned(ceil_div(fours, kThreads)), kThreads, 0, 1, true, stream,
           reinterpret_cast<const float4*>(x), static_cast<uint2*>(y), fours);
    return;
  }
  launch("convert", f16_kernel, dim3(unsigned(tokens), unsigned(ceil_div(ld, kThreads))), kThreads, 0, 1,
         true, stream, x, k, static_cast<__half*>(y), ld);
}

void to_bf16_pair_cuda(const float* x, int64_t tokens, int64_t k, void* high, void* low,
                       cudaStream_t stream) {
  if (tokens == 0) return;
  launch("convert", bf16_pair_kernel, dim3(unsigned(tokens), unsigned(ceil_div(k, kThreads))), kThreads, 0, 1,
         true, stream, x, k, static_cast<__nv_bfloat16*>(high), static_cast<__nv_bfloat16*>(low));
}

}  // namespace q4s
