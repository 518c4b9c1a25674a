// rms_norm.h on the GPU: one block a token, the sum of squares in a fixed order.
#include <cuda_fp16.h>

#include "kernels/block_reduce.cuh"
#include "kernels/pdl.cuh"
#include "kernels/rms_norm.h"

namespace q4s {
namespace {

constexpr int kThreads = 512;

// Four columns, zero from dim on; dim may be no multiple of 4.
__device__ float4 four(const float* x, int64_t i, int64_t dim, bool aligned) {
  if (aligned && i < dim) return *reinterpret_cast<const float4*>(x + i);
  const auto at = [&](int64_t j) { return j < dim ? x[j] : 0.0f; };
  return make_float4(at(i), at(i + 1), at(i + 2), at(i + 3));
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormArgs a, __half* y16, int64_t ld) {
  __shared__ float shared[32];
  pdl_trigger();
  const float* x = a.x + blockIdx.x * a.dim;
  const bool aligned = a.dim % 4 == 0;
  pdl_wait();
  float sum = 0;
  for (int64_t i = 4 * threadIdx.x; i < a.dim; i += 4 * kThreads) {
    const float4 v = four(x, i, a.dim, aligned);
    sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
  }
  sum = block_sum<kThreads>(sum, shared);
  const float scale = 1 / sqrtf(sum / float(a.dim) + a.eps);
  const int64_t width = kHalf ? ld : a.dim;
  for (int64_t i = 4 * threadIdx.x; i < width; i += 4 * kThreads) {
    const float4 v = four(x, i, a.dim, aligned), w = four(a.w, i, a.dim, aligned);
    const float y[4] = {w.x * (v.x * scale), w.y * (v.y * scale), w.z * (v.z * scale), w.w * (v.w * scale)};
    if (kHalf) {
      __half* to = y16 + blockIdx.x * ld + i;
      if (ld % 4 == 0) {
        reinterpret_cast<__half2*>(to)[0] = __floats2half2_rn(y[0], y[1]);
        reinterpret_cast<__half2*>(to)[1] = __floats2half2_rn(y[2], y[3]);
        continue;
      }
      for (int j = 0; j < 4 && i + j < ld; ++j) to[j] = __float2half_rn(y[j]);
    } else {
      float* to = a.y + blockIdx.x * a.dim + i;
      if (aligned) {
        *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
        continue;
      }
      for (int j = 0; j < 4 && i + j < a.dim; ++j) to[j] = y[j];
    }
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
