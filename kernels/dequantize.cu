// Rows of an int4 or int8 weight in device memory as fp16, for the library's products: the oracle of the int4
// kernels, and their fallback. A thread makes two neighbouring columns.
#include <cuda_fp16.h>

#include "kernels/linear.h"
#include "kernels/pdl.cuh"
#include "kernels/weight_value.cuh"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__global__ void dequantize_kernel(DeviceMatrix m, int64_t first, __half* out) {
  pdl_trigger();
  const int64_t j = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * 2, k = m.view.k, n = first + blockIdx.x;
  pdl_wait();
  for (int64_t i = j; i < j + 2 && i < k; ++i)
    out[blockIdx.x * k + i] = __float2half_rn(weight_value(m, n, i));
}

}  // namespace

void dequantize_rows_cuda(const DeviceMatrix& m, int64_t begin, int64_t end, void* out, cudaStream_t stream) {
  if (begin == end) return;
  const dim3 grid(unsigned(end - begin), unsigned(ceil_div(m.view.k, kThreads * 2)));
  launch("dequantize", dequantize_kernel, grid, kThreads, 0, 1, true, stream, m, begin,
         static_cast<__half*>(out));
}

}  // namespace q4s
