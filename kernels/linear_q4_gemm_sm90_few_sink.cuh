// The epilogues of linear_q4_gemm_sm90_few.cu: sums of 16 rows x 8 tokens, as an mma leaves them in a warp,
// to their place, and to the next product of the chain. What comes from memory for them is fetched long
// before.
#pragma once
#include "kernels/linear_q4_gemm_sm90_few_load.cuh"

namespace q4s {

#if Q4S_SM90A

// Tiles of 16 rows, always of the same 8 tokens. A lane (g = lane / 4, t = lane % 4) holds (row g, token 2t),
// (g, 2t+1), (g+8, 2t), (g+8, 2t+1). Short code: it runs a few times in a kernel, and comes from far.
struct Q4FewSink {
  const Q4FewProduct& a;
  const Q4FewState& state;
  int lane, token0;  // of the block
  int g = lane / 4, in_block = lane % 4 * 2;

  struct Ahead {
    float v[4], gain[2];  // the residual, or cosine and sine of two tokens; of the next product's norm
  };
  // Each value is loaded to where it stays: a move would wait for it.
  __device__ Ahead fetch(int tile) const {
    const Q4GemmSink& s = a.sink;
    Ahead ahead = {};
    const int first = tile * kQ4TileRows, row = first + g;
    const bool store = s.output == Q4GemmOutput::kStore;
    const bool gains = store && a.gain, reads = store ? s.residual != nullptr : first < s.rotated;
    if (gains) ahead.gain[0] = a.gain[row];
    if (gains) ahead.gain[1] = a.gain[row + 8];
    const int pair = store ? 0 : first % s.head_dim / 2 + g;  // of a rotation
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = token0 + in_block + e;
      const bool there = reads && token < s.tokens;
      const float* const from =
          store ? s.residual + (token * s.n + row)
                : s.table + ((there ? state.position[in_block + e] : 0) * s.head_dim + pair * 2);
      if (there && row < s.n) ahead.v[2 * e] = from[0];
      if (there && (store ? row + 8 < s.n : row < s.n)) ahead.v[2 * e + 1] = from[store ? 8 : 1];
    }
    return ahead;
  }
  // By all lanes. i: which product it is; set: of the exchange.
  __device__ void finish(int i, std::byte* set, int tile, const Ahead& ahead, const float4& sum) const {
    const Q4GemmSink& s = a.sink;
    const int first = tile * kQ4TileRows, row = first + g;
    float low[2] = {sum.x, sum.y}, high[2] = {sum.z, sum.w};
    if (a.normalises)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        low[e] *= state.factor[i][in_block + e], high[e] *= state.factor[i][in_block + e];
    if (s.output == Q4GemmOutput::kStore) {
      uint32_t halves[2];
      float squares[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        low[e] += ahead.v[2 * e], high[e] += ahead.v[2 * e + 1];
        const float guess = state.guess[i][in_block + e];
        const bool there = token0 + in_block + e < s.tokens;
        halves[e] = there ? pair_of(low[e] * (ahead.gain[0] * guess), high[e] * (ahead.gain[1] * guess)) : 0;
        squares[e] = there ? low[e] * low[e] + high[e] * high[e] : 0;
      }
      if (a.makes) {
        const uint2 rows = neighbours(halves);
        store_made(set + a.next_x_at + int64_t(tile) * kQ4FewStepBytes + place(),
                   __byte_perm(rows.x, rows.y, 0x5410), __byte_perm(rows.x, rows.y, 0x7632));
        q4_few_add_rows(squares);
        if (g == 0)
          store_made(set + a.next_squares_at + (tile * kQ4FewTokens + token0 + in_block) * 4,
                     __float_as_uint(squares[0]), __float_as_uint(squares[1]));
      }
    } else if (s.output == Q4GemmOutput::kSwiglu) {
      uint32_t halves[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        low[e] = silu(low[e]) * high[e];
        halves[e] = token0 + in_block + e < s.tokens ? pair_of(low[e], 0) : 0;
      }
      if (a.makes) {
        const uint2 rows = neighbours(halves);
        store_made(set + a.next_x_at + int64_t(tile / 2) * kQ4FewStepBytes + place() + tile % 2 * 4,
                   __byte_perm(rows.x, rows.y, 0x5410));
      }
    }
    if (!s.y) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = token0 + in_block + e;
      if (token >= s.tokens) continue;
      if (s.output == Q4GemmOutput::kStore) {
        const int to = token * int(s.y_pitch) + row;
        if (row < s.n) sink_store(s.y, s.y_half, to, low[e]);
        if (row + 8 < s.n) sink_store(s.y, s.y_half, to + 8, high[e]);
      } else if (s.output == Q4GemmOutput::kSwiglu) {
        const int column = tile * 8 + g;
        if (column < s.n / 2) sink_store(s.y, s.y_half, token * int(s.y_pitch) + column, low[e]);
      } else if (row < s.n) {
        rotate(token, e, first, row, ahead, low[e], high[e]);
      }
    }
  }

 private:
  __device__ static uint32_t pair_of(float low, float high) {
    const __half2 h = __halves2half2(saturated_half(low), saturated_half(high));
    return reinterpret_cast<const uint32_t&>(h);
  }
  // Of one token, the token that this lane stores, what rows g & ~1 and g | 1 have; v: of its own row, both
  // tokens.
  __device__ uint2 neighbours(const uint32_t (&v)[2]) const {
    const bool odd = g & 1;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 4);
    return odd ? make_uint2(got, v[1]) : make_uint2(v[0], got);
  }
  // Of that token and those rows, in 16 columns of activations.
  __device__ int place() const { return ((in_block + g % 2) * 4 + g / 2) * 16 + token0; }

  __device__ void rotate(int token, int e, int first, int row, const Ahead& ahead, float low,
                         float high) const {
    const Q4GemmSink& s = a.sink;
    const int head = first / s.head_dim;
    const bool value = first >= s.rotated, query = head < s.heads;
    // Of row g and the row it meets, from where the token's are.
    const int at =
        value ? row - s.rotated : row - (first - head * s.head_dim) / 2 - (query ? 0 : s.heads * s.head_dim);
    const int further = value ? 8 : s.head_dim / 2;
    const int64_t cache =
        (state.sequence[in_block + e] * s.ctx + state.position[in_block + e]) * (s.kv_heads * s.head_dim);
    const float cosine = ahead.v[2 * e], sine = ahead.v[2 * e + 1];
    const int64_t to = (query ? token * int(s.y_pitch) : cache) + at;
    void* const p = query ? s.y : value ? s.v : s.k;
    const bool half = query ? s.y_half : s.kv_half;
    sink_store(p, half, to, value ? low : low * cosine - high * sine);
    sink_store(p, half, to + further, value ? high : low * sine + high * cosine);
  }
};

#endif  // Q4S_SM90A

}  // namespace q4s
