// Every cut covers every row and column once, fits shared memory and leaves nothing misaligned, over real and
// odd shapes.
#include "kernels/linear_decode_config.h"

#include <doctest/doctest.h>

using namespace q4s;

namespace {

constexpr int kShared = 227 * 1024;

void check(const Q4Layout& l, int tokens, bool norm, int multiprocessors) {
  CAPTURE(l.n);
  CAPTURE(l.k);
  CAPTURE(l.group);
  CAPTURE(l.bits);
  CAPTURE(tokens);
  const LinearDecodeConfig c = linear_decode_config(l, tokens, norm, multiprocessors, kShared);
  REQUIRE(c.tokens >= 1);
  REQUIRE(c.tokens <= tokens);
  if (multiprocessors == 1 && c.shared > kShared) return;  // all rows of a wide weight in one block: refused
  REQUIRE(c.shared <= kShared);
  // Rows of the blocks.
  REQUIRE(c.blocks >= 1);
  REQUIRE(c.blocks <= multiprocessors);
  REQUIRE(int64_t(c.blocks) * c.rows + c.more_rows == l.n_tiles());
  REQUIRE(c.more_rows < c.blocks);
  // Units of the phases and slices.
  REQUIRE(c.slices <= kDecodeWarps);
  REQUIRE(c.slices <= c.units);
  REQUIRE(int64_t(c.phases) * c.units + c.more_units == (l.k_tiles() + 1) / 2);
  REQUIRE(c.more_units < c.phases);
  REQUIRE(c.slice_units == (c.units + (c.more_units > 0) + c.slices - 1) / c.slices);
  if (c.slices < kDecodeWarps) REQUIRE(c.slices == c.units);
  if (c.phases > 1) REQUIRE(c.round == c.rows + (c.more_rows > 0));
  REQUIRE(c.round >= 1);
  // Places: in order, 16-aligned where 16 bytes are copied or read at once, 8-aligned where 8 are.
  const int64_t x = kDecodeWarps * c.tokens * (c.slice_units * 256 + 64);
  REQUIRE(c.x == kDecodeWarps * kDecodeRing);
  REQUIRE(c.bias == c.x + x);
  for (int at : {c.x, c.bias, c.gain, c.scales}) REQUIRE(at % 16 == 0);
  for (int at : {c.x_scale, c.barriers}) REQUIRE(at % 8 == 0);
  for (auto [first, second] : {std::pair{c.bias, c.x_scale},
                               {c.x_scale, c.scales},
                               {c.gain, c.squares},
                               {c.scales, c.partial},
                               {c.partial, c.squares},
                               {c.squares, c.early},
                               {c.early, c.barriers},
                               {c.barriers, c.shared}})
    REQUIRE(first <= second);
  REQUIRE(c.partial - c.scales >= c.round * l.groups() * 32);
  const int64_t sums = int64_t(c.round) * c.slices * 16 * c.tokens * 4;
  REQUIRE(c.squares - c.partial >= sums);
  if (norm) REQUIRE(c.squares - c.gain >= kDecodeWarps * c.slice_units * 128 * 4);
  if (norm && c.phases > 1) REQUIRE(c.gain - c.partial >= sums);
}

}  // namespace

TEST_CASE("linear_decode_config: odd and real shapes") {
  for (int64_t n : {1, 17, 576, 4096, 22016, 57344, 128256})
    for (int64_t k : {1, 64, 65, 172, 576, 1536, 4096, 11008, 14336, 28672})
      for (int bits : {4, 8, 16})
        for (int64_t group : {int64_t(32), int64_t(64), int64_t(128), k})
          for (int tokens : {1, 3, 8, 16})
            for (bool norm : {false, k <= 8192})  // as wide as a residual stream
              for (int multiprocessors : {1, 132})
                check({.n = n, .k = k, .group = group, .bits = bits}, tokens, norm, multiprocessors);
}

TEST_CASE("linear_decode_config: eight tokens read the weights of every model once") {
  for (int64_t k : {4096, 5120, 8192, 11008, 13824, 14336, 28672})
    CHECK(linear_decode_config({.n = 8192, .k = k, .group = 128}, 8, false, 132, kShared).tokens == 8);
}
