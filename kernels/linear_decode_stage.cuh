// How the warps that multiply stage x in shared memory. Device code.
#pragma once
#include "kernels/linear_decode_ring.cuh"

namespace q4s {

constexpr float kXMost = 32639;  // X = 256 I + R, I and R a signed byte each

// Units of 128 columns of x, staged in the order of B fragments. Integer formats: [unit][tile][I, R][t][4
// steps of 16 columns] words of four columns, and for each group of a unit the bias -offset * sum(X). fp16:
// [unit][tile][half of a tile][t][step, pair].
//
// Half a warp has a unit, each lane two fours of columns, 8 apart, which fill words of their own. A warp has
// a token's pairs of units in turn with the other warps of the token.
template <class Tile, int kScales>
struct DecodeStaging {
  static constexpr int kMeta = linear_decode_meta(kScales);
  static constexpr int kLanes = 16;  // of a unit
  const LinearDecodeProduct& a;
  int tokens, first, units;  // first unit, number of units
  uint32_t to;       // address of (T) of `stride` bytes, an odd multiple of 64, so that no bank is hit
                     // twice
  uint32_t meta;     // address of (units, T, kMeta)
  uint32_t squares;  // address of (all units, T), with a gain: sums of squares of x
  uint32_t number;   // of the packets of x
  int stride, lane, warp;
  int inverse_tokens = linear_decode_inverse(tokens);
  // What changes with the product only, kept in registers.
  int k = int(held(uint32_t(a.k))), ragged = int(held(uint32_t(k) % kUnitColumns));
  uint32_t offset = held(uint32_t(a.offset));
  float back_of_one = held_float((a.factor == 1 ? 1.0f : 0.5f) / kXMost);

  // This lane's first column of a unit, and bytes from the unit to where its words go.
  __device__ int columns() const { return lane % kLanes / 2 * 16 + lane % 2 * 4; }
  __device__ int words() const {
    const int step = lane % 8 / 2;
    return lane % kLanes / 8 * 128 + lane % 2 * 32 +
           (Tile::kInteger ? step : step / 2 * 16 + step % 2 * 2) * 4;
  }

  // A token's x and the gains as this lane reads them: four columns from `column` on, its first of a unit,
  // and four from column + 8 on. Here they are zero from K on.
  struct Floats {
    const DecodeStaging& s;
    const float* x;
    using Value = float4;
    __device__ Floats(const DecodeStaging& s, int token) : s(s), x(s.a.x + int64_t(token) * s.k) {}
    __device__ float4 load(const float* x, int column) const {
      float4 v = make_float4(0, 0, 0, 0);
      if (s.k % 4 == 0) {
        if (column < s.k) v = __ldcg(reinterpret_cast<const float4*>(x + column));
      } else {
        if (column < s.k) v.x = __ldcg(x + column);
        if (column + 1 < s.k) v.y = __ldcg(x + column + 1);
        if (column + 2 < s.k) v.z = __ldcg(x + column + 2);
        if (column + 3 < s.k) v.w = __ldcg(x + column + 3);
      }
      return v;
    }
    __device__ void ask(float4 (&v)[2], int column) const {
      v[0] = load(x, column), v[1] = load(x, column + 8);
    }
    __device__ void ask_gains(float4 (&v)[2], int column) const {
      v[0] = load(s.a.gain, column), v[1] = load(s.a.gain, column + 8);
    }
    __device__ void await(float4 (&)[2], int) const {}
    // As they would be out of packets.
    __device__ static float4 values(const float4& v) {
      return make_float4(packet_round(v.x), packet_round(v.y), packet_round(v.z), packet_round(v.w));
    }
  };

