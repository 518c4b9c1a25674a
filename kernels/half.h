// IEEE half and bfloat16 bits <-> float on the host, round to nearest even. Portable; the wide paths use
// hardware.
#pragma once
#include <bit>
#include <cstdint>

namespace q4s {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu;
  if (exp == 31) return std::bit_cast<float>(sign | 0x7f800000u | man << 13);
  if (exp == 0) {  // zero or subnormal: man * 2^-24, exact in float
    const float v = float(man) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(v) | sign);
  }
  return std::bit_cast<float>(sign | (exp + 112u) << 23 | man << 13);
}

// Overflow goes to infinity, as the hardware conversion does.
inline uint16_t float_to_half(float f) {
  const uint32_t x = std::bit_cast<uint32_t>(f), sign = (x >> 16) & 0x8000u, a = x & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (a < 0x38800000u) {                                  // subnormal half: ulp 2^-24
    const float v = std::bit_cast<float>(a) + 0.5f;       // the adder rounds at 2^-24 for us
    return uint16_t(sign | (std::bit_cast<uint32_t>(v) - 0x3f000000u));
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
  return uint16_t(sign | (r - 0x38000000u) >> 13);
}

inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

}  // namespace q4s
