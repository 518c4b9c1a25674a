// The formats of linear_decode: what a lane holds of a unit of a tile row, and its product with x. Device
// code.
//
// int4 and int8 codes meet x as
// integers: x = inverse * X with X = 256 I + R, I and R in a byte each, so that X has 15 bits and a sign
// below the largest x of a unit, and the sums of a unit are exact. The grid's offset becomes a bias, made of
// the sum of X where x is staged. fp16 weights meet x as fp16.
#pragma once
#include "kernels/linear_decode_stage.cuh"

namespace q4s {

// kLoads: of 16 bytes, that a lane makes of a unit of one tile row.
// A value is scale * (kFactor * code - kOffset) / kFactor. kWords: order of x in a word of four columns (of
// 16), as selector of __byte_perm(columns 0..3 from 2t, columns 8..11 from 2t) for lane t = 0; for t + 1
// twice as far.
template <Grid kGrid>
struct Int4Tile {
  static constexpr bool kInteger = true, kSigned = false;
  static constexpr int kBits = 4, kLoads = 2;
  static constexpr int kFactor = kGrid == Grid::kInt ? 1 : 2, kOffset = kGrid == Grid::kInt ? 8 : 15;
  static constexpr uint32_t kWord = 0x5140, kNextWord = 0x7362;
  // A fragment of columns 32 step .. of the unit, v: the load that has it, step * kLoads / 4.
  __device__ static void fragment(uint32_t (&a)[4], const uint4& v, int step) {
    const uint32_t w = step % 2 ? v.z : v.x, next = step % 2 ? v.w : v.y;
    a[0] = w & 0x0f0f0f0f, a[1] = w >> 4 & 0x0f0f0f0f, a[2] = next & 0x0f0f0f0f,
    a[3] = next >> 4 & 0x0f0f0f0f;
  }
};

struct Int8Tile {
  static constexpr bool kInteger = true, kSigned = true;
  static constexpr int kBits = 8, kLoads = 4, kFactor = 1, kOffset = 0;
  static constexpr uint32_t kWord = 0x5410, kNextWord = 0x7632;
  __device__ static void fragment(uint32_t (&a)[4], const uint4& v, int) {
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  }
};

struct HalfTile {
  static constexpr bool kInteger = false;
  static constexpr int kBits = 16, kLoads = 8, kFactor = 1, kOffset = 0;
};

// One unit of x as a lane needs it for all rows: B fragments of its column (token lane / 4 of each 8), and of
// the tokens of its results, 2t and 2t + 1 for t = lane % 4, the scale and the biases. kTokens: 1, up to 8 or
// up to 16.
template <class Tile, int kScales, int kTokens>
struct UnitX {
  static constexpr int kBlocks = (kTokens + 7) / 8,
                       kStep = kTokens == 1 ? 2 : 1;  // kStep: of results looked at
  static constexpr int kFragments = 2 * kUnitTiles;
  uint4 fragment[kBlocks][kFragments];  // of each tile: integer formats I, R; fp16 the two halves
  int32_t bias[kBlocks][kScales ? kScales : 1][2];
  float scale[kBlocks][2];

  // x: the unit, `stride` bytes a token. bias: (kScales, 8 kBlocks). x_scale: (8 kBlocks).
  __device__ void load(const uint8_t* x, int stride, int tokens, const int32_t* biases, const float* x_scale,
                       int lane) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* from = x + min(lane / 4 + 8 * b, tokens - 1) * stride + lane % 4 * 16;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) fragment[b][i] = *reinterpret_cast<const uint4*>(from + i * 64);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = lane % 4 * 2 + j + 8 * b;
        scale[b][j] = x_scale[token];
#pragma unroll
        for (int s = 0; s < kScales; ++s) bias[b][s][j] = Tile::kOffset ? biases[s * 8 * kBlocks + token] : 0;
      }
    }
  }

  // sum: rows lane / 4 and that + 8, two tokens each, of unit * x. scales: of the unit's first group, for row
  // lane / 4; groups: from there to the end of the row (a group beyond has x = 0). unit: this lane's loads,
  // 512 bytes apart. whole: it has both tiles (x is 0 where the other would be, but halves that were never
  // written need not be numbers).
  __device__ void multiply(float (&sum)[kBlocks][4], const uint8_t* unit, const uint16_t* scales, int groups,
                           bool whole) const {
    if constexpr (!Tile::kInteger) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) sum[b][0] = sum[b][1] = sum[b][2] = sum[b][3] = 0;
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        if (step >= 4 && !whole) break;
        const uint4 w = *reinterpret_cast<const uint4*>(unit + step * 512);
        const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const uint4& v = fragment[b][step / 2];
          mma_16816(sum[b], a, step % 2 ? v.z : v.x, step % 2 ? v.w : v.y);
        }
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int j = 0; j < 4; j += kStep) sum[b][j] *= scale[b][j % 2];
    } else {
      constexpr int kSteps = kUnitColumns / 32, kGroup = kSteps / kScales;
      int32_t high[kBlocks][4], low[kBlocks][4];
      uint4 v;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step * Tile::kLoads % 4 == 0)
          v = *reinterpret_cast<const uint4*>(unit + step * Tile::kLoads / 4 * 512);
        uint32_t a[4];
        Tile::fragment(a, v, step);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (step % kGroup == 0)
#pragma unroll
            for (int j = 0; j < 4; ++j) high[b][j] = low[b][j] = 0;
          const uint4 &i = fragment[b][step / 2 * 2], &r = fragment[b][step / 2 * 2 + 1];
          mma_16832<Tile::kSigned, true>(high[b], a, step % 2 ? i.z : i.x, step % 2 ? i.w : i.y);
          mma_16832<Tile::kSigned, false>(low[b], a, step % 2 ? r.z : r.x, step % 2 ? r.w : r.y);
        }
        if (step % kGroup != kGroup - 1) continue;
        const int group = step / kGroup;
        const uint16_t* at = scales + (group == 0 ? 0 : min(group, groups - 1) * kQ4TileRows);
        const float above = half_bits_to_float(at[0]), below = half_bits_to_float(at[8]);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int j = 0; j < 4; j += kStep) {
            const float value = __int2float_rn(high[b][j] * (Tile::kFactor * 256) +
                                               (low[b][j] * Tile::kFactor + bias[b][group][j % 2]));
            const float product = (j < 2 ? above : below) * scale[b][j % 2] * value;
            sum[b][j] = group == 0 ? product : sum[b][j] + product;
          }
      }
    }
  }
};

}  // namespace q4s
