// The inner part of linear_q4_gemm_sm90_few.cu: how a block's shared memory is laid out, and what a warp
// makes of the units of K in it.
#pragma once
#include <algorithm>

#include "kernels/linear_q4_gemm_sm90_loop.cuh"
#include "kernels/shared_halves.cuh"

namespace q4s {

constexpr int kQ4FewTokens = kQ4GemmFewTokens;
constexpr int kQ4FewMultiply = 12;  // warps that do
constexpr int kQ4FewParts = 2;      // of K: blocks of a cluster
constexpr int kQ4FewBand = 12;      // most tiles of 16 rows that a block works on at a time
constexpr int kQ4FewXTileBytes = kQ4FewTokens * 128, kQ4FewXBytes = kQ4FewXTileBytes * kQ4UnitTiles;
constexpr int kQ4FewRowBytes = kQ4TileBytes * kQ4UnitTiles;  // of one tile of rows, a unit
// Warps may take units in turn, `ways` of them. It divides the ring: a warp that comes to a stage again was
// the one to empty it, and cannot mistake an earlier turn of the ring for this one.
constexpr int kQ4FewRing = 6;  // divides the number of stages
Q4S_HOST_DEVICE constexpr int q4_few_ways(int tiles) {
  return tiles > kQ4FewMultiply / 2 ? 1 : tiles > kQ4FewMultiply / 3 ? 2 : 3;
}

// What a block takes of a multiprocessor. Of the two halves of a layer's products, which follow each other in
// turn, one takes more than half of the shared memory and the other more than half of the registers, and both
// together are all of both: so a block of each stands on every multiprocessor, and never two of one product
// while another multiprocessor has none. Any other kernel between them, such as attention, could else leave
// places on one multiprocessor that two blocks then take, and after them two of every product.
constexpr int kQ4FewRegisters = 56;  // of a thread; a quarter of a multiprocessor has 16384, for 7 to 9 warps
template <Q4GemmOutput kOutput>
struct Q4FewHalf {
  static constexpr int kSinkWarps = 2;            // 16 in all
  static constexpr bool kMultipliersSink = true;  // the last band's sums
  static constexpr int kSharedBytes = 116 * 1024;
};
template <>
struct Q4FewHalf<Q4GemmOutput::kStore> {
  static constexpr int kSinkWarps = 6;  // 20
  static constexpr bool kMultipliersSink = false;
  static constexpr int kSharedBytes = 110 * 1024;
};

// Of a block's 8 tokens, for those who take sums to their place.
struct Q4FewState {
  float factor[8];
  int position[8], sequence[8];
};

// A block's shared memory: a ring of stages, each a unit of K: activations, weights of a band and their
// scales; parts of sums; barriers and Q4FewState. Offsets in bytes.
constexpr int kQ4FewStages = 16;  // most of a ring
struct Q4FewLayout {
  int band, stages;
  int w, w_bytes, s, s_bytes, sums, barriers, state;
};
inline Q4FewLayout q4_few_layout(int tiles, int box_groups, int bytes) {  // tiles: most of a cluster
  Q4FewLayout l;
  for (int64_t bands = ceil_div(tiles, kQ4FewBand);; ++bands) {
    l.band = int(ceil_div(tiles, bands));
    l.w_bytes = l.band * kQ4FewRowBytes;
    l.s_bytes = int(round_up(l.band * box_groups * 32, 128));
    constexpr int kSums = kQ4FewParts * kQ4FewMultiply * 512, kBarriers = (2 * kQ4FewStages + 3) * 8;
    const int limit = bytes - kSums - kBarriers - int(sizeof(Q4FewState));
    l.stages =
        std::min(limit / (kQ4FewXBytes + l.w_bytes + l.s_bytes), kQ4FewStages) / kQ4FewRing * kQ4FewRing;
    if (l.stages == 0) continue;
    l.w = l.stages * kQ4FewXBytes;
    l.s = l.w + l.stages * l.w_bytes;
    l.sums = l.s + l.stages * l.s_bytes;
    l.barriers = l.sums + kSums;
    l.state = l.barriers + kBarriers;
    return l;
  }
}

#if Q4S_SM90A

struct Q4FewShared {
  const Q4FewLayout& l;
  const uint8_t* base;
  uint32_t x, sums, full, empty, full_sums, empty_sums, ready;
  __device__ Q4FewShared(const Q4FewLayout& layout, const uint8_t* b) : l(layout), base(b) {
    x = shared_address(b);
    sums = x + l.sums;
    full = x + l.barriers;
    empty = full + l.stages * 8;
    full_sums = empty + l.stages * 8;
    empty_sums = full_sums + 8;
    ready = empty_sums + 8;
  }
  // By one warp; a barrier of all must follow. A stage is filled by two, its weights and its activations, and
  // released kQ4FewBand times; the sums are by every warp that takes some while more are to come.
  __device__ void init(int lane, uint32_t sinks) const {
    using hopper::barrier_init;
    if (lane < l.stages) barrier_init(full + lane * 8, 2), barrier_init(empty + lane * 8, kQ4FewBand);
    if (lane == 0) barrier_init(full_sums, 1), barrier_init(empty_sums, sinks), barrier_init(ready, 32);
    hopper::barrier_init_fence();
  }
  __device__ Q4FewState& state() const {
    return *reinterpret_cast<Q4FewState*>(const_cast<uint8_t*>(base) + l.state);
  }
};

// Codes q of a word as q - 8 in fp16, the A fragment of 16 rows x 16 columns.
__device__ inline void q4_integers(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool high = i % 2;
    const uint32_t base = high ? 0x54005400u : 0x64006400u, offset = high ? 0x54805480u : 0x64086408u;
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(bits)
        : "r"(i < 2 ? word : word >> 8), "r"(high ? 0x00f000f0u : 0x000f000fu), "r"(base));
    const __half2 q =
        __hsub2(reinterpret_cast<const __half2&>(bits), reinterpret_cast<const __half2&>(offset));
    a[i] = reinterpret_cast<const uint32_t&>(q);
  }
}

