// embed.h on the GPU: a block unpacks a piece of one row. Also gathers rows of activations (a kF32 table).
#include "kernels/embed.h"
#include "kernels/pdl.cuh"
#include "kernels/weight_value.cuh"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__global__ void embed_kernel(DeviceMatrix table, const int32_t* ids, float* y) {
  pdl_trigger();
  const int64_t j = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x, k = table.view.k;
  pdl_wait();
  if (j < k) y[t * k + j] = weight_value(table, ids[t], j);
}

}  // namespace

void embed_cuda(const DeviceMatrix& table, const int32_t* ids, float* y, int64_t tokens,
                cudaStream_t stream) {
  if (tokens == 0) return;
  const dim3 grid(unsigned(tokens), unsigned(ceil_div(table.view.k, kThreads)));
  launch("embed", embed_kernel, grid, kThreads, 0, 1, true, stream, table, ids, y);
}

}  // namespace q4s
