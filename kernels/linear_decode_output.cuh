// What becomes of the sums of linear_decode: residual, silu(gate) * up, or rotation and cache. Device code.
#pragma once
#include "kernels/linear_decode_stage.cuh"

namespace q4s {

// Rows r and r+8 of a tile row, for one token: what one thread finishes. The constructor and prepare() load
// what the epilogue needs long before the sums are there: residual or position, then by position cos and sin.
// Until then it is kept in shared memory, as a float3.
template <int kTokens>
struct OutputPair {
  int tile_row, r, token;
  bool active;
  float low = 0, high = 0;  // residual; or cos, sin
  int position = 0;

  // Item i of a round that starts at tile row `first` and has `count` of them. early: what has been loaded,
  // or null.
  __device__ OutputPair(const LinearDecodeParams& p, int i, int first, int count,
                        const float3* early = nullptr)
      : tile_row(first + i / 8 / (kTokens == 1 ? 1 : p.tokens)),
        r(i % 8),
        token(kTokens == 1 ? 0 : i / 8 % p.tokens),
        active(i < 8 * count * p.tokens) {
    if (!active) return;
    if (early) {
      low = early->x, high = early->y, position = __float_as_int(early->z);
      return;
    }
    const int row = tile_row * kQ4TileRows + r;
    if (p.epilogue == Epilogue::kNone && p.residual) {
      const float* from = p.residual + int64_t(token) * p.n;
      if (row < p.n) low = __ldcg(from + row);
      if (row + 8 < p.n) high = __ldcg(from + row + 8);
    }
    if (p.epilogue == Epilogue::kRopeKv) position = __ldcg(p.position + token);
  }
  __device__ void prepare(const LinearDecodeParams& p) {
    const int row = tile_row * kQ4TileRows + r;
    if (!active || p.epilogue != Epilogue::kRopeKv || row >= (p.heads + p.kv_heads) * p.head_dim) return;
    const int i = row % p.head_dim / 16 * 8 + r;
    const float2 turn = *reinterpret_cast<const float2*>(p.table + int64_t(position) * p.head_dim + 2 * i);
    low = turn.x;
    high = turn.y;
  }

  __device__ float3 early() const { return make_float3(low, high, __int_as_float(position)); }

  __device__ void finish(const LinearDecodeParams& p, float a, float b) const {
    const int row = tile_row * kQ4TileRows + r;
    if (p.epilogue == Epilogue::kNone) {
      float* to = p.y + int64_t(token) * p.n;
      if (row < p.n) to[row] = a + low;
      if (row + 8 < p.n) to[row + 8] = b + high;
    } else if (p.epilogue == Epilogue::kSwiglu) {
      const int hidden = p.n / 2, i = tile_row * 8 + r;
      const float product = __fdividef(a, 1 + __expf(-a)) * b;
      if (i < hidden) p.y[int64_t(token) * hidden + i] = product;
    } else {
      rotate_and_store(p, row, a, b);
    }
  }

 private:
  __device__ void rotate_and_store(const LinearDecodeParams& p, int row, float a, float b) const {
    const int q_rows = p.heads * p.head_dim, k_rows = p.kv_heads * p.head_dim;
    int first = row, step = 8;  // rows of the file: first, first + step
    float u = a, v = b;
    if (row < q_rows + k_rows) {
      step = p.head_dim / 2;
      first = row / p.head_dim * p.head_dim + row % p.head_dim / 16 * 8 + r;
      u = a * low - b * high;
      v = a * high + b * low;
    }
    if (row < q_rows) {
      p.y[int64_t(token) * q_rows + first] = u;
      p.y[int64_t(token) * q_rows + first + step] = v;
      return;
    }
    const bool is_k = row < q_rows + k_rows;
    void* cache = is_k ? p.kv.k : p.kv.v;
    const int64_t at =
        (__ldcg(p.sequence + token) * p.kv.ctx + position) * k_rows + first - q_rows - (is_k ? 0 : k_rows);
    if (p.kv.type == KvType::kF16) {
      static_cast<__half*>(cache)[at] = __float2half_rn(u);
      static_cast<__half*>(cache)[at + step] = __float2half_rn(v);
    } else {
      static_cast<float*>(cache)[at] = u;
      static_cast<float*>(cache)[at + step] = v;
    }
  }
};

}  // namespace q4s
