// The formats of linear_decode: what a lane holds of a unit of a tile row, and its product with x. Device
// code.
//
// int4 and int8 codes meet x as integers: x = inverse * X with X = 256 I + R, I and R in a signed byte each,
// so that X has 15 bits and a sign below the largest x of a unit, and the sums of a group are exact. I and R
// of four tokens are the eight columns of one B operand. The grid's offset becomes a bias, made of the sum of
// X where x is staged. fp16 weights meet x as fp16, eight tokens to an operand.
#pragma once
#include "kernels/linear_decode_stage.cuh"

namespace q4s {

// kLoads: of 16 bytes, that a lane makes of a unit; kBelow: what the codes of a tile's rows 8.. are
// multiplied with in the fragments. kHigh, kLow: I and R in a word of four columns (of 16), as selectors of
// __byte_perm(X of columns 2t and 2t + 8, X of 2t + 1 and 2t + 9) as 16 bits each.
struct Int4Tile {
  static constexpr bool kInteger = true, kSigned = false;
  static constexpr int kBits = 4, kLoads = 2;
  static constexpr int kBelow = 16;  // codes of the lower eight rows stay where they are in their byte
  static constexpr uint32_t kHigh = 0x7531, kLow = 0x6420;
  // A fragment of columns 32 step .. of the unit, v: the load that has it, step * kLoads / 4.
  __device__ static void fragment(uint32_t (&a)[4], const uint4& v, int step) {
    const uint32_t w = step % 2 ? v.z : v.x, next = step % 2 ? v.w : v.y;
    a[0] = w & 0x0f0f0f0f, a[1] = w & 0xf0f0f0f0, a[2] = next & 0x0f0f0f0f, a[3] = next & 0xf0f0f0f0;
  }
};

struct Int8Tile {
  static constexpr bool kInteger = true, kSigned = true;
  static constexpr int kBits = 8, kLoads = 4, kBelow = 1;
  static constexpr uint32_t kHigh = 0x7351, kLow = 0x6240;
  __device__ static void fragment(uint32_t (&a)[4], const uint4& v, int) {
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  }
};

struct HalfTile {
  static constexpr bool kInteger = false;
  static constexpr int kBits = 16, kLoads = 8, kBelow = 1;
};

// The sums that a lane holds for a tile row, and how a unit is added to them. Integer formats: rows g and
// g + 8 (g = lane / 4) of token 4b + t (t = lane % 4). fp16: those of tokens 8b + 2t and 8b + 2t + 1.
template <class Tile, int kScales, int kTokens>
class DecodeSums {
 public:
  static constexpr int kBlockTokens = Tile::kInteger ? 4 : 8;
  static constexpr int kBlocks = (kTokens + kBlockTokens - 1) / kBlockTokens;
  static constexpr int kMeta = linear_decode_meta(kScales);

