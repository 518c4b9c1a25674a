// rms_norm.h on the GPU: one block a token, the sum of squares in a fixed order.
#include <cuda_fp16.h>

#include "kernels/block_reduce.cuh"
#include "kernels/pdl.cuh"
#include "kernels/rms_norm.h"

namespace q4s {
namespace {

constexpr int kThreads = 512;

template <bool kHalf>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormArgs a, __half* y16, int64_t ld) {
  __shared__ float shared[32];
  pdl_trigger();
  const float* x = a.x + blockIdx.x * a.dim;
  pdl_wait();
  float sum = 0;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) sum += x[i] * x[i];
  sum = block_sum<kThreads>(sum, shared);
  const float scale = 1 / sqrtf(sum / float(a.dim) + a.eps);
  for (int64_t i = threadIdx.x; i < (kHalf ? ld : a.dim); i += kThreads) {
    const float v = i < a.dim ? a.w[i] * (x[i] * scale) : 0;
    if (kHalf)
      y16[blockIdx.x * ld + i] = __float2half_rn(v);
    else
      a.y[blockIdx.x * a.dim + i] = v;
  }
}

}  // namespace

void rms_norm_cuda(const RmsNormArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return;
  launch("rms_norm", rms_norm_kernel<false>, unsigned(a.tokens), kThreads, 0, 1, true, stream, a, nullptr,
         int64_t(0));
}

void rms_norm_f16_cuda(const RmsNormArgs& a, void* y16, int64_t ld, cudaStream_t stream) {
  if (a.tokens == 0) return;
  launch("rms_norm", rms_norm_kernel<true>, unsigned(a.tokens), kThreads, 0, 1, true, stream, a,
         static_cast<__half*>(y16), ld);
}

}  // namespace q4s