struct Q4FewMultiplier {
  const Q4FewShared& sh;
  const Q4Operands& p;
  int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  int at_step[4];  // where a lane's row of an ldmatrix is, at each step of 16 columns: 16 tokens, two pieces
                   // of 8

  __device__ Q4FewMultiplier(const Q4FewShared& shared, const Q4Operands& operands)
      : sh(shared), p(operands) {
    const int token = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < 4; ++step) at_step[step] = token * 128 + ((2 * step + piece) ^ token % 8) * 16;
  }
  // Sums of a tile of rows of a band, over every `ways`-th of `units` stages from (stage, parity) on.
  // `weight`: how often a stage is released.
  template <bool kScaleSums>
  __device__ void tile(int row, int ways, int units, int stage, uint32_t parity, uint32_t weight,
                       float (&acc)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0;
    const uint32_t words_at = sh.x + sh.l.w + row * kQ4FewRowBytes + lane * 16;
    const uint32_t scales_at = sh.x + sh.l.s + row * p.box_groups * 32 + lane / 4 * 2;
    bool there = false;
    for (int unit = 0; unit < units; unit += ways) {
      const int now = stage;
      if (!there) hopper::barrier_wait(sh.full + now * 8, parity);
      const uint32_t x = sh.x + now * kQ4FewXBytes, words = words_at + now * sh.l.w_bytes,
                     scales = scales_at + now * sh.l.s_bytes;
      const uint4 loaded[2] = {hopper::load_shared(words), hopper::load_shared(words + kQ4TileBytes)};
      uint32_t b[4];
      load_matrices<false>(b, x + at_step[0]);
      const auto scale_of = [&](int group, int half) {
        return __ushort_as_half(load_shared_2(scales + group * 32 + half * 16));
      };
      float part[2][4], scale[2];
      Q4Fragment f;
      if constexpr (kScaleSums)
        scale[0] = __half2float(scale_of(0, 0)), scale[1] = __half2float(scale_of(0, 1));
      else
        f.set(scale_of(0, 0), scale_of(0, 1), p.half_grid);
      // The answer takes as long as a load.
      if ((stage += ways) >= sh.l.stages) stage -= sh.l.stages, parity ^= 1;
      there = mbarrier_done(sh.full + stage * 8, parity);
#pragma unroll
      for (int t = 0; t < kQ4UnitTiles; ++t) {
        const uint32_t word[4] = {loaded[t].x, loaded[t].y, loaded[t].z, loaded[t].w};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t at[4] = {b[0], b[1], b[2], b[3]};
          const int next = t * 4 + s + 1;
          if (next < 8) load_matrices<false>(b, x + at_step[next % 4] + next / 4 * kQ4FewXTileBytes);
          uint32_t a[4];
          if constexpr (kScaleSums) {
            q4_integers(word[s], a);
#pragma unroll
            for (int j = 0; j < 2; ++j)
              if (next == 1)
                hopper::mma_fresh(part[j], a, at[2 * j], at[2 * j + 1]);
              else
                mma_16816(part[j], a, at[2 * j], at[2 * j + 1]);
          } else {
            if (t > 0 && s == 0 && p.fine > 0) f.set(scale_of(p.fine, 0), scale_of(p.fine, 1), p.half_grid);
            if (s == 2 && p.fine > 1) f.set(scale_of(t * 2 + 1, 0), scale_of(t * 2 + 1, 1), p.half_grid);
            f.unpack(word[s], a);
#pragma unroll
            for (int j = 0; j < 2; ++j) mma_16816(acc[j], a, at[2 * j], at[2 * j + 1]);
          }
        }
      }
      __syncwarp();
      if (lane == 0) hopper::barrier_arrive(sh.empty + now * 8, weight);
      if constexpr (kScaleSums)
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] += scale[i % 4 / 2] * part[i / 4][i % 4];
    }
  }
};

#endif  // Q4S_SM90A

}  // namespace q4s
