// How the warps that multiply stage x in shared memory. Device code.
#pragma once
#include <type_traits>

#include "kernels/linear_decode_ring.cuh"

namespace q4s {

constexpr float kXMost = 32639;  // X = 256 I + R, I and R a signed byte each

// Units of 128 columns of x, staged in the order of B fragments. Integer formats: [unit][tile][I, R][t][4
// steps of 16 columns] words of four columns, and for each group of a unit the bias -offset * sum(X). fp16:
// [unit][tile][half of a tile][t][step, pair]. A lane holds four columns of a unit; a warp has every
// kDecodeWarps-th unit of each token.
template <class Tile, int kScales>
struct DecodeStaging {
  static constexpr int kMeta = linear_decode_meta(kScales);
  const LinearDecodeProduct& a;
  int tokens, first, units;  // first unit, number of units
  uint32_t to;       // address of (T) of `stride` bytes, an odd multiple of 64, so that no bank is hit
                     // twice
  uint32_t meta;     // address of (units, T, kMeta)
  uint32_t squares;  // address of (all units, T), with a gain: sums of squares of x
  uint32_t number;   // of the packets of x
  int stride, lane, warp;
  // What changes with the product only, kept in registers.
  int k = int(held(uint32_t(a.k))), minus_offset = int(held(uint32_t(-a.offset)));
  float back_of_one = held_float((a.factor == 1 ? 1.0f : 0.5f) / kXMost);

  // Four columns from `column` on, `offset` bytes from x; zero from K on. kWhole: K is a multiple of 4.
  template <bool kWhole = false>
  __device__ float4 load(const float* x, uint32_t offset, int column) const {
    const float* at = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + offset);
    float4 v = make_float4(0, 0, 0, 0);
    if (kWhole || k % 4 == 0) {
      if (column < k) v = __ldcg(reinterpret_cast<const float4*>(at));
    } else {
      if (column < k) v.x = __ldcg(at);
      if (column + 1 < k) v.y = __ldcg(at + 1);
      if (column + 2 < k) v.z = __ldcg(at + 2);
      if (column + 3 < k) v.w = __ldcg(at + 3);
    }
    return v;
  }
  // As they would be out of packets.
  __device__ static float4 values(const float4& v) {
    return make_float4(packet_round(v.x), packet_round(v.y), packet_round(v.z), packet_round(v.w));
  }
  template <int kItems>
  __device__ void await(float4 (&)[kItems], const uint32_t (&)[kItems], const float*) const {}

  // The same of packets, which may not be there yet. Here K is a multiple of 4.
  __device__ static const Packet* at(const Packet* x, uint32_t offset) {
    return reinterpret_cast<const Packet*>(reinterpret_cast<const char*>(x) + offset);
  }
  __device__ Packet load(const Packet* x, uint32_t offset, int column) const {
    return column < k ? load_packet(at(x, offset)) : Packet{0, 0, 0, number};
  }
  __device__ static float4 values(const Packet& v) { return packet_values(v); }
  // Waits for the first of some items on their way. Each lane asks again for what it lacks, all of it at
  // once.
  template <int kItems>
  __device__ void await(Packet (&v)[kItems], const uint32_t (&offset)[kItems], const Packet* x) const {
#pragma unroll 1
    while (!__all_sync(0xffffffffu, v[0].w == number)) {
#pragma unroll
      for (int j = 0; j < kItems; ++j)
        if (v[j].w != number) v[j] = load_packet(at(x, offset[j]));
    }
  }

  // Largest bits of a unit's values without their sign; those of what is no number are above all.
  __device__ static uint32_t top_bits(const float4& v) {
    const auto bits = [](float f) { return __float_as_uint(f) & 0x7fffffffu; };
    return __reduce_max_sync(0xffffffffu, max(max(bits(v.x), bits(v.y)), max(bits(v.z), bits(v.w))));
  }

