// The epilogues of linear_q4_gemm_sm90_few.cu: sums of 16 rows x 8 tokens, as an mma leaves them in a warp,
// to their place. What comes from memory for them is fetched, and where they go is found, before they exist.
#pragma once
#include "kernels/linear_q4_gemm_epilogue.cuh"

namespace q4s {

// kPieces tiles of 16 rows, always of the same 8 tokens. A lane (g = lane / 4, t = lane % 4) holds (row g,
// token 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
template <int kPieces>
class Q4FewSink {
 public:
  __device__ Q4FewSink(const Q4GemmSink& s, int lane, int token0)
      : g_(lane / 4), token_(token0 + lane % 4 * 2) {
    if (s.output != Q4GemmOutput::kRopeKv) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (token_ + e >= s.tokens) continue;
      position_[e] = s.position[token_ + e];
      cache_[e] = (s.sequence[token_ + e] * s.ctx + position_[e]) * (s.kv_heads * s.head_dim);
    }
  }
  // tile(i) -> the i-th tile of rows, < 0: none
  template <class At>
  __device__ void fetch(const Q4GemmSink& s, const At& tile) {
    if (s.output == Q4GemmOutput::kSwiglu || (s.output == Q4GemmOutput::kStore && !s.residual)) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int first = tile(i) * kQ4TileRows, row = first + g_;
      if (tile(i) < 0 || row >= s.n) continue;
      int pair = 0;  // of a rotation
      if (s.output == Q4GemmOutput::kRopeKv) {
        to_[i] = Place{kValue, first - s.rotated + g_};
        if (first < s.rotated) {
          const int head = first / s.head_dim;
          pair = (first - head * s.head_dim) / 2 + g_;
          to_[i] = head < s.heads ? Place{kQuery, head * s.head_dim + pair}
                                  : Place{kKey, (head - s.heads) * s.head_dim + pair};
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (token_ + e >= s.tokens) continue;
        if (s.output == Q4GemmOutput::kStore) {
          const float* from = s.residual + int64_t(token_ + e) * s.n + row;
          ahead_[i][e] = from[0];
          if (row + 8 < s.n) ahead_[i][2 + e] = from[8];
        } else if (first < s.rotated) {
          const float2 turn =
              *reinterpret_cast<const float2*>(s.table + int64_t(position_[e]) * s.head_dim + pair * 2);
          ahead_[i][2 * e] = turn.x, ahead_[i][2 * e + 1] = turn.y;
        }
      }
    }
  }
  template <class At>
  __device__ void finish(const Q4GemmSink& s, const At& tile, const float4 (&sum)[kPieces]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (tile(i) < 0) continue;
      const int row = tile(i) * kQ4TileRows + g_;
      const float low[2] = {sum[i].x, sum[i].y}, high[2] = {sum[i].z, sum[i].w};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = token_ + e;
        if (token >= s.tokens) continue;
        if (s.output == Q4GemmOutput::kStore) {
          const int64_t to = token * s.y_pitch + row;
          if (row < s.n) sink_store(s.y, s.y_half, to, s.residual ? low[e] + ahead_[i][e] : low[e]);
          if (row + 8 < s.n)
            sink_store(s.y, s.y_half, to + 8, s.residual ? high[e] + ahead_[i][2 + e] : high[e]);
        } else if (s.output == Q4GemmOutput::kSwiglu) {
          const int column = tile(i) * 8 + g_;
          if (column < s.n / 2) sink_store(s.y, s.y_half, token * s.y_pitch + column, silu(low[e]) * high[e]);
        } else if (row < s.n) {
          const float cosine = ahead_[i][2 * e], sine = ahead_[i][2 * e + 1];
          const bool value = to_[i].where == kValue, query = to_[i].where == kQuery;
          const int64_t to = (query ? token * s.y_pitch : cache_[e]) + to_[i].at;
          void* const p = query ? s.y : value ? s.v : s.k;
          const bool half = query ? s.y_half : s.kv_half;
          sink_store(p, half, to, value ? low[e] : low[e] * cosine - high[e] * sine);
          sink_store(p, half, to + (value ? 8 : s.head_dim / 2),
                     value ? high[e] : low[e] * sine + high[e] * cosine);
        }
      }
    }
  }

 private:
  enum Where { kQuery, kKey, kValue };
  struct Place {
    Where where;
    int at;  // of row g, from where the token's are
  };
  int g_, token_, position_[2] = {};
  int64_t cache_[2] = {};
  float ahead_[kPieces][4];
  Place to_[kPieces];
};

}  // namespace q4s
