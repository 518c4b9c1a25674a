// What the GEMM kernels do with sums: store, SiLU(gate)*up, or rotation and cache append. Rows r (lo) and r +
// 8 (hi) of a 16-row tile meet here: that is how the row maps of q4_tiles.h pair values, as they lie in
// the accumulators of a warp. Shared by linear_q4_gemm*.cu only.
#pragma once
#include <cuda_fp16.h>

#include "kernels/linear_q4_gemm.h"

namespace q4s {

// The part of Q4GemmArgs that the device needs after the product.
struct Q4GemmSink {
  void* y;
  const float* residual;
  const float* table;
  const int32_t* position;  // (T)
  const int32_t* sequence;  // (T)
  void* k;
  void* v;
  int64_t y_pitch, ctx;
  int tokens, n, heads, kv_heads, head_dim, rotated;
  Q4GemmOutput output;
  bool y_half, kv_half;
};

inline Q4GemmSink q4_gemm_sink(const Q4GemmArgs& a) {
  Q4GemmSink s = {};
  s.y = a.y, s.residual = a.residual, s.table = a.table, s.position = a.at.position,
  s.sequence = a.at.sequence;
  s.k = a.kv.k, s.v = a.kv.v, s.y_pitch = a.y_pitch, s.ctx = a.kv.ctx;
  s.tokens = int(a.tokens), s.n = int(a.w.n), s.heads = int(a.heads), s.kv_heads = int(a.kv_heads);
  s.head_dim = int(a.w.head_dim), s.rotated = int(a.w.rotated);
  s.output = a.output, s.y_half = a.y_half, s.kv_half = a.kv.type == KvType::kF16;
  return s;
}

// To the finite range of fp16; what is not a number stays so.
__device__ inline __half saturated_half(float v) {
  return __float2half_rn(v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v);
}
__device__ inline float silu(float v) { return __fdividef(v, 1.f + __expf(-v)); }

__device__ inline void sink_store(void* p, bool half, int64_t i, float v) {
  if (half)
    static_cast<__half*>(p)[i] = saturated_half(v);
  else
    static_cast<float*>(p)[i] = v;
}

// One pair of a tile in the fused outputs.
__device__ inline void sink_pair(const Q4GemmSink& s, int n_tile, int g, int token, float lo, float hi) {
  if (s.output == Q4GemmOutput::kSwiglu) {
    const int i = n_tile * 8 + g;
    if (i < s.n / 2) sink_store(s.y, s.y_half, token * s.y_pitch + i, silu(lo) * hi);
    return;
  }
  const int row = n_tile * kQ4TileRows, hd = s.head_dim, half = hd / 2;
  if (row >= s.n) return;
  const int position = s.position[token];
  const int64_t cache = (s.sequence[token] * s.ctx + position) * (s.kv_heads * hd);
  if (row >= s.rotated) {
    const int i = row - s.rotated + g;
    sink_store(s.v, s.kv_half, cache + i, lo);
    sink_store(s.v, s.kv_half, cache + i + 8, hi);
    return;
  }
  const int head = row / hd, i = row % hd / 2 + g;
  const float2 turn = reinterpret_cast<const float2*>(s.table)[int64_t(position) * half + i];
  const float y0 = lo * turn.x - hi * turn.y, y1 = lo * turn.y + hi * turn.x;
  if (head < s.heads) {
    const int64_t at = token * s.y_pitch + head * hd + i;
    sink_store(s.y, s.y_half, at, y0);
    sink_store(s.y, s.y_half, at + half, y1);
  } else {
    const int64_t at = cache + (head - s.heads) * hd + i;
    sink_store(s.k, s.kv_half, at, y0);
    sink_store(s.k, s.kv_half, at + half, y1);
  }
}

// The accumulators of one warp's 16-row tile: c[4j..] = (g, u), (g, u+1), (g+8, u), (g+8, u+1), u = token0 +
// 8j + 2t.
template <int kCount>
__device__ inline void sink_tile(const Q4GemmSink& s, int n_tile, int token0, int lane, float (&c)[kCount]) {
  const int g = lane / 4, first = token0 + lane % 4 * 2;
  if (s.output != Q4GemmOutput::kStore) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (first + 8 * j + e < s.tokens)
          sink_pair(s, n_tile, g, first + 8 * j + e, c[4 * j + e], c[4 * j + 2 + e]);
    return;
  }
  const int row = n_tile * kQ4TileRows + g;
  const bool in[2] = {row < s.n, row + 8 < s.n};
  // Batches, so that loads of the residual do not wait for stores that may alias it.
  constexpr int kBatch = kCount / 4 < 8 ? kCount / 4 : 8;
#pragma unroll
  for (int j0 = 0; j0 < kCount / 4; j0 += kBatch) {
    if (s.residual) {
      float r[kBatch * 4];
#pragma unroll
      for (int i = 0; i < kBatch * 4; ++i) {
        const int token = first + 8 * (j0 + i / 4) + i % 2, upper = i % 4 / 2;
        r[i] = token < s.tokens && in[upper] ? s.residual[int64_t(token) * s.n + row + 8 * upper] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kBatch * 4; ++i) c[4 * j0 + i] += r[i];
    }
#pragma unroll
    for (int i = 0; i < kBatch * 4; ++i) {
      const int token = first + 8 * (j0 + i / 4) + i % 2, upper = i % 4 / 2;
      if (token < s.tokens && in[upper])
        sink_store(s.y, s.y_half, token * s.y_pitch + row + 8 * upper, c[4 * j0 + i]);
    }
  }
}

}  // namespace q4s
