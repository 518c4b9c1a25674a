// swiglu.h on the GPU: a thread an element.
#include <cuda_fp16.h>

#include "kernels/pdl.cuh"
#include "kernels/swiglu.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

template <bool kHalf>
__global__ void swiglu_kernel(SwigluArgs a, __half* y16) {
  pdl_trigger();
  const int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x;
  pdl_wait();
  if (i >= a.hidden) return;
  const float gate = a.x[t * 2 * a.hidden + i], up = a.x[t * 2 * a.hidden + a.hidden + i];
  const float y = gate / (1 + expf(-gate)) * up;
  if (kHalf)
    y16[t * a.hidden + i] = __float2half_rn(y);
  else
    a.y[t * a.hidden + i] = y;
}

template <bool kHalf>
void run(const SwigluArgs& a, __half* y16, cudaStream_t stream) {
  if (a.tokens == 0) return;
  launch("swiglu", swiglu_kernel<kHalf>, dim3(unsigned(a.tokens), unsigned(ceil_div(a.hidden, kThreads))),
         kThreads, 0, 1, true, stream, a, y16);
}

}  // namespace

void swiglu_cuda(const SwigluArgs& a, cudaStream_t stream) { run<false>(a, nullptr, stream); }

void swiglu_f16_cuda(const SwigluArgs& a, void* y16, cudaStream_t stream) {
  run<true>(a, static_cast<__half*>(y16), stream);
}

}  // namespace q4s
