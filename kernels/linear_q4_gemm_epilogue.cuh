// What the GEMM kernels do with sums: store, SiLU(gate)*up, or rotation and cache append. Rows r (lo) and r +
// 8 (hi) of a 16-row tile meet here: that is how the row maps of q4_tiles.h pair values. Two forms: straight
// from the accumulators of a warp (mma.sync), and four rows of one token at a time, in the order of memory
// (sm_90a). Shared by linear_q4_gemm*.cu only.
#pragma once
#include <cuda_fp16.h>

#include <cstring>

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

// Four neighbouring elements from i on, the first `count` of them.
__device__ inline void sink_store4(void* p, bool half, int64_t i, int64_t count, float4 v) {
  const float* f = &v.x;
  if (half) {
    __half* to = static_cast<__half*>(p) + i;
    const __half h[4] = {saturated_half(v.x), saturated_half(v.y), saturated_half(v.z), saturated_half(v.w)};
    if (count >= 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
      uint2 bits;
      memcpy(&bits, h, 8);
      *reinterpret_cast<uint2*>(to) = bits;
    } else {
      for (int e = 0; e < 4 && e < count; ++e) to[e] = h[e];
    }
    return;
  }
  float* to = static_cast<float*>(p) + i;
  if (count >= 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0)
    *reinterpret_cast<float4*>(to) = v;
  else
    for (int e = 0; e < 4 && e < count; ++e) to[e] = f[e];
}

// Where four rows of one token are: rows row.. of a packed matrix, and row + 8.. with them in the fused
// outputs. token < 0: nowhere.
struct Q4SinkPlace {
  int row, token;
};

// One thread's share of an epilogue step: four places of kStore, or two of pairs. What it reads from memory
// (residual; position and rotation) is fetched first, so that the latency passes while the sums arrive.
class Q4SinkBatch {
 public:
  // where(i) -> Q4SinkPlace
  template <class Where>
  __device__ void fetch(const Q4GemmSink& s, const Where& where) {
    if (s.output == Q4GemmOutput::kStore) {
      if (!s.residual) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Q4SinkPlace at = where(i);
        ahead_[i] = make_float4(0, 0, 0, 0);
        if (at.token < 0 || at.row >= s.n) continue;
        const float* from = s.residual + int64_t(at.token) * s.n + at.row;
        if (at.row + 4 <= s.n && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
          ahead_[i] = *reinterpret_cast<const float4*>(from);
        } else {
          ahead_[i].x = from[0];
          if (at.row + 1 < s.n) ahead_[i].y = from[1];
          if (at.row + 2 < s.n) ahead_[i].z = from[2];
          if (at.row + 3 < s.n) ahead_[i].w = from[3];
        }
      }
    } else if (s.output == Q4GemmOutput::kRopeKv) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Q4SinkPlace at = where(i);
        if (at.token < 0 || at.row >= s.n) continue;
        const int position = s.position[at.token];
        cache_[i] = (s.sequence[at.token] * s.ctx + position) * (s.kv_heads * s.head_dim);
        if (at.row >= s.rotated) continue;
        const float4* turn =
            reinterpret_cast<const float4*>(s.table + int64_t(position) * s.head_dim + pair(s, at.row) * 2);
        ahead_[2 * i] = turn[0], ahead_[2 * i + 1] = turn[1];
      }
    }
  }
  // load(i, upper) -> float4 of rows row.. or row + 8..
  template <class Where, class Load>
  __device__ void finish(const Q4GemmSink& s, const Where& where, const Load& load) const {
    if (s.output == Q4GemmOutput::kStore) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Q4SinkPlace at = where(i);
        if (at.token < 0 || at.row >= s.n) continue;
        float4 v = load(i, 0);
        if (s.residual) v.x += ahead_[i].x, v.y += ahead_[i].y, v.z += ahead_[i].z, v.w += ahead_[i].w;
        sink_store4(s.y, s.y_half, at.token * s.y_pitch + at.row, s.n - at.row, v);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Q4SinkPlace at = where(i);
      if (at.token < 0) continue;
      if (s.output == Q4GemmOutput::kSwiglu) {
        const int column = at.row / 16 * 8 + at.row % 16;
        if (column >= s.n / 2) continue;
        const float4 a = load(i, 0), b = load(i, 1);
        sink_store4(s.y, s.y_half, at.token * s.y_pitch + column, s.n / 2 - column,
                    make_float4(silu(a.x) * b.x, silu(a.y) * b.y, silu(a.z) * b.z, silu(a.w) * b.w));
      } else if (at.row < s.n) {
        rotate(s, at, i, load(i, 0), load(i, 1));
      }
    }
  }

 private:
  static __device__ int pair(const Q4GemmSink& s, int row) {
    return (row % s.head_dim - row % 16) / 2 + row % 16;
  }
  __device__ void rotate(const Q4GemmSink& s, Q4SinkPlace at, int i, float4 a, float4 b) const {
    if (at.row >= s.rotated) {
      const int64_t to = cache_[i] + at.row - s.rotated;
      sink_store4(s.v, s.kv_half, to, 4, a);
      sink_store4(s.v, s.kv_half, to + 8, 4, b);
      return;
    }
    const float4 t = ahead_[2 * i], u = ahead_[2 * i + 1];  // cos, sin, cos, sin
    const float4 low = {a.x * t.x - b.x * t.y, a.y * t.z - b.y * t.w, a.z * u.x - b.z * u.y,
                        a.w * u.z - b.w * u.w};
    const float4 high = {a.x * t.y + b.x * t.x, a.y * t.w + b.y * t.z, a.z * u.y + b.z * u.x,
                         a.w * u.w + b.w * u.z};
    const int head = at.row / s.head_dim;
    const bool query = head < s.heads;
    void* to = query ? s.y : s.k;
    const bool half = query ? s.y_half : s.kv_half;
    const int64_t first =
        (query ? at.token * s.y_pitch + head * s.head_dim : cache_[i] + (head - s.heads) * s.head_dim) +
        pair(s, at.row);
    sink_store4(to, half, first, 4, low);
    sink_store4(to, half, first + s.head_dim / 2, 4, high);
  }

  float4 ahead_[4];
  int64_t cache_[2];
};

}  // namespace q4s