  // The same of packets, which may not be there yet. Here K is a multiple of 4, and what stands for columns
  // from K on are others of the token.
  struct Packets {
    const DecodeStaging& s;
    const float* x[2];  // + column, as if they were floats: where the packets are
    int last[2];        // the largest `column` with a packet; without any, that of the token's first
    using Value = Packet;
    __device__ Packets(const DecodeStaging& s, int token) : s(s) {
      const int columns = s.columns(), unit = (s.k - 1) / kUnitColumns * kUnitColumns;
      const int from = s.lane % kLanes * kPacketValues - columns;
      const Packet* const row = s.a.x_packets + linear_decode_packet_place(token, s.k, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int before = from + i * (kUnitColumns / 2);  // floats that stand before the token's packet
        x[i] = held_pointer(reinterpret_cast<const float*>(row) + before);
        last[i] = int(
            held(uint32_t(max(columns + unit - (columns + unit + 8 * i < s.k ? 0 : kUnitColumns), -before))));
      }
    }
    __device__ const Packet* at(int i, int column) const {
      return reinterpret_cast<const Packet*>(x[i] + min(column, last[i]));
    }
    __device__ void ask(Packet (&v)[2], int column) const {
      v[0] = load_packet(at(0, column)), v[1] = load_packet(at(1, column));
    }
    __device__ void ask_gains(float4 (&v)[2], int column) const {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[i].x), "=f"(v[i].y), "=f"(v[i].z), "=f"(v[i].w)
                     : "l"(s.a.gain + min(column + 8 * i, s.k - 4)));
    }
    // Not 0: it is not there yet. Opaque, since the compiler would keep an equal `w` apart from the rest of a
    // packet, and wait for the packet to move it.
    __device__ uint32_t lacks(const Packet& v) const {
      uint32_t differ;
      asm("xor.b32 %0, %1, %2;" : "=r"(differ) : "r"(v.w), "r"(s.number));
      return differ;
    }
    // Each lane asks again for what it lacks.
    __device__ void await(Packet (&v)[2], int column) const {
      const auto any = [&] { return __any_sync(0xffffffffu, lacks(v[0]) | lacks(v[1])); };
      if (!any()) return;
#pragma unroll 1
      do {
        const int again = int(held(uint32_t(column)));  // addresses are not worth being known before
        const Packet *const first = at(0, again), *const second = at(1, again);
        if (lacks(v[0])) v[0] = load_packet(first);
        if (lacks(v[1])) v[1] = load_packet(second);
      } while (any());
    }
    __device__ static float4 values(const Packet& v) { return packet_values(v); }
  };

  // Of each half of a warp.
  __device__ uint32_t max_of_half(uint32_t v) const {
    const bool upper = lane >= kLanes;
    const uint32_t low = __reduce_max_sync(0xffffffffu, upper ? 0 : v);
    const uint32_t high = __reduce_max_sync(0xffffffffu, upper ? v : 0);
    return upper ? high : low;
  }
  __device__ int sum_of_half(int v) const {
    const bool upper = lane >= kLanes;
    const int low = __reduce_add_sync(0xffffffffu, upper ? 0 : v);
    const int high = __reduce_add_sync(0xffffffffu, upper ? v : 0);
    return upper ? high : low;
  }

  // to: where this lane's words of a unit go; about: the unit's meta. Addresses. v: columns 0..3 and 8..11
  // from this lane's first on.
  __device__ void store(uint32_t to, uint32_t about, const float (&v)[8], bool mine, bool leads) const {
    // Largest bits of a unit's values without their sign; those of what is no number are above all.
    const auto of_four = [&](int i) {
      return max_or_nan(max_or_nan(v[i], v[i + 1]), max_or_nan(v[i + 2], v[i + 3]));
    };
    const uint32_t top = max_of_half(__float_as_uint(max_or_nan(of_four(0), of_four(4))));
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
      // X + 128 in the last bits of a float: I is its second byte, R its first less 128.
      constexpr float kMagic = 12582912 + 128;  // 1.5 * 2^23
      uint32_t x[8];
      uint32_t minus_total = 8u * (0x4b400000u + 128);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = __float_as_uint(__fmaf_rn(v[i], up, kMagic));
#pragma unroll
      for (int i = 0; i < 8; ++i) minus_total -= x[i];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // words of t, t + 1
        const uint32_t p = __byte_perm(x[2 * i], x[2 * i + 4], 0x5410);
        const uint32_t q = __byte_perm(x[2 * i + 1], x[2 * i + 5], 0x5410);
        if (mine) {
          store_shared(to + 16 * i, __byte_perm(p, q, Tile::kHigh));
          store_shared(to + 16 * i + 64, __byte_perm(p, q, Tile::kLow) ^ 0x80808080u);
        }
      }
      if constexpr (Tile::kBits == 4) {
        constexpr int kGroup = kLanes / kScales;  // lanes
        if constexpr (kGroup == kLanes)
          minus_total = uint32_t(sum_of_half(int(minus_total)));
        else
          for (int d = kGroup / 2; d > 0; d /= 2) minus_total += __shfl_xor_sync(0xffffffffu, minus_total, d);
        const uint32_t bias = offset * minus_total;
        if (kGroup == kLanes ? leads : mine && lane % kGroup == 0)
          store_shared(about + lane % kLanes / kGroup * 4, bias);
      }
    } else if (mine) {
      store_shared_8(to, pack_half2(v[0] * up, v[1] * up), pack_half2(v[4] * up, v[5] * up));
      store_shared_8(to + 16, pack_half2(v[2] * up, v[3] * up), pack_half2(v[6] * up, v[7] * up));
    }
    if (leads) store_shared(about + (kMeta - 1) * 4, back);
  }
  // This warp's units.
  __device__ void run() const {
    if (a.x_packets)
      a.gain ? run<true, Packets>() : run<false, Packets>();
    else
      a.gain ? run<true, Floats>() : run<false, Floats>();
  }
  // Short code on purpose: it runs a few times for each product and would else wait for its instructions. One
  // pair of units is on its way while the one before it is staged; more of them are in each other's way.
  template <bool kGain, class Source>
  __device__ void run() const {
    const int sharers = kDecodeWarps * inverse_tokens >> 8, rank = warp * inverse_tokens >> 8;
    const int token = warp - rank * tokens;
    if (rank >= sharers) return;
    const int step = int(held(sharers * 2 * kUnitColumns)), end = int(held((first + units) * kUnitColumns));
    const int end_if_leads = int(held(lane % kLanes == 0 ? end : 0));
    const int unit = 2 * rank + lane / kLanes;
    int column = (first + unit) * kUnitColumns + columns(), left = int(uint32_t(units + 1) / 2) - rank;
    const Source source(*this, token);
    typename Source::Value coming[2];
    float4 gains[2];
    source.ask(coming, column);
    if (kGain) source.ask_gains(gains, column);
    uint32_t words_at = to + token * stride + unit * (kUnitColumns * 2) + words();
    uint32_t about = meta + (unit * tokens + token) * (kMeta * 4);
    uint32_t square_at = squares + ((first + unit) * tokens + token) * 4;
    const uint32_t about_step = held(2 * sharers * tokens * (kMeta * 4));
#pragma unroll 1
    for (; left > 0; left -= sharers) {
      source.await(coming, column);
      const bool mine = column < end, leads = column<end_if_leads, more = left> sharers;
      const float4 low = source.values(coming[0]), high = source.values(coming[1]);
      float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      for (float& f : v) f = held_float(f);  // before their packets' registers are asked for again
      if (more) source.ask(coming, column + step);
      for (int once = ragged; once; once = int(held(0))) {  // a loop, lest the compiler make it of predicates
        if (column >= k) v[0] = v[1] = v[2] = v[3] = 0;
        if (column + 8 >= k) v[4] = v[5] = v[6] = v[7] = 0;
      }
      if (kGain) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) square += v[i] * v[i];
        for (int d = kLanes / 2; d > 0; d /= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
        if (leads) store_shared(square_at, square);
        const float4 &g = gains[0], &h = gains[1];
        v[0] *= g.x, v[1] *= g.y, v[2] *= g.z, v[3] *= g.w, v[4] *= h.x, v[5] *= h.y, v[6] *= h.z,
            v[7] *= h.w;
        for (float& f : v) f = held_float(f);
        if (more) source.ask_gains(gains, column + step);
      }
      store(words_at, about, v, mine, leads);
      column = int(held(uint32_t(column + step))), words_at = held(words_at + 2 * step);
      about = held(about + about_step), square_at = held(square_at + about_step / kMeta);
    }
  }
};

// A product's gains on their way to the L2 cache: a lane for each line.
__device__ inline void linear_decode_prefetch_gain(const LinearDecodeProduct& a, int warp, int lane) {
  if (!a.gain) return;
  for (int at = (warp * 32 + lane) * 32; at < a.k; at += kDecodeWarps * 32 * 32) prefetch_l2(a.gain + at);
}

}  // namespace q4s