  // x, meta: addresses, as staged.
  __device__ DecodeSums(const LinearDecodeProduct& a, uint32_t x, int stride, uint32_t meta, int tokens,
                        int lane)
      : factor_(uint32_t(a.factor)), unit_meta_(held(tokens * kMeta * 4)) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int token = min(kBlockTokens * b + (Tile::kInteger ? g / 2 : g), tokens - 1);
      const uint32_t at = x + token * stride + t * 16 + (Tile::kInteger ? g % 2 * 64 : 0);
      x_[b] = kBlocks == 1 ? held_hard(at) : held(at);
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        meta_[b][i] =
            held(meta + min(kBlockTokens * b + (Tile::kInteger ? t : 2 * t + i), tokens - 1) * (kMeta * 4));
    }
    clear();
  }
  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) sum_[b][i] = 0;
  }

  // What a lane reads of a stage for its warp's unit.
  struct Codes {
    uint4 v[Tile::kLoads];
    uint16_t above[kScales ? kScales : 1], below[kScales ? kScales : 1];
  };
  // Addresses of this lane's first 16 bytes and of its first scale. groups: of the unit that exist.
  __device__ static Codes read(uint32_t codes, uint32_t scales, int groups) {
    Codes c;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) c.v[i] = load_shared_16(codes + i * 512);
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
      const uint32_t at = scales + (s == 0 ? 0 : min(s, groups - 1) * (kQ4TileRows * 2));
      c.above[s] = load_shared_2(at), c.below[s] = load_shared_2(at + 16);
    }
    return c;
  }

  // unit: of those staged; whole: it has both tiles (x is 0 where the other would be, but halves that were
  // never written need not be numbers).
  __device__ void add(const Codes& c, int unit, bool whole) {
    if constexpr (Tile::kInteger)
      add_integer(c, unit);
    else
      add_half(c, unit, whole);
  }

  // to: address of (T, 16), see linear_decode_sum_at().
  __device__ void store(uint32_t to, int tokens, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int token = kBlockTokens * b + (Tile::kInteger ? t : 2 * t + i);
        if (token >= tokens) continue;
        store_shared(to + linear_decode_sum_at(token, g) * 4, sum_[b][i]);
        store_shared(to + linear_decode_sum_at(token, g + 8) * 4, sum_[b][kOwn + i] * kBelowOnce);
      }
  }

 private:
  static constexpr int kOwn = Tile::kInteger ? 1 : 2;  // tokens of a block
  // What makes sums of rows 8.. out of those of multiples of their codes: a power of two.
  static constexpr float kBelowOnce = 1.0f / Tile::kBelow;

  __device__ void add_integer(const Codes& c, int unit) {
    constexpr int kSteps = kUnitColumns / 32, kGroup = kSteps / (kScales ? kScales : 1);
    uint4 x[kBlocks];
    uint32_t product[kBlocks][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        if (step % 2 == 0) x[b] = load_shared_16(x_[b] + unit * (kUnitColumns * 2) + step / 2 * 128);
      uint32_t fragment[4];
      Tile::fragment(fragment, c.v[step * Tile::kLoads / 4], step);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t(&sum)[4] = product[b];
        if (step % kGroup == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
        mma_16832<Tile::kSigned, true>(sum, fragment, step % 2 ? x[b].z : x[b].x, step % 2 ? x[b].w : x[b].y);
      }
      if (step % kGroup != kGroup - 1) continue;
      const int s = step / kGroup;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t about = meta_[b][0] + unit * unit_meta_;
        uint32_t bias = 0, bits;
        if constexpr (Tile::kBits == 4 && kScales == 1) {
          const uint2 both = load_shared_8(about);
          bias = both.x, bits = both.y;
        } else {
          if constexpr (Tile::kBits == 4) bias = load_shared_4(about + s * 4);
          bits = load_shared_4(about + (kMeta - 1) * 4);
        }
        // Overflow on the way is harmless: the value has none.
        const uint32_t f = factor_;
        const float scale = __uint_as_float(bits);
        const uint32_t(&sum)[4] = product[b];
        const uint32_t high = sum[0] * (256 * f) + (sum[1] * f + bias);
        const uint32_t low = sum[2] * (256 * f) + (sum[3] * f + bias * Tile::kBelow);
        sum_[b][0] += half_bits_to_float(c.above[s]) * scale * __int2float_rn(int32_t(high));
        sum_[b][1] += half_bits_to_float(c.below[s]) * scale * __int2float_rn(int32_t(low));
      }
    }
  }

  __device__ void add_half(const Codes& c, int unit, bool whole) {
    float product[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) product[b][0] = product[b][1] = product[b][2] = product[b][3] = 0;
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      if (step >= 4 && !whole) break;
      const uint32_t fragment[4] = {c.v[step].x, c.v[step].y, c.v[step].z, c.v[step].w};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint2 x = load_shared_8(x_[b] + unit * (kUnitColumns * 2) + step / 2 * 64 + step % 2 * 8);
        mma_16816(product[b], fragment, x.x, x.y);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float scale = __uint_as_float(load_shared_4(meta_[b][i] + unit * unit_meta_ + (kMeta - 1) * 4));
        sum_[b][i] += product[b][i] * scale;
        sum_[b][kOwn + i] += product[b][2 + i] * scale;
      }
  }

  uint32_t x_[kBlocks], meta_[kBlocks][kOwn];  // addresses of unit 0
  uint32_t factor_, unit_meta_;                // unit_meta_: bytes from unit to unit
  float sum_[kBlocks][2 * kOwn];
};

}  // namespace q4s
