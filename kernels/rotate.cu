// rotate.h on the GPU: one block a token, its row in shared memory through all stages of the fast transform.
#include "kernels/pdl.cuh"
#include "kernels/rotate.h"

namespace q4s {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) rotate_kernel(RotateArgs a) {
  extern __shared__ float v[];  // (D)
  pdl_trigger();
  const int64_t dim = a.dim, m = a.m, p = dim / m;
  const float* x = a.x + blockIdx.x * dim;
  float* y = a.y + blockIdx.x * dim;
  pdl_wait();
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) v[i] = a.inverse ? x[i] : x[i] * a.signs[i];
  for (int64_t h = 1; h < p; h *= 2) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < dim / 2; i += kThreads) {
      const int64_t pair = i / m, j = i % m;  // pair-th butterfly of the stage
      const int64_t at = (pair / h * 2 * h + pair % h) * m + j;
      const float s = v[at], d = v[at + h * m];
      v[at] = s + d;
      v[at + h * m] = s - d;
    }
  }
  __syncthreads();
  const float scale = 1 / sqrtf(float(p));
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    const int64_t row = i / m * m, j = i % m;
    float sum = 0;
    for (int64_t l = 0; l < m; ++l)
      sum += v[row + l] * (a.inverse ? a.factor[j * m + l] : a.factor[l * m + j]);
    y[i] = sum * scale * (a.inverse ? a.signs[i] : 1);
  }
}

}  // namespace

void rotate_cuda(const RotateArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return;
  const size_t bytes = size_t(a.dim) * sizeof(float);
  launch("rotate", rotate_kernel, unsigned(a.tokens), kThreads, bytes, 1, true, stream, a);
}

}  // namespace q4s
