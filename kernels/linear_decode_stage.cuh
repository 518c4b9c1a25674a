// What a block of linear_decode works on, and the staging of x. Device code.
#pragma once
#include "kernels/decode_ptx.cuh"
#include "kernels/linear_decode.h"
#include "kernels/linear_decode_config.h"

namespace q4s {

constexpr float kXMost = 32767;  // X = 256 I + R, I signed, R not, in a byte each

struct LinearDecodeParams {
  const uint8_t* codes;
  const uint16_t* scales;
  const float* x;         // (T, K)
  const float* gain;      // (K) or null
  const float* residual;  // (T, N) or null
  float* y;
  const float* table;
  const int32_t* position;
  const int32_t* sequence;
  KvLayer kv;
  float eps, inverse_k;
  int tokens, n, k, n_tiles, k_tiles, groups;
  int group_shift;  // group of unit u where a unit has one: u >> group_shift
  int heads, kv_heads, head_dim;
  Epilogue epilogue;
  LinearDecodeConfig config;
};

// What a warp multiplies in one pass: `units` units from `first` on, slices apart, of tile rows [row0, row1).
struct LinearDecodePass {
  int row0, row1, first, units;
};

// One warp's part of a block's work.
struct LinearDecodeBlock {
  const LinearDecodeParams& p;
  int warp, n0, n1, passes;  // n0, n1: the block's tile rows

  __device__ LinearDecodeBlock(const LinearDecodeParams& p, int warp) : p(p), warp(warp) {
    const LinearDecodeConfig& c = p.config;
    const int b = int(blockIdx.x);
    n0 = b * c.rows + min(b, c.more_rows);
    n1 = n0 + c.rows + (b < c.more_rows);
    passes = c.phases;
    if (c.phases == 1)
      for (int n = n0 + c.round; n < n1; n += c.round) ++passes;
  }

  __device__ LinearDecodePass pass(int i) const {
    const LinearDecodeConfig& c = p.config;
    LinearDecodePass r{n0, n1, warp, 0};
    int units = c.units;
    if (c.phases > 1) {
      r.first += i * c.units + min(i, c.more_units);
      units += i < c.more_units;
    } else {
      r.row0 = n0 + i * c.round;
      r.row1 = min(n1, r.row0 + c.round);
    }
    static_assert(kDecodeWarps == 16, "the shift");
    if (warp < c.slices)
      r.units = c.slices == kDecodeWarps ? (units - warp + 15) >> 4 : 1 + (warp + c.slices < units);
    return r;
  }
};

// A warp's units of x, staged in the order of B fragments. Integer formats: [token][unit][tile][I, R][t][4
// steps of 16 columns] words of four columns, and for each group of a unit the bias -kOffset * sum(X). fp16:
// [token][unit][tile][half of a tile][t][step, pair]. A lane holds four columns of a unit.
template <class Tile, int kScales>
struct Staging {
  const LinearDecodeParams& p;
  LinearDecodePass pass;
  float* gain;     // (units, 128)
  uint8_t* to;     // (T) of `stride` bytes, an odd multiple of 64, so that no bank is hit twice
  int32_t* bias;   // (units * kScales, stride_tokens)
  float* scale;    // (units, stride_tokens) what products are multiplied with
  float* squares;  // (T) with a gain: sums of squares of x
  bool first;      // phase: squares are set, else added to
  int stride, stride_tokens, lane;

  __device__ int column(int unit) const {
    return (pass.first + unit * p.config.slices) * kUnitColumns + 4 * lane;
  }
  // Four columns of a unit, zero from K on.
  __device__ float4 load(const float* row, int unit) const {
    const int at = column(unit);
    float4 v = make_float4(0, 0, 0, 0);
    if (unit >= pass.units) return v;
    if (p.k % 4 == 0) {
      if (at < p.k) v = __ldcg(reinterpret_cast<const float4*>(row + at));
    } else {
      if (at < p.k) v.x = __ldcg(row + at);
      if (at + 1 < p.k) v.y = __ldcg(row + at + 1);
      if (at + 2 < p.k) v.z = __ldcg(row + at + 2);
      if (at + 3 < p.k) v.w = __ldcg(row + at + 3);
    }
    return v;
  }
  // Sends the gains to where run() finds them; copies where it can: nothing waits for them here.
  __device__ void load_gain() const {
    if (!p.gain) return;
#pragma unroll 1
    for (int unit = 0; unit < pass.units; ++unit) {
      float* to = gain + unit * kUnitColumns + 4 * lane;
      if (p.k % 4 == 0 && column(unit) < p.k)
        copy_async(to, p.gain + column(unit));
      else
        *reinterpret_cast<float4*>(to) = load(p.gain, unit);
    }
    copy_commit();
  }

