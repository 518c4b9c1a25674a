// attention.h on the GPU for any shape up to head_dim 512: one block a (token, head), no tiling. The oracle
// of the fast kernels and their fallback; each warp takes every fourth position, and the warps are merged in
// order.
#include <cuda_fp16.h>

#include <stdexcept>

#include "kernels/attention.h"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kWarps = 4;

__device__ float load(const void* cache, KvType type, int64_t i) {
  return type == KvType::kF32 ? static_cast<const float*>(cache)[i]
                              : __half2float(static_cast<const __half*>(cache)[i]);
}

// Lane l of a warp holds elements l, l + 32, ... of the head: kSlots of them.
template <int kSlots>
__global__ void __launch_bounds__(kWarps * 32) attention_kernel(AttentionArgs a) {
  __shared__ float tops[kWarps], totals[kWarps], sums[kWarps][kSlots * 32];
  pdl_trigger();
  const int64_t hd = a.head_dim, t = blockIdx.x / a.heads, h = blockIdx.x % a.heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t kv_width = a.kv_heads * hd, shared_by = a.heads / a.kv_heads;
  const float scale = 1 / sqrtf(float(hd));
  pdl_wait();
  const int64_t n = a.at.position[t] + 1, base = a.at.sequence[t] * a.kv.ctx * kv_width + h / shared_by * hd;

  float q[kSlots], sum[kSlots] = {}, top = -INFINITY, total = 0;
  for (int i = 0; i < kSlots; ++i)
    q[i] = lane + 32 * i < hd ? a.q[blockIdx.x * hd + lane + 32 * i] * scale : 0;
  for (int64_t j = warp; j < n; j += kWarps) {
    const int64_t row = base + j * kv_width + lane;
    float s = 0;
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i < hd) s += q[i] * load(a.kv.k, a.kv.type, row + 32 * i);
    for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
    const float higher = fmaxf(top, s), shrink = expf(top - higher), w = expf(s - higher);
    total = total * shrink + w;
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i < hd) sum[i] = sum[i] * shrink + w * load(a.kv.v, a.kv.type, row + 32 * i);
    top = higher;
  }

  if (lane == 0) tops[warp] = top, totals[warp] = total;
  for (int i = 0; i < kSlots; ++i) sums[warp][lane + 32 * i] = sum[i];
  __syncthreads();
  float highest = tops[0], all = 0, weight[kWarps];
  for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, tops[w]);  // finite: position 0 is always seen
  for (int w = 0; w < kWarps; ++w) weight[w] = expf(tops[w] - highest), all += weight[w] * totals[w];
  for (int64_t i = threadIdx.x; i < hd; i += kWarps * 32) {
    float y = 0;
    for (int w = 0; w < kWarps; ++w) y += weight[w] * sums[w][i];
    a.y[blockIdx.x * hd + i] = y / all;
  }
}

}  // namespace

void attention_reference_cuda(const AttentionArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return;
  const unsigned blocks = unsigned(a.tokens * a.heads);
  if (a.head_dim <= 64)
    launch("attention", attention_kernel<2>, blocks, kWarps * 32, 0, 1, true, stream, a);
  else if (a.head_dim <= 128)
    launch("attention", attention_kernel<4>, blocks, kWarps * 32, 0, 1, true, stream, a);
  else if (a.head_dim <= 512)
    launch("attention", attention_kernel<16>, blocks, kWarps * 32, 0, 1, true, stream, a);
  else
    throw std::runtime_error("attention: head_dim " + std::to_string(a.head_dim) + " is beyond 512");
}

}  // namespace q4s
