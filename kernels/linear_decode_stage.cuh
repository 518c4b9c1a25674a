// How the warps that multiply stage x in shared memory. Device code.
#pragma once
#include "kernels/linear_decode_ring.cuh"

namespace q4s {

constexpr float kXMost = 32639;  // X = 256 I + R, I and R a signed byte each

// Units of 128 columns of x, staged in the order of B fragments. Integer formats: [unit][tile][I, R][t][4
// steps of 16 columns] words of four columns, and for each group of a unit the bias -offset * sum(X). fp16:
// [unit][tile][half of a tile][t][step, pair]. A lane holds four columns of a unit.
template <class Tile, int kScales>
struct DecodeStaging {
  static constexpr int kMeta = linear_decode_meta(kScales);
  const LinearDecodeProduct& a;
  int tokens, first, units;  // first unit, number of units
  uint8_t* to;               // (T) of `stride` bytes, an odd multiple of 64, so that no bank is hit twice
  uint32_t* meta;            // (units, T, kMeta)
  float* squares;            // (all units, T), with a gain: sums of squares of x
  uint32_t number;           // of the packets of x
  int stride, lane, warp;

  // Four columns of a unit, zero from K on.
  __device__ float4 load(const float* row, int unit) const {
    const int at = (first + unit) * kUnitColumns + 4 * lane;
    float4 v = make_float4(0, 0, 0, 0);
    if (a.k % 4 == 0) {
      if (at < a.k) v = __ldcg(reinterpret_cast<const float4*>(row + at));
    } else {
      if (at < a.k) v.x = __ldcg(row + at);
      if (at + 1 < a.k) v.y = __ldcg(row + at + 1);
      if (at + 2 < a.k) v.z = __ldcg(row + at + 2);
      if (at + 3 < a.k) v.w = __ldcg(row + at + 3);
    }
    return v;
  }
  // As they would be out of packets.
  __device__ static float4 values(const float4& v) {
    return make_float4(packet_round(v.x), packet_round(v.y), packet_round(v.z), packet_round(v.w));
  }
  __device__ static float4 nothing(const float*) { return make_float4(0, 0, 0, 0); }
  template <int kItems>
  __device__ void await(float4 (&)[kItems], const float*, int) const {}

