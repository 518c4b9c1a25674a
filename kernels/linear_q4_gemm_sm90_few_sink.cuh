// The epilogues of linear_q4_gemm_sm90_few.cu: sums of 16 rows x 8 tokens, as an mma leaves them in a warp,
// to their place. What comes from memory for them is fetched, and where they go is found, before they exist.
#pragma once
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_sm90_few_multiply.cuh"

namespace q4s {

// Q4GemmHandover of a product, null pointers where it has none.
struct Q4FewHandover {
  const float *gain, *guess;  // as a maker
  __half* x;
  float* squares;
  const float *read_squares, *read_guess;  // as a reader
  float* next_guess;
  int read_tiles;
  float inverse_k, eps;
};
inline Q4FewHandover q4_few_handover(const Q4GemmArgs& a) {
  Q4FewHandover h = {};
  if (const Q4GemmHandover* m = a.makes)
    h.gain = m->gain, h.guess = m->guess, h.x = reinterpret_cast<__half*>(m->x), h.squares = m->squares;
  if (const Q4GemmHandover* r = a.reads)
    h.read_squares = r->squares, h.read_guess = r->guess, h.next_guess = r->next_guess,
    h.read_tiles = int(a.w.k / kQ4TileRows), h.inverse_k = 1.f / float(a.w.k), h.eps = r->eps;
  return h;
}

// Tiles of 16 rows, one at a time and always of the same 8 tokens. A lane (g = lane / 4, t = lane % 4) holds
// (row g, token 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). Short code: it runs a few times in a kernel, and
// comes from far.
template <Q4GemmOutput kOutput>
class Q4FewSink {
  static constexpr bool kStore = kOutput == Q4GemmOutput::kStore, kRope = kOutput == Q4GemmOutput::kRopeKv;

 public:
  struct Ahead {
    float v[4], gain[2];  // the residual, or cosine and sine of two tokens; of a maker of the stream
  };