  // to: where this lane's words of a unit go; about: the unit's meta. Addresses.
  __device__ void store(uint32_t to, uint32_t about, const float4& v) const {
    const uint32_t top = top_bits(v);
    float up, back;
    if (Tile::kInteger) {
      const float most = fmaxf(__uint_as_float(top), 1e-30f);
      up = reciprocal(most) * kXMost;
      back = most * back_of_one;
    } else {  // 2^(14 - exponent of the largest); both it and its inverse stay normal numbers
      const uint32_t exponent = 254 - min(268 - int(top >> 23), 253);
      up = __uint_as_float((254 - exponent) << 23);
      back = __uint_as_float(exponent << 23);
    }
    if (top >= 0x7e800000u) back = __uint_as_float(0x7fc00000);  // no number, or one without a reciprocal
    if constexpr (Tile::kInteger) {
      store_integer(v, up, back, to, about);
    } else {
      if (lane == 0) store_shared(about + (kMeta - 1) * 4, back);
      store_shared(to, pack_half2(v.x * up, v.y * up));
      store_shared(to + 16, pack_half2(v.z * up, v.w * up));
    }
  }
  __device__ void store_integer(const float4& v, float up, float back, uint32_t to, uint32_t about) const {
    // X + 128 in the last bits of a float: I is its second byte, R its first less 128.
    constexpr float kMagic = 12582912 + 128;  // 1.5 * 2^23
    const auto bits = [&](float f) { return __float_as_uint(__fmaf_rn(f, up, kMagic)); };
    const uint32_t x0 = bits(v.x), x1 = bits(v.y), x2 = bits(v.z), x3 = bits(v.w);
    const uint32_t high = __byte_perm(__byte_perm(x0, x1, 0x0051), __byte_perm(x2, x3, 0x0051), 0x5410);
    const uint32_t low =
        __byte_perm(__byte_perm(x0, x1, 0x0040), __byte_perm(x2, x3, 0x0040), 0x5410) ^ 0x80808080u;
    // This lane and the one 8 columns on hold the columns of two words: this makes those of I, that those of
    // R.
    const bool second = lane % 4 >= 2;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? high : low, 2);
    const uint32_t p = second ? other : high, q = second ? low : other;
    store_shared(to, __byte_perm(p, q, Tile::kWord));
    store_shared(to + 16, __byte_perm(p, q, Tile::kNextWord));
    if constexpr (Tile::kBits == 4) {
      constexpr int kLanes = 32 / kScales;  // of a group
      int total = int(x0 + x1 + x2 + x3 - 4 * (0x4b400000u + 128));
      if constexpr (kLanes == 32)
        total = __reduce_add_sync(0xffffffffu, total);
      else
        for (int d = kLanes / 2; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
      const uint32_t bias = uint32_t(minus_offset * total);
      if (lane % kLanes == 0) store_shared(about + lane / kLanes * 4, bias);
    }
    if (lane == 0) store_shared(about + (kMeta - 1) * 4, back);
  }
  // Bytes from a unit to where this lane's words go.
  __device__ int words() const {
    if (Tile::kInteger) return lane / 16 * 128 + (lane % 4 >= 2 ? 64 : 0) + lane % 2 * 32 + lane % 16 / 4 * 4;
    const int in_step = lane % 4 * 4, step = lane % 16 / 4;
    return lane / 16 * 128 + (step / 2 * 16 + step % 2 * 2 + in_step % 8 / 2 * 4 + in_step / 8) * 4;
  }

  // This warp's units of all tokens.
  __device__ void run() const {
    if (warp >= units) return;
    if (a.x_packets)
      a.gain ? run<true>(a.x_packets) : run<false>(a.x_packets);
    else
      a.gain ? run<true>(a.x) : run<false>(a.x);
  }
  // kItems units on their way at a time. Short code on purpose: it runs a few times for each product and
  // would else wait for its instructions; what moves from unit to unit and from token to token is kept as
  // differences.
  template <bool kGain, typename Value>
  __device__ void run(const Value* x) const {
    constexpr int kItems = kGain ? 3 : 4;
    constexpr int kColumnBytes = 4;                                     // of floats and of packets
    constexpr int kStep = kDecodeWarps * kUnitColumns;                  // columns from unit to unit
    const int each = (units - warp + kDecodeWarps - 1) / kDecodeWarps;  // of a token
    int to_ask = each * tokens, left = each, ask_left = each;
    const int begin = (first + warp) * kUnitColumns + 4 * lane;
    int column = begin;
    uint32_t offset = uint32_t(begin) * kColumnBytes;
    decltype(load(x, 0, 0)) coming[kItems];
    uint32_t offsets[kItems];
    float4 gains[kItems];
    const auto ask_next = [&](int j) {
      const int known = to_ask > 0 ? column : k;  // nothing is beyond the last
      offsets[j] = offset;
      coming[j] = load(x, offset, known);
      if (kGain)
        gains[j] = load<std::is_same_v<Value, Packet>>(a.gain, uint32_t(column) * kColumnBytes, known);
      --to_ask, column += kStep, offset += kStep * kColumnBytes;
      if (--ask_left == 0) offset += (begin + k - column) * kColumnBytes, column = begin, ask_left = each;
    };
#pragma unroll
    for (int j = 0; j < kItems; ++j) ask_next(j);
    uint32_t words_at = to + warp * (kUnitColumns * 2) + words();
    uint32_t about = meta + warp * tokens * (kMeta * 4), square_at = squares + (first + warp) * tokens * 4;
#pragma unroll 1
    for (int items = each * tokens; items > 0; --items) {
      await(coming, offsets, x);
      float4 v = values(coming[0]);
      if (kGain) {
        float square = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
        if (lane == 0) store_shared(square_at, square);
        v.x *= gains[0].x, v.y *= gains[0].y, v.z *= gains[0].z, v.w *= gains[0].w;
      }
#pragma unroll
      for (int j = 0; j + 1 < kItems; ++j)
        coming[j] = coming[j + 1], offsets[j] = offsets[j + 1], gains[j] = gains[j + 1];
      ask_next(kItems - 1);
      store(words_at, about, v);
      words_at += kDecodeWarps * (kUnitColumns * 2), about += kDecodeWarps * tokens * (kMeta * 4),
          square_at += kDecodeWarps * tokens * 4;
      if (--left == 0) {
        left = each;
        words_at += stride - each * kDecodeWarps * (kUnitColumns * 2);
        about += kMeta * 4 - each * kDecodeWarps * tokens * (kMeta * 4);
        square_at += 4 - each * kDecodeWarps * tokens * 4;
      }
    }
  }
};

// A product's gains on their way to the L2 cache: a lane for each line.
__device__ inline void linear_decode_prefetch_gain(const LinearDecodeProduct& a, int warp, int lane) {
  if (!a.gain) return;
  for (int at = (warp * 32 + lane) * 32; at < a.k; at += kDecodeWarps * 32 * 32) prefetch_l2(a.gain + at);
}

}  // namespace q4s