  // Largest bits of a unit's values without their sign; those of what is no number are above all.
  __device__ static uint32_t top_bits(const float4& v) {
    const auto bits = [](float f) { return __float_as_uint(f) & 0x7fffffffu; };
    return __reduce_max_sync(0xffffffffu, max(max(bits(v.x), bits(v.y)), max(bits(v.z), bits(v.w))));
  }

  __device__ void store(int t, int unit, const float4& v) const {
    const uint32_t top = top_bits(v);
    float up, back;
    if (Tile::kInteger) {
      const float most = fmaxf(__uint_as_float(top), 1e-30f);
      up = __fdividef(kXMost, most);
      back = most * (1 / (kXMost * Tile::kFactor));
    } else {  // 2^(14 - exponent of the largest); both it and its inverse stay normal numbers
      const uint32_t exponent = 254 - min(268 - int(top >> 23), 253);
      up = __uint_as_float((254 - exponent) << 23);
      back = __uint_as_float(exponent << 23);
    }
    if (top >= 0x7e800000u) back = __uint_as_float(0x7fc00000);  // no number, or beyond what __fdividef takes
    if (lane == 0) scale[unit * stride_tokens + t] = back;
    uint32_t* tile =
        reinterpret_cast<uint32_t*>(to + t * stride + unit * (kUnitColumns * 2) + lane / 16 * 128);
    if constexpr (Tile::kInteger) {
      store_integer(t, unit, v, up, tile);
    } else {
      const int in_step = lane % 4 * 4, step = lane % 16 / 4;
      uint32_t* words = tile + step / 2 * 16 + step % 2 * 2 + in_step % 8 / 2 * 4 + in_step / 8;
      words[0] = pack_half2(v.x * up, v.y * up);
      words[4] = pack_half2(v.z * up, v.w * up);
    }
  }
  __device__ void store_integer(int t, int unit, const float4& v, float up, uint32_t* tile) const {
    // X rounded in the last bits of a float: I and R are its second and first byte.
    constexpr float kMagic = 12582912;  // 1.5 * 2^23
    const auto bits = [&](float f) { return __float_as_uint(__fmaf_rn(f, up, kMagic)); };
    const uint32_t x0 = bits(v.x), x1 = bits(v.y), x2 = bits(v.z), x3 = bits(v.w);
    const uint32_t high = __byte_perm(__byte_perm(x0, x1, 0x0051), __byte_perm(x2, x3, 0x0051), 0x5410);
    const uint32_t low = __byte_perm(__byte_perm(x0, x1, 0x0040), __byte_perm(x2, x3, 0x0040), 0x5410);
    // This lane and the one 8 columns on hold the columns of two words: this makes those of I, that those of
    // R.
    const bool second = lane % 4 >= 2;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? high : low, 2);
    const uint32_t a = second ? other : high, b = second ? low : other;
    uint32_t* words = tile + (second ? 16 : 0) + lane % 2 * 8 + lane % 16 / 4;
    words[0] = __byte_perm(a, b, Tile::kWord);
    words[4] = __byte_perm(a, b, Tile::kNextWord);
    if constexpr (Tile::kOffset != 0) {
      constexpr int kLanes = 32 / kScales;  // of a group
      int total = int(x0 + x1 + x2 + x3 - 4 * 0x4b400000u);
      if constexpr (kLanes == 32)
        total = __reduce_add_sync(0xffffffffu, total);
      else
        for (int d = kLanes / 2; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
      if (lane % kLanes == 0)
        bias[(unit * kScales + lane / kLanes) * stride_tokens + t] = -Tile::kOffset * total;
    }
  }

  // Two units a turn; the next turn's are on their way meanwhile.
  __device__ void run() const {
    if (pass.units == 0) return;
    const float* row = p.x;
    float sum = 0;
    float4 next[2] = {load(row, 0), load(row, 1)};
    if (p.gain) copy_wait<0>();
#pragma unroll 1
    for (int t = 0, unit = 0; t < p.tokens;) {
      float4 v[2] = {next[0], next[1]};
      const int here = unit, token = t;
      unit += 2;
      if (unit >= pass.units) unit = 0, ++t, row += p.k;
      if (t < p.tokens) next[0] = load(row, unit), next[1] = load(row, unit + 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (here + i >= pass.units) break;
        if (p.gain) {
          const float4 g = *reinterpret_cast<const float4*>(gain + (here + i) * kUnitColumns + 4 * lane);
          sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
          v[i].x *= g.x, v[i].y *= g.y, v[i].z *= g.z, v[i].w *= g.w;
        }
        store(token, here + i, v[i]);
      }
      if (p.gain && t != token) {
        for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (lane == 0) squares[token] = first ? sum : squares[token] + sum;
        sum = 0;
      }
    }
  }
};

}  // namespace q4s
