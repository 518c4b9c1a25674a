// The warps of linear_decode that add up rows, for blocks in pairs: each block of a cluster of two has the
// sums of two tile rows over half of the columns, sends the other those of one, and adds what it gets to
// those of the other, which it finishes. Device code.
#pragma once
#include "kernels/hopper.cuh"
#include "kernels/linear_decode_output.cuh"

namespace q4s {

#if Q4S_SM90A

// Sum of the warps that had units of a row, in an order that their number decides. from: of the first of
// them; step: floats from one to the next.
__device__ inline float4 linear_decode_add_up(const float* from, int step, int warps) {
  float4 sum[2] = {};
#pragma unroll
  for (int s = 0; s < kDecodePairWarps; ++s)
    if (s < warps) {
      const float4 v = *reinterpret_cast<const float4*>(from + s * step);
      float4& to = sum[s % 2];
      to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w;
    }
  return make_float4(sum[0].x + sum[1].x, sum[0].y + sum[1].y, sum[0].z + sum[1].z, sum[0].w + sum[1].w);
}

// Warp `j` of the reducers: rows j, j + kDecodeReducers ... of a pair.
template <int kTokens, class Params>
__device__ void linear_decode_reduce_pair(const Params& p, const LinearDecodeRing& ring,
                                          const DecodeSumPlaces& at, float* inbox, uint32_t first, int j,
                                          int lane) {
  static_assert(kTokens == 8, "four rows of one of eight tokens a lane");
  constexpr int kRow = kQ4TileRows;
  const int tokens = p.tokens, rank = linear_decode_rank<true>(), other = rank ^ 1;
  const int row_sums = tokens * kRow;  // of a tile row
  // A lane adds four rows of one token; and finishes rows r and r + 8 of tokens `mine` and mine + 4.
  const int token = lane / 4, four = lane % 4 * 4, r = lane / 4, mine = lane % 4;
  const bool one = token < tokens;
  float* const own = at.partial + j * kDecodePairWarps * kDecodePair * row_sums;
  inbox += j * linear_decode_inbox(tokens);
  const uint32_t to = hopper::remote_address(shared_address(inbox), other);
  const uint32_t to_full = hopper::remote_address(ring.inbox_full(j), other);
  uint32_t parity = 0;  // of the meeting
  uint32_t sent = 0;    // rows so far, modulo 2
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const LinearDecodeProduct& a = p.product[i];
    const LinearDecodePart& cut = a.part;
    const LinearDecodeRows<true> rows(cut, i);
#pragma unroll 1
    for (int phase = 0; phase < cut.phases; ++phase) {
      const bool last = phase == cut.phases - 1;
      const int piece = rank * cut.phases + phase;
      const int warps = min(kDecodePairWarps, cut.piece_begin(piece + 1) - cut.piece_begin(piece));
      bool norm = a.gain && last;  // still to be made
      if (rows.rows > 0) {
        // One that has no row must not be ahead of the others, and arrive twice.
        warps_sync<4, kDecodeReducers * 32>();
        warps_arrive<kDecodeDone, kDecodeReaders>();
      }
#pragma unroll 1
      for (int row = j; row < rows.rows; row += kDecodeReducers) {
        const int tile_row = rows.tile_row(row) + rank;
        DecodeOutput output[kTokens / 4];
        if (last) {
#pragma unroll
          for (int t = 0; t < kTokens / 4; ++t)
            if (mine + 4 * t < tokens) output[t].load(a, tile_row, r, mine + 4 * t);
          if (lane == 0)
            hopper::barrier_arrive_expect(ring.inbox_full(j), (row_sums + (norm ? tokens : 0)) * 4);
        }
        __syncwarp();
        mbarrier_wait(ring.sums_full(j), parity);
        parity ^= 1;
        float4 sum;
#pragma unroll
        for (int h = 0; h < kDecodePair; ++h) {  // the other's tile row, the own one
          const int tile = h ? rank : other;
          if (one) {
            sum = linear_decode_add_up(own + (tile * tokens + token) * kRow + four, kDecodePair * row_sums,
                                       warps);
            float4& so_far = *reinterpret_cast<float4*>(
                at.sums + ((row * kDecodePair + h) * tokens + token) * kRow + four);
            if (phase > 0) sum.x += so_far.x, sum.y += so_far.y, sum.z += so_far.z, sum.w += so_far.w;
            if (!last) so_far = sum;
          }
          if (h > 0 || !last) continue;
          mbarrier_wait(ring.sent_read(j), sent ^ 1);
          if (one) hopper::store_async(to + (token * kRow + four) * 4, sum, to_full);
        }
        mbarrier_arrive(ring.sums_empty(j));
        if (!last) continue;
        float square = 0;
        if (norm) {
          square = linear_decode_squares<kTokens>(at.squares, cut.piece_begin(rank * cut.phases),
                                                  cut.piece_begin((rank + 1) * cut.phases), tokens, lane);
          if (lane < tokens) hopper::store_async(to + (row_sums + lane) * 4, square, to_full);
        }
        mbarrier_wait(ring.inbox_full(j), sent);
        sent ^= 1;
        if (one) {
          float4& theirs = *reinterpret_cast<float4*>(inbox + token * kRow + four);
          theirs = make_float4(sum.x + theirs.x, sum.y + theirs.y, sum.z + theirs.z, sum.w + theirs.w);
        }
        if (norm && lane < tokens)
          at.norm[lane] = rsqrtf((square + inbox[row_sums + lane]) * a.inverse_k + a.eps);
        norm = false;
        __syncwarp();
        float low[kTokens / 4], high[kTokens / 4];
#pragma unroll
        for (int t = 0; t < kTokens / 4; ++t) {
          const int of = min(mine + 4 * t, tokens - 1);
          const float scale = a.gain ? at.norm[of] : 1.0f;
          low[t] = inbox[linear_decode_sum_at(of, r)] * scale;
          high[t] = inbox[linear_decode_sum_at(of, r + 8)] * scale;
        }
        __syncwarp();
        if (lane == 0) hopper::barrier_arrive_remote(ring.sent_read(j), uint32_t(other));
#pragma unroll
        for (int t = 0; t < kTokens / 4; ++t)
          output[t].finish(a, tile_row, r, mine + 4 * t, low[t], high[t], first + uint32_t(i),
                           mine + 4 * t < tokens && tile_row * kRow < a.n);
      }
    }
    if (i + 2 == p.count) pdl_trigger();
  }
}

#endif  // Q4S_SM90A

}  // namespace q4s
