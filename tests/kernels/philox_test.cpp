#include "kernels/philox.h"

#include <doctest/doctest.h>

#include <cmath>

using namespace q4s;

// Known answers of the authors' Random123 distribution (kat_vectors, philox4x32 10).
TEST_CASE("philox4x32-10 gives the published numbers") {
  auto check = [](Philox4 counter, uint32_t key0, uint32_t key1, Philox4 expected) {
    const Philox4 got = philox4x32(counter, key0, key1);
    for (int i = 0; i < 4; ++i) CHECK(got.x[i] == expected.x[i]);
  };
  check({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
        {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST_CASE("uniform numbers fill [0, 1) evenly, and sequences differ") {
  constexpr int kDraws = 100000, kBins = 20;
  int bins[kBins] = {};
  double sum = 0, product = 0;
  for (int step = 0; step < kDraws; ++step) {
    const double a = philox_uniform(7, 0, step), b = philox_uniform(7, 1, step);
    REQUIRE((a >= 0 && a < 1));
    ++bins[static_cast<int>(a * kBins)];
    sum += a;
    product += (a - 0.5) * (b - 0.5);
  }
  CHECK(std::abs(sum / kDraws - 0.5) < 5 * std::sqrt(1.0 / 12 / kDraws));
  CHECK(std::abs(product / kDraws) < 5.0 / 12 / std::sqrt(kDraws));
  double chi2 = 0;
  for (int count : bins) chi2 += std::pow(count - kDraws / kBins, 2) / (kDraws / kBins);
  CHECK(chi2 < 50);  // 19 degrees of freedom: 1 in 10^4
  CHECK(philox_uniform(7, 0, 3) == philox_uniform(7, 0, 3));
  CHECK(philox_uniform(7, 0, uint64_t{1} << 32) != philox_uniform(7, 0, 0));
  CHECK(philox_uniform(uint64_t{1} << 32, 0, 0) != philox_uniform(0, 0, 0));
}