  // By one warp, before any constructs one of these: what all have in common, of 8 tokens from token0 on.
  // writes: in one block of all of these tokens, which does what is done once.
  __device__ static void prepare(const Q4GemmSink& s, const Q4FewHandover& h, Q4FewState& state, int lane,
                                 int token0, bool writes) {
    const int token = token0 + lane;
    if (kRope && lane < 8 && token < s.tokens)
      state.position[lane] = s.position[token], state.sequence[lane] = s.sequence[token];
    if (h.read_squares) find_factor(h, state, lane, token0, writes);
    if (kStore && h.gain && lane < 8) state.factor[lane] = __ldcg(h.guess + token);
  }
  __device__ Q4FewSink(const Q4GemmSink& s, const Q4FewState& state, int lane, int token0)
      : g_(lane / 4), token_(token0 + lane % 4 * 2) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = lane % 4 * 2 + e;
      factor_[e] = state.factor[i];
      if (!kRope || token_ + e >= s.tokens) continue;
      position_[e] = state.position[i];
      cache_[e] = (state.sequence[i] * s.ctx + position_[e]) * (s.kv_heads * s.head_dim);
    }
  }
  // What a tile needs beside its sums.
  __device__ Ahead fetch(const Q4GemmSink& s, const Q4FewHandover& h, int tile) const {
    Ahead a = {};
    const int first = tile * kQ4TileRows, row = first + g_;
    if ((!kStore && !kRope) || row >= s.n) return a;
    if (kStore && h.gain) a.gain[0] = h.gain[row], a.gain[1] = h.gain[row + 8];
    if (kStore ? !s.residual : first >= s.rotated) return a;
    const int pair = kRope ? first % s.head_dim / 2 + g_ : 0;  // of a rotation
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (token_ + e >= s.tokens) continue;
      if constexpr (kStore) {
        const float* from = s.residual + ((token_ + e) * s.n + row);
        a.v[e] = from[0];
        if (row + 8 < s.n) a.v[2 + e] = from[8];
      } else {
        const float2 turn =
            *reinterpret_cast<const float2*>(s.table + (position_[e] * s.head_dim + pair * 2));
        a.v[2 * e] = turn.x, a.v[2 * e + 1] = turn.y;
      }
    }
    return a;
  }
  // By all lanes.
  __device__ void finish(const Q4GemmSink& s, const Q4FewHandover& h, int tile, const Ahead& a,
                         const float4& sum) const {
    const int first = tile * kQ4TileRows, row = first + g_;
    float low[2] = {sum.x, sum.y}, high[2] = {sum.z, sum.w}, squares[2] = {};
    const int head = kRope ? first / s.head_dim : 0;
    const bool value = kRope && first >= s.rotated, query = head < s.heads;
    // Of row g and the row it meets, from where the token's are.
    const int at =
        value ? row - s.rotated : row - (first - head * s.head_dim) / 2 - (query ? 0 : s.heads * s.head_dim);
    const int further = value ? 8 : s.head_dim / 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = token_ + e;
      if (token >= s.tokens) continue;
      if (h.read_squares) low[e] *= factor_[e], high[e] *= factor_[e];
      if constexpr (kStore) {
        const int to = token * int(s.y_pitch) + row;
        low[e] += a.v[e], high[e] += a.v[2 + e];
        if (row < s.n) sink_store(s.y, s.y_half, to, low[e]);
        if (row + 8 < s.n) sink_store(s.y, s.y_half, to + 8, high[e]);
        if (h.gain) {
          __half* const x = h.x + (token * s.n + row);
          x[0] = saturated_half(low[e] * (a.gain[0] * factor_[e]));
          x[8] = saturated_half(high[e] * (a.gain[1] * factor_[e]));
          squares[e] = low[e] * low[e] + high[e] * high[e];
        }
      } else if constexpr (!kRope) {
        const int column = tile * 8 + g_;
        if (column < s.n / 2)
          sink_store(s.y, s.y_half, token * int(s.y_pitch) + column, silu(low[e]) * high[e]);
      } else if (row < s.n) {
        const float cosine = a.v[2 * e], sine = a.v[2 * e + 1];
        const int64_t to = (query ? token * int(s.y_pitch) : cache_[e]) + at;
        void* const p = query ? s.y : value ? s.v : s.k;
        const bool half = query ? s.y_half : s.kv_half;
        sink_store(p, half, to, value ? low[e] : low[e] * cosine - high[e] * sine);
        sink_store(p, half, to + further, value ? high[e] : low[e] * sine + high[e] * cosine);
      }
    }
    if (kStore && h.gain) {
      add_rows(squares);
      if (g_ == 0)
        *reinterpret_cast<float2*>(h.squares + tile * kQ4GemmFewTokens + token_) =
            make_float2(squares[0], squares[1]);
    }
  }

 private:
  // Sums over g, the same in all lanes of a token.
  __device__ static void add_rows(float (&v)[2]) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) v[e] += __shfl_xor_sync(0xffffffffu, v[e], offset);
  }
  // What the sums of each token are to be multiplied by. Its loads go together, since each waits behind all
  // the weights that are on their way.
  __device__ static void find_factor(const Q4FewHandover& h, Q4FewState& state, int lane, int token0,
                                     bool writes) {
    float sum[2] = {};
    const float2* const from = reinterpret_cast<const float2*>(h.read_squares + token0 + lane % 4 * 2);
#pragma unroll 16
    for (int tile = lane / 4; tile < h.read_tiles; tile += 8) {
      const float2 v = __ldcg(from + tile * (kQ4GemmFewTokens / 2));
      sum[0] += v.x, sum[1] += v.y;
    }
    add_rows(sum);
    if (lane >= 8) return;
    const int i = lane % 4 * 2 + lane / 4;
    // A stream that is not finite stays so, though its fp16 values are clamped.
    const float mean = (lane / 4 ? sum[1] : sum[0]) * h.inverse_k,
                factor = mean < INFINITY ? 1.f / sqrtf(mean + h.eps) : NAN;
    state.factor[i] = factor / __ldcg(h.read_guess + token0 + i);
    if (writes) h.next_guess[token0 + i] = factor * kQ4GemmHeadroom;
  }

  int g_, token_, position_[2] = {};
  int64_t cache_[2] = {};
  float factor_[2] = {};  // of a reader: to correct its sums; of a maker: the guess
};

}  // namespace q4s
