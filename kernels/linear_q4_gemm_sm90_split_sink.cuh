// The epilogues of linear_q4_gemm_sm90_split.cu: sums of 16 rows x 8 tokens, as an mma leaves them in a warp,
// to their place. In few instructions: every one is issued once for each eight tokens of each warp, and at
// the end of a short product that is what the multiprocessor is busy with.
#pragma once
#include "kernels/linear_q4_gemm_sm90_drain.cuh"

namespace q4s {

// Host: whether a warp's rows are all there, of the common types and in pairs of fp16; what is not goes
// through sink_tile().
inline bool q4_split_plain(const Q4GemmSink& s) {
  const auto pairs = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; };
  if (s.y_pitch >= 1 << 28 || s.n >= 1 << 28) return false;
  switch (s.output) {
    case Q4GemmOutput::kStore: return !s.y_half && s.n % kQ4TileRows == 0;
    case Q4GemmOutput::kSwiglu: return s.y_half && s.n % kQ4TileRows == 0 && s.y_pitch % 2 == 0 && pairs(s.y);
    case Q4GemmOutput::kRopeKv:
      return s.y_half && s.kv_half && s.y_pitch % 2 == 0 && pairs(s.y) && pairs(s.k) && pairs(s.v);
  }
  return false;
}

#if Q4S_SM90A

// A warp's rows, always the same. A lane (g = lane / 4, t = lane % 4) gets sums of (row g, token 2t), (g,
// 2t+1), (g+8, 2t), (g+8, 2t+1). places: (position, row of the cache) of the eight tokens, in shared memory.
template <Q4GemmOutput kOutput>
class Q4SplitSink {
  static constexpr bool kStore = kOutput == Q4GemmOutput::kStore, kRope = kOutput == Q4GemmOutput::kRopeKv;

 public:
  // pair: in the half of a head, of the first row.
  __device__ Q4SplitSink(const Q4GemmSink& s, int tile, int pair, int lane)
      : tokens_(s.tokens),
        first_(lane % 4 * 2),
        held_(kStore ? first_ : lane / 4),
        turned_(false),
        query_(false) {
    const int row = tile * kQ4TileRows;
    if constexpr (kStore) {
      to_ = static_cast<char*>(s.y) + (row + lane / 4) * 4;
      pitch_ = int(s.y_pitch) * 4;
      from_ = s.residual ? reinterpret_cast<const char*>(s.residual + row + lane / 4) : nullptr;
      from_pitch_ = s.n * 4;
    } else if constexpr (kRope) {
      const int queries = s.heads * s.head_dim;
      turned_ = row < s.rotated, query_ = row < queries;
      const int column = turned_ ? row - pair - (query_ ? 0 : queries) : row - s.rotated;
      to_ = static_cast<char*>(query_ ? s.y : turned_ ? s.k : s.v) + (column + first_) * 2;
      high_ = to_ + (turned_ ? s.head_dim : 16);
      pitch_ = (query_ ? int(s.y_pitch) : s.kv_heads * s.head_dim) * 2;
      from_ = turned_ ? reinterpret_cast<const char*>(s.table + (pair + lane / 4) * 2) : nullptr;
      from_pitch_ = s.head_dim * 4;
    } else {
      to_ = static_cast<char*>(s.y) + (tile * 8 + first_) * 2;
      pitch_ = int(s.y_pitch) * 2;
    }
  }
  // What comes with the sums: the residual in their order, or the first token's cosine and sine and the
  // other's.
  __device__ float4 fetch(int token0, uint32_t places) const {
    float4 v = {};
    if (kOutput == Q4GemmOutput::kSwiglu || !from_) return v;
    if constexpr (kStore) {
      const int token = token0 + first_;
      const char* const at = from_ + int64_t(token) * from_pitch_;
      if (token < tokens_) v.x = value(at)[0], v.z = value(at)[8];
      if (token + 1 < tokens_) v.y = value(at + from_pitch_)[0], v.w = value(at + from_pitch_)[8];
    } else {
      const uint4 two = hopper::load_shared(places + first_ * 8);
      const float2 a = *reinterpret_cast<const float2*>(from_ + int64_t(int(two.x)) * from_pitch_);
      const float2 b = *reinterpret_cast<const float2*>(from_ + int64_t(int(two.z)) * from_pitch_);
      v = {a.x, a.y, b.x, b.y};
    }
    return v;
  }
  __device__ void finish(int token0, uint32_t places, const float4& with, const float4& sum) const {
    const int token = token0 + held_;
    if constexpr (kStore) {
      char* const at = to_ + int64_t(token) * pitch_;
      if (token < tokens_) value(at)[0] = sum.x + with.x, value(at)[8] = sum.z + with.z;
      if (token + 1 < tokens_) value(at + pitch_)[0] = sum.y + with.y, value(at + pitch_)[8] = sum.w + with.w;
    } else if constexpr (kRope) {
      float4 v = sum;
      if (turned_)
        v = {sum.x * with.x - sum.z * with.y, sum.y * with.z - sum.w * with.w,
             sum.x * with.y + sum.z * with.x, sum.y * with.w + sum.w * with.z};
      // Two rows of one token in a lane.
      const uint32_t low = transpose_8x8(q4_pack_saturated(v.x, v.y)),
                     high = transpose_8x8(q4_pack_saturated(v.z, v.w));
      const int at = query_ ? token : int(load_shared_4(places + held_ * 8 + 4));
      if (token >= tokens_) return;
      *reinterpret_cast<uint32_t*>(to_ + int64_t(at) * pitch_) = low;
      *reinterpret_cast<uint32_t*>(high_ + int64_t(at) * pitch_) = high;
    } else {
      const uint32_t v = transpose_8x8(q4_pack_saturated(silu(sum.x) * sum.z, silu(sum.y) * sum.w));
      if (token < tokens_) *reinterpret_cast<uint32_t*>(to_ + int64_t(token) * pitch_) = v;
    }
  }

 private:
  static __device__ float* value(char* p) { return reinterpret_cast<float*>(p); }
  static __device__ const float* value(const char* p) { return reinterpret_cast<const float*>(p); }

  char *to_, *high_ = nullptr;
  const char* from_ = nullptr;
  int pitch_, from_pitch_ = 0;  // bytes
  int tokens_, first_, held_;   // held_: token of what a lane stores
  bool turned_, query_;
};

#endif  // Q4S_SM90A

}  // namespace q4s
