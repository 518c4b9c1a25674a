// What a warp of linear_q4_gemm_sm90_few.cu makes of the units of K that lie in the ring.
#pragma once
#include "kernels/linear_q4_gemm_sm90_few.cuh"

namespace q4s {

#if Q4S_SM90A

// The codes of a word, the A fragment of 16 rows x 16 columns.
__device__ inline void q4_codes(uint32_t word, uint32_t (&a)[4]) {
  const uint32_t upper = word >> 8;
  a[0] = word & 0x000f000fu, a[1] = word & 0x00f000f0u, a[2] = upper & 0x000f000fu,
  a[3] = upper & 0x00f000f0u;
}

__device__ inline uint32_t q4_word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Where a warp is in the rings of weights and of activations.
struct Q4FewPlace {
  Q4FewCursor ring;
  int slot = 0;
  uint32_t slot_parity = 0;
};

// A warp's part of a band: tiles of rows 2 pair and 2 pair + 1, every `ways`-th unit of K.
struct Q4FewPart {
  int pairs, way, pair, count;  // count: of its tiles; 0: nothing to do
  __device__ Q4FewPart(int tiles, int ways, int warp)
      : pairs((tiles + 1) / 2), way(warp / pairs), pair(warp - way * pairs) {
    count = way < ways ? min(2, tiles - 2 * pair) : 0;
  }
};

// Sums of a warp's part over the `units` of a block: [tile][eight tokens].
template <bool kScaleSums>
__device__ void q4_few_multiply(const Q4FewShared& sh, const Q4FewParams& p, const Q4FewProduct& a, int units,
                                const Q4FewPart& part, int lane, Q4FewPlace& at, float (&acc)[2][2][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0;
  const int ways = a.ways, way = part.way;
  // The slots of activations are released by as many warps, whatever the band.
  const uint32_t weight = part.pair == 0 ? kQ4FewMultiply + 1 - part.pairs : 1;
  const Q4Operands& o = a.operands;
  const uint32_t words_at = held(sh.w(0) + way * a.w_bytes + part.pair * 2 * kQ4FewRowBytes + lane * 16);
  const uint32_t scales_at =
      held(sh.s(0, p.s_bytes) + way * a.s_bytes + part.pair * 2 * o.box_groups * 32 + lane / 4 * 2);
  const uint32_t x_at = held(sh.x(0) + lane * 16), offsets_at = held(sh.offsets(0) + lane % 4 * 16);
  Q4FewCursor ring = at.ring;
  int slot = at.slot + way;
  uint32_t slot_parity = at.slot_parity;
  if (slot >= kQ4FewXSlots) slot -= kQ4FewXSlots, slot_parity ^= 1;
  bool there = false, x_there = false;
#pragma unroll 1
  for (int unit = way; unit - way < units; unit += ways) {
    const int stage = ring.stage, from = slot;
    if (!there) hopper::barrier_wait(sh.full(stage), ring.parity);
    ring.next(p.stages);
    there = mbarrier_done(sh.full(ring.stage), ring.parity);  // the answer takes as long as a load
    if (unit < units && part.count > 0) {
      const uint32_t words = words_at + stage * kQ4FewWBytes, scales = scales_at + stage * p.s_bytes;
      uint4 loaded[2] = {hopper::load_shared(words), hopper::load_shared(words + kQ4FewRowBytes)};
      const auto scale_of = [&](int tile, int group, int half) {
        return __ushort_as_half(load_shared_2(scales + (tile * o.box_groups + group) * 32 + half * 16));
      };
      float sum[2][2][4], scale[2][2];
      Q4Fragment f[2];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        if constexpr (kScaleSums)
          scale[tile][0] = __half2float(scale_of(tile, 0, 0)) * (1 / kQ4FewLowCode),
          scale[tile][1] = __half2float(scale_of(tile, 0, 1)) * (1 / kQ4FewHighCode);
        else
          f[tile].set(scale_of(tile, 0, 0), scale_of(tile, 0, 1), o.half_grid);
      const uint32_t x = x_at + from * kQ4FewXBytes;
      if (!x_there) hopper::barrier_wait(sh.x_full(from), slot_parity);
      uint4 b = hopper::load_shared(x);
      uint4 offset[2];
      if constexpr (kScaleSums)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          offset[j] = hopper::load_shared(offsets_at + from * kQ4FewOffsetBytes + j * 64);
      if ((slot += ways) >= kQ4FewXSlots) slot -= kQ4FewXSlots, slot_parity ^= 1;
      x_there = mbarrier_done(sh.x_full(slot), slot_parity);
#pragma unroll
      for (int step = 0; step < kQ4FewUnitSteps; ++step) {
        const uint32_t word[2] = {q4_word(loaded[0], step % 4), q4_word(loaded[1], step % 4)};
        const uint32_t now[4] = {b.x, b.y, b.z, b.w};
        if (step + 1 < kQ4FewUnitSteps) b = hopper::load_shared(x + (step + 1) * kQ4FewStepBytes);
        if (step == 3)
          loaded[0] = hopper::load_shared(words + kQ4TileBytes),
          loaded[1] = hopper::load_shared(words + kQ4FewRowBytes + kQ4TileBytes);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          uint32_t w[4];
          if constexpr (kScaleSums) {
            q4_codes(word[tile], w);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              if (step == 0)
                sum[tile][j][0] = __uint_as_float(offset[j].x),
                sum[tile][j][1] = __uint_as_float(offset[j].y),
                sum[tile][j][2] = __uint_as_float(offset[j].z),
                sum[tile][j][3] = __uint_as_float(offset[j].w);
              mma_16816(sum[tile][j], w, now[2 * j], now[2 * j + 1]);
            }
          } else {
            if (step == 4 && o.fine > 0)
              f[tile].set(scale_of(tile, o.fine, 0), scale_of(tile, o.fine, 1), o.half_grid);
            if (step % 4 == 2 && o.fine > 1)
              f[tile].set(scale_of(tile, step / 4 * 2 + 1, 0), scale_of(tile, step / 4 * 2 + 1, 1),
                          o.half_grid);
            f[tile].unpack(word[tile], w);
#pragma unroll
            for (int j = 0; j < 2; ++j) mma_16816(acc[tile][j], w, now[2 * j], now[2 * j + 1]);
          }
        }
      }
      hopper::barrier_arrive(sh.x_empty(from), weight);  // every lane for what it read
      if constexpr (kScaleSums)
#pragma unroll
        for (int i = 0; i < 16; ++i)
          acc[i / 8][i / 4 % 2][i % 4] += scale[i / 8][i % 4 / 2] * sum[i / 8][i / 4 % 2][i % 4];
    }
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(sh.empty(stage));
  }
  at.ring = ring;
  const int end = at.slot + units;
  at.slot = end % kQ4FewXSlots, at.slot_parity ^= end / kQ4FewXSlots & 1;
}

#endif  // Q4S_SM90A

}  // namespace q4s
