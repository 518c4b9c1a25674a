// random_weight.h on the GPU: whole matrices in the file's order, a thread a byte or a value.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda_check.h"
#include "kernels/random_weight.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__global__ void data_kernel(uint64_t seed, WeightView w, uint8_t* out, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  if (w.format == Format::kQ4) {
    const int64_t stride = (w.k + 1) / 2, n = i / stride, j = i % stride * 2;
    const uint64_t codes = random_q4(seed, w.k, n, j / 16) >> (j % 16 * 4);
    out[i] = uint8_t(j + 1 < w.k ? codes & 255 : codes & 15);
    return;
  }
  const int64_t n = i / w.k, j = i % w.k;
  if (w.format == Format::kQ8) {
    out[i] = uint8_t(random_q8(seed, w.k, n, j));
    return;
  }
  const float v = random_dense(seed, w.k, n, j);
  if (w.format == Format::kF32)
    reinterpret_cast<float*>(out)[i] = v;
  else if (w.format == Format::kF16)
    reinterpret_cast<__half*>(out)[i] = __float2half_rn(v);
  else
    reinterpret_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rz(v);
}

__global__ void scales_kernel(uint64_t seed, WeightView w, uint16_t* scales, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, groups = (w.k + w.group - 1) / w.group;
  if (i < count)
    scales[i] =
        __half_as_ushort(__float2half_rn(random_scale(seed, w.format, w.k, groups, i / groups, i % groups)));
}

unsigned blocks(int64_t count) { return unsigned(ceil_div(count, kThreads)); }

}  // namespace

void random_weight_cuda(uint64_t seed, const WeightView& w, uint8_t* data, uint16_t* scales,
                        cudaStream_t stream) {
  const int64_t count = w.n * (w.format == Format::kQ4 ? ceil_div(w.k, 2) : w.k);
  data_kernel<<<blocks(count), kThreads, 0, stream>>>(seed, w, data, count);
  if (w.group) {
    const int64_t values = w.n * ceil_div(w.k, w.group);
    scales_kernel<<<blocks(values), kThreads, 0, stream>>>(seed, w, scales, values);
  }
  cuda_check(cudaGetLastError(), "random weights");
}

}  // namespace q4s
