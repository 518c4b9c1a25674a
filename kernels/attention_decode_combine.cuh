// How the sums of decode attention come together: the warps of a block, then the blocks that share a cache.
// Device code.
#pragma once
#include <cuda_fp16.h>

#include "kernels/attention_decode.h"

namespace q4s {

constexpr int kMaxHeads = 8, kMaxDim = 256, kMaxParts = 16;

struct AttentionDecodeParams {
  const float* q;  // (T, H * hd)
  void* y;         // (T, H * hd)
  bool y_half;
  Placement at;
  KvLayer kv;
  int heads, kv_heads, head_dim;
  int head_blocks;     // blocks of 8 query heads to one kv head
  int rows;            // T * kv_heads * head_blocks
  int fresh;           // newest rows of a sequence that the predecessor may write
  int part_tiles;      // least tiles of a part
  float scale;         // log2(e) / sqrt(hd)
  unsigned* counters;  // (rows) of T * kv_heads * head_blocks, zero between launches
  float2* unfinished;  // (rows, parts, 8) largest logit of a head and sum of weights
  float* sums;         // (rows, parts, 8 * hd) weighted sums of values
};

// Of the warps of a block: largest logit and sum of weights.
template <int kWarps>
struct AttentionDecodePartials {
  float m[kWarps][kMaxHeads], l[kWarps][kMaxHeads];
  bool last;
};

// Counts arrivals from 0 to `most` and back to 0. The last one sees what the others wrote.
__device__ inline bool is_last(unsigned* counter, unsigned most) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(most)
               : "memory");
  return before == most;
}

__device__ inline void store(const AttentionDecodeParams& p, int64_t i, float v) {
  if (p.y_half)
    static_cast<__half*>(p.y)[i] = __float2half_rn(v);
  else
    static_cast<float*>(p.y)[i] = v;
}

__device__ inline float weight_of(float m, float top) { return m == -INFINITY ? 0.0f : exp2f(m - top); }

// y, (heads, hd) from `y` on, from the parts' results, four values a thread and turn; all loads of a turn at
// once.
template <int kThreads>
__device__ void add_parts(const AttentionDecodeParams& p, int64_t first, int parts, int64_t y, int heads) {
  const int hd = p.head_dim;
  for (int i = 4 * int(threadIdx.x); i < heads * hd; i += 4 * kThreads) {
    float2 ml[kMaxParts];
    float4 v[kMaxParts];
#pragma unroll
    for (int b = 0; b < kMaxParts; ++b) {
      ml[b] = make_float2(-INFINITY, 0);
      v[b] = make_float4(0, 0, 0, 0);
      if (b >= parts) continue;
      ml[b] = __ldcg(p.unfinished + (first + b) * kMaxHeads + i / hd);
      v[b] = __ldcg(reinterpret_cast<const float4*>(p.sums + (first + b) * kMaxHeads * hd + i));
    }
    float top = -INFINITY, total = 0;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int b = 0; b < kMaxParts; ++b) top = fmaxf(top, ml[b].x);
#pragma unroll
    for (int b = 0; b < kMaxParts; ++b) {
      const float weight = weight_of(ml[b].x, top);
      total += weight * ml[b].y;
      sum.x += weight * v[b].x, sum.y += weight * v[b].y, sum.z += weight * v[b].z, sum.w += weight * v[b].w;
    }
    store(p, y + i, sum.x / total), store(p, y + i + 1, sum.y / total);
    store(p, y + i + 2, sum.z / total), store(p, y + i + 3, sum.w / total);
  }
}

// Adds the warps' results and writes y, (heads, hd) from `y` on, or those of a part where there are several.
// o(w): sums of warp w, (heads, hd). All threads of the block.
template <int kWarps, typename Warp>
__device__ void combine(const AttentionDecodeParams& p, AttentionDecodePartials<kWarps>& s, const Warp& o,
                        int64_t y, int heads, int part, int parts) {
  const int hd = p.head_dim, row = int(blockIdx.z * gridDim.y + blockIdx.y);
  const int64_t first = int64_t(row) * gridDim.x;
  __syncthreads();
  for (int i = int(threadIdx.x); i < heads * hd; i += kWarps * 32) {
    const int h = i / hd;
    float top = -INFINITY, sum = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, s.m[w][h]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = weight_of(s.m[w][h], top);
      sum += weight * o(w)[i];
      total += weight * s.l[w][h];
    }
    if (parts == 1) {
      store(p, y + i, sum / total);
    } else {
      p.sums[(first + part) * kMaxHeads * hd + i] = sum;
      if (i % hd == 0) p.unfinished[(first + part) * kMaxHeads + h] = make_float2(top, total);
    }
  }
  if (parts == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) s.last = is_last(p.counters + row, unsigned(parts - 1));
  __syncthreads();
  if (s.last) add_parts<kWarps * 32>(p, first, parts, y, heads);
}

}  // namespace q4s
