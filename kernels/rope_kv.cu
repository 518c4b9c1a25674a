// rope_kv.h on the GPU: a thread a pair (a, b) of q or k, and a thread a pair of neighbours of v.
#include <cuda_fp16.h>

#include "kernels/pdl.cuh"
#include "kernels/rope_kv.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

__device__ void store(void* cache, KvType type, int64_t i, float v) {
  if (type == KvType::kF32)
    static_cast<float*>(cache)[i] = v;
  else
    static_cast<__half*>(cache)[i] = __float2half_rn(v);
}

__global__ void rope_kv_kernel(RopeKvArgs a) {
  pdl_trigger();
  const int64_t hd = a.head_dim, half = hd / 2, q_width = a.heads * hd, kv_width = a.kv_heads * hd;
  const int64_t pair = int64_t(blockIdx.y) * kThreads + threadIdx.x, t = blockIdx.x;
  pdl_wait();
  if (pair >= (a.heads + 2 * a.kv_heads) * half) return;
  const float* qkv = a.qkv + t * (q_width + 2 * kv_width);
  const int64_t position = a.at.position[t], row = (a.at.sequence[t] * a.kv.ctx + position) * kv_width;
  const int64_t h = pair / half, i = pair % half;
  const float x0 = qkv[h * hd + i], x1 = qkv[h * hd + half + i];
  if (h >= a.heads + a.kv_heads) {
    const int64_t at = row + (h - a.heads - a.kv_heads) * hd + i;
    store(a.kv.v, a.kv.type, at, x0);
    store(a.kv.v, a.kv.type, at + half, x1);
    return;
  }
  const float c = a.table[position * hd + 2 * i], s = a.table[position * hd + 2 * i + 1];
  const float y0 = x0 * c - x1 * s, y1 = x0 * s + x1 * c;
  if (h < a.heads) {
    a.q[t * q_width + h * hd + i] = y0;
    a.q[t * q_width + h * hd + half + i] = y1;
  } else {
    const int64_t at = row + (h - a.heads) * hd + i;
    store(a.kv.k, a.kv.type, at, y0);
    store(a.kv.k, a.kv.type, at + half, y1);
  }
}

}  // namespace

void rope_kv_cuda(const RopeKvArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return;
  const int64_t pairs = (a.heads + 2 * a.kv_heads) * (a.head_dim / 2);
  launch("rope_kv", rope_kv_kernel, dim3(unsigned(a.tokens), unsigned(ceil_div(pairs, kThreads))), kThreads,
         0, 1, true, stream, a);
}

}  // namespace q4s