  // The same of packets, which may not be there yet. Here K is a multiple of 4.
  __device__ Packet load(const Packet* row, int unit) const {
    const int at = (first + unit) * (kUnitColumns / kPacketValues) + lane;
    return at < a.k / kPacketValues ? load_packet(row + at) : nothing(row);
  }
  __device__ static float4 values(const Packet& v) { return packet_values(v); }
  __device__ Packet nothing(const Packet*) const { return {0, 0, 0, number}; }
  __device__ bool there(const Packet& v) const { return v.w == number; }
  // Waits for the first of some units that follow each other for this warp, from `unit` of a token's row.
  // Each lane asks again for what it lacks, all of it at once.
  template <int kItems>
  __device__ void await(Packet (&v)[kItems], const Packet* row, int unit) const {
#pragma unroll 1
    for (;;) {
      if (__all_sync(0xffffffffu, there(v[0]))) break;
      const Packet* ask_row = row;
      int ask = unit;
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (!there(v[j])) v[j] = load(ask_row, ask);
        next(ask_row, ask);
      }
    }
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
      back = most * (a.factor == 1 ? 1 / kXMost : 1 / (2 * kXMost));
    } else {  // 2^(14 - exponent of the largest); both it and its inverse stay normal numbers
      const uint32_t exponent = 254 - min(268 - int(top >> 23), 253);
      up = __uint_as_float((254 - exponent) << 23);
      back = __uint_as_float(exponent << 23);
    }
    if (top >= 0x7e800000u) back = __uint_as_float(0x7fc00000);  // no number, or beyond what __fdividef takes
    uint32_t* const about = meta + (unit * tokens + t) * kMeta;
    if (lane == 0) about[kMeta - 1] = __float_as_uint(back);
    uint32_t* tile =
        reinterpret_cast<uint32_t*>(to + t * stride + unit * (kUnitColumns * 2) + lane / 16 * 128);
    if constexpr (Tile::kInteger) {
      store_integer(v, up, tile, about);
    } else {
      const int in_step = lane % 4 * 4, step = lane % 16 / 4;
      uint32_t* words = tile + step / 2 * 16 + step % 2 * 2 + in_step % 8 / 2 * 4 + in_step / 8;
      words[0] = pack_half2(v.x * up, v.y * up);
      words[4] = pack_half2(v.z * up, v.w * up);
    }
  }
  __device__ void store_integer(const float4& v, float up, uint32_t* tile, uint32_t* about) const {
    // X rounded in the last bits of a float: R is its first byte, I the second byte of X + 128.
    constexpr float kMagic = 12582912;  // 1.5 * 2^23
    const auto bits = [&](float f) { return __float_as_uint(__fmaf_rn(f, up, kMagic)); };
    const uint32_t x0 = bits(v.x), x1 = bits(v.y), x2 = bits(v.z), x3 = bits(v.w);
    const uint32_t high =
        __byte_perm(__byte_perm(x0 + 128, x1 + 128, 0x0051), __byte_perm(x2 + 128, x3 + 128, 0x0051), 0x5410);
    const uint32_t low = __byte_perm(__byte_perm(x0, x1, 0x0040), __byte_perm(x2, x3, 0x0040), 0x5410);
    // This lane and the one 8 columns on hold the columns of two words: this makes those of I, that those of
    // R.
    const bool second = lane % 4 >= 2;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? high : low, 2);
    const uint32_t p = second ? other : high, q = second ? low : other;
    uint32_t* words = tile + (second ? 16 : 0) + lane % 2 * 8 + lane % 16 / 4;
    words[0] = __byte_perm(p, q, Tile::kWord);
    words[4] = __byte_perm(p, q, Tile::kNextWord);
    if constexpr (Tile::kBits == 4) {
      constexpr int kLanes = 32 / kScales;  // of a group
      int total = int(x0 + x1 + x2 + x3 - 4 * 0x4b400000u);
      if constexpr (kLanes == 32)
        total = __reduce_add_sync(0xffffffffu, total);
      else
        for (int d = kLanes / 2; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
      if (lane % kLanes == 0) about[lane / kLanes] = uint32_t(-a.offset * total);
    }
  }

  __device__ int row_values(const float*) const { return a.k; }
  __device__ int row_values(const Packet*) const { return a.k / kPacketValues; }
  // From one of this warp's units to the next, or to the next token's first.
  template <typename Value>
  __device__ void next(const Value*& row, int& unit) const {
    unit += kDecodeWarps;
    if (unit >= units) unit = warp, row += row_values(row);
  }

  // This warp's units of all tokens.
  __device__ void run() const {
    if (a.x_packets)
      a.gain ? run<true>(a.x_packets) : run<false>(a.x_packets);
    else
      a.gain ? run<true>(a.x) : run<false>(a.x);
  }
  // kItems units on their way at a time. Short code on purpose: it runs a few times for each product and
  // would else wait for its instructions.
  template <bool kGain, typename Value>
  __device__ void run(const Value* x) const {
    constexpr int kItems = kGain ? 3 : 4;
    const int items = warp < units ? (units - warp + kDecodeWarps - 1) / kDecodeWarps * tokens : 0;
    int ask = warp, asked = 0, unit = warp, t = 0;
    const Value *ask_row = x, *row = x;
    decltype(load(x, 0)) coming[kItems];
    float4 gains[kItems];
    const auto ask_next = [&](int j) {
      if (asked++ < items) {
        coming[j] = load(ask_row, ask);
        if (kGain) gains[j] = load(a.gain, ask);
        next(ask_row, ask);
      } else {
        coming[j] = nothing(x);
      }
    };
#pragma unroll
    for (int j = 0; j < kItems; ++j) ask_next(j);
#pragma unroll 1
    for (int i = 0; i < items; ++i) {
      await(coming, row, unit);
      float4 v = values(coming[0]);
      if (kGain) {
        float square = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
        if (lane == 0) squares[(first + unit) * tokens + t] = square;
        v.x *= gains[0].x, v.y *= gains[0].y, v.z *= gains[0].z, v.w *= gains[0].w;
      }
#pragma unroll
      for (int j = 0; j + 1 < kItems; ++j) coming[j] = coming[j + 1], gains[j] = gains[j + 1];
      ask_next(kItems - 1);
      store(t, unit, v);
      const Value* const of = row;
      next(row, unit);
      t += row != of;
    }
  }
  // Gains on their way to the L2 cache: a lane for each line.
  __device__ void prefetch_gain() const {
    if (!a.gain) return;
    for (int at = (warp * 32 + lane) * 32; at < a.k; at += kDecodeWarps * 32 * 32) prefetch_l2(a.gain + at);
  }
};

}  // namespace q4s
