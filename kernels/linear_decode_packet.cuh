// How values travel between the products of a chain: as packets of 16 bytes, four neighbours, each a float
// rounded to 16 significant bits, and the number of the product that made them, stored at once. A reader
// needs no barrier and no fence: it loads until the number is right. Device code.
#pragma once
#include "kernels/linear_decode_config.h"
#include "kernels/ptx.cuh"

namespace q4s {

// Bits 0..23 of x, y, z hold the first three values, bits 24..31 the fourth; w the number.
using Packet = uint4;

__device__ inline Packet load_packet(const Packet* p) {
  uint64_t low, high;
  asm volatile("{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return {uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)};
}
// The bits of v, rounded, above bit 7. What is no number stays none.
__device__ inline uint32_t packet_bits(float v) { return v != v ? 0x7fc00000u : __float_as_uint(v) + 0x80; }
__device__ inline float packet_round(float v) { return __uint_as_float(packet_bits(v) & 0xffffff00u); }
__device__ inline void store_packet(Packet* p, const float (&v)[kPacketValues], uint32_t number) {
  const uint32_t fourth = packet_bits(v[3]);
  const uint32_t x = __byte_perm(packet_bits(v[0]), fourth, 0x5321);
  const uint32_t y = __byte_perm(packet_bits(v[1]), fourth, 0x6321);
  const uint32_t z = __byte_perm(packet_bits(v[2]), fourth, 0x7321);
  asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v;\n}" ::"l"(p),
               "l"(uint64_t(y) << 32 | x), "l"(uint64_t(number) << 32 | z)
               : "memory");
}
__device__ inline float4 packet_values(const Packet& p) {
  const uint32_t fourth = __byte_perm(__byte_perm(p.x, p.y, 0x7300), p.z, 0x7320) & 0xffffff00u;
  return make_float4(__uint_as_float(p.x << 8), __uint_as_float(p.y << 8), __uint_as_float(p.z << 8),
                     __uint_as_float(fourth));
}
// One value of each lane of a warp; those of four neighbours, kApart lanes from each other, become a packet
// that the first of them stores if it has a place. For all lanes of a warp.
template <int kApart>
__device__ inline void store_packets(Packet* p, float value, uint32_t number, int lane, bool mine) {
  float v[kPacketValues] = {value};
#pragma unroll
  for (int i = 1; i < kPacketValues; ++i) v[i] = __shfl_down_sync(0xffffffffu, value, i * kApart);
  if (mine && lane / kApart % kPacketValues == 0) store_packet(p, v, number);
}

}  // namespace q4s
