// swiglu.h on the GPU: a thread an element, or four where rows allow.
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/pdl.cuh"
#include "kernels/swiglu.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1 + expf(-gate)) * up; }

template <bool kHalf>
__global__ void swiglu_four_kernel(SwigluArgs a, __half* y16) {
  pdl_trigger();
  const int64_t i = 4 * (int64_t(blockIdx.y) * kThreads + threadIdx.x), t = blockIdx.x;
  pdl_wait();
  if (i >= a.hidden) return;
  const float4 g = *reinterpret_cast<const float4*>(a.x + t * 2 * a.hidden + i);
  const float4 u = *reinterpret_cast<const float4*>(a.x + t * 2 * a.hidden + a.hidden + i);
  const float4 y = make_float4(swiglu(g.x, u.x), swiglu(g.y, u.y), swiglu(g.z, u.z), swiglu(g.w, u.w));
  if (kHalf) {
    const __half2 h[2] = {__floats2half2_rn(y.x, y.y), __floats2half2_rn(y.z, y.w)};
    *reinterpret_cast<uint2*>(y16 + t * a.hidden + i) = *reinterpret_cast<const uint2*>(h);
  } else {
    *reinterpret_cast<float4*>(a.y + t * a.hidden + i) = y;
  }
}

template <bool kHalf>
__global__ void swiglu_kernel(SwigluArgs a, __half* y16) {
  pdl_trigger();
  const int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x;
  pdl_wait();
  if (i >= a.hidden) return;
  const float gate = a.x[t * 2 * a.hidden + i], up = a.x[t * 2 * a.hidden + a.hidden + i];
  const float y = swiglu(gate, up);
  if (kHalf)
    y16[t * a.hidden + i] = __float2half_rn(y);
  else
    a.y[t * a.hidden + i] = y;
}

template <bool kHalf>
void run(const SwigluArgs& a, __half* y16, cudaStream_t stream) {
  if (a.tokens == 0) return;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | (kHalf ? 2 * reinterpret_cast<uintptr_t>(y16)
                                                                        : reinterpret_cast<uintptr_t>(a.y));
  if (a.hidden % 4 == 0 && addresses % 16 == 0) {
    launch("swiglu", swiglu_four_kernel<kHalf>,
           dim3(unsigned(a.tokens), unsigned(ceil_div(a.hidden, 4 * kThreads))), kThreads, 0, 1, true, stream,
           a, y16);
    return;
  }
  launch("swiglu", swiglu_kernel<kHalf>, dim3(unsigned(a.tokens), unsigned(ceil_div(a.hidden, kThreads))),
         kThreads, 0, 1, true, stream, a, y16);
}

}  // namespace

void swiglu_cuda(const SwigluArgs& a, cudaStream_t stream) { run<false>(a, nullptr, stream); }

void swiglu_f16_cuda(const SwigluArgs& a, void* y16, cudaStream_t stream) {
  run<true>(a, static_cast<__half*>(y16), stream);
}

}  // namespace q4s
