// swiglu.h on the GPU: a thread an element.
#include "kernels/pdl.cuh"
#include "kernels/swiglu.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__global__ void swiglu_kernel(SwigluArgs a) {
  pdl_trigger();
  const int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x;
  pdl_wait();
  if (i >= a.hidden) return;
  const float gate = a.x[t * 2 * a.hidden + i], up = a.x[t * 2 * a.hidden + a.hidden + i];
  a.y[t * a.hidden + i] = gate / (1 + expf(-gate)) * up;
}

}  // namespace

void swiglu_cuda(const SwigluArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return;
  launch("swiglu", swiglu_kernel, dim3(unsigned(a.tokens), unsigned(ceil_div(a.hidden, kThreads))), kThreads,
         0, 1, true, stream, a);
}

}  // namespace q4s
