// All 65536 halves, and float -> half at and beside every boundary between two halves.
#include "kernels/half.h"

#include <cmath>
#include <cstring>

#include "doctest/doctest.h"

using namespace q4s;

namespace {

// The value of a finite half by its definition.
double value_of(uint16_t h) {
  const int exp = h >> 10 & 31, man = h & 1023;
  const double v = exp == 0 ? std::ldexp(man, -24) : std::ldexp(1024 + man, exp - 25);
  return h & 0x8000 ? -v : v;
}

}  // namespace

TEST_CASE("half_to_float: every half") {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = half_to_float(uint16_t(h));
    if ((h & 0x7c00) == 0x7c00) {
      if (h & 0x3ff) {
        REQUIRE(std::isnan(f));
      } else {
        REQUIRE(std::isinf(f));
      }
    } else {
      REQUIRE(double(f) == value_of(uint16_t(h)));
      REQUIRE(float_to_half(f) == h);
    }
    REQUIRE(std::signbit(f) == bool(h & 0x8000));
  }
}

TEST_CASE("float_to_half: nearest, ties to even, at every boundary") {
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    const double low = value_of(uint16_t(h)), high = h == 0x7bff ? 65536 : value_of(uint16_t(h + 1));
    const float tie = float((low + high) / 2);  // exact: one bit more than a half
    const uint16_t even = uint16_t(h & 1 ? h + 1 : h);
    for (int sign = 0; sign < 2; ++sign) {
      const uint16_t s = uint16_t(sign << 15);
      const float t = sign ? -tie : tie, out = sign ? -INFINITY : INFINITY;
      REQUIRE(float_to_half(t) == (s | even));
      REQUIRE(float_to_half(std::nextafter(t, 0.f)) == (s | h));
      REQUIRE(float_to_half(std::nextafter(t, out)) == (s | (h + 1)));
    }
  }
  CHECK(float_to_half(INFINITY) == 0x7c00);
  CHECK(float_to_half(-3e38f) == 0xfc00);
  CHECK(float_to_half(-0.f) == 0x8000);
  CHECK(float_to_half(1e-45f) == 0);
  CHECK((float_to_half(NAN) & 0x7c00) == 0x7c00);
  CHECK((float_to_half(NAN) & 0x3ff) != 0);
}

TEST_CASE("bf16_to_float: every bfloat16 is the upper half of its float") {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = bf16_to_float(uint16_t(h));
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    REQUIRE(bits == h << 16);
  }
}
