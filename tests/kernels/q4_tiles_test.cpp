// The packed order of q4_tiles.h, read back the way a kernel's lane does, for every row map.
#include "kernels/q4_tiles.h"

#include <set>
#include <vector>

#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

// Code at (packed row, column), by the nibble masks of an A fragment.
int read_code(const uint8_t* codes, int64_t k_tiles, int64_t row, int64_t column) {
  const int r = int(row % 16), c = int(column % 64), in_step = c % 16;
  const int lane = r % 8 * 4 + in_step % 8 / 2, word_index = c / 16;
  uint32_t w;
  std::memcpy(&w, codes + ((row / 16 * k_tiles + column / 64) * 32 + lane) * 16 + word_index * 4, 4);
  const uint32_t shifted = in_step >= 8 ? w >> 8 : w;
  const uint32_t pair = r < 8 ? shifted & 0x000f000fu : (shifted & 0x00f000f0u) >> 4;
  return in_step % 2 ? pair >> 16 : pair & 15;
}

void check(Q4Layout l) {
  CAPTURE(l.n);
  CAPTURE(l.k);
  CAPTURE(l.group);
  const int64_t stride = (l.k + 1) / 2, groups = l.groups();
  Guarded<uint8_t> codes(l.n * stride), packed(l.code_bytes());
  Guarded<uint16_t> scales(l.n * groups), packed_scales(l.scale_bytes() / 2, 0xffff);
  fill_bytes(codes.span(), 1);
  for (int64_t i = 0; i < scales.size(); ++i) scales[i] = uint16_t(i * 7 + 1);
  q4_pack_cpu(l, {codes.data(), scales.data()}, packed.data(), packed_scales.data());
  std::set<int64_t> seen;
  for (int64_t p = 0; p < l.n_tiles() * 16; ++p) {
    const int64_t row = l.file_row(p);
    if (row >= 0) REQUIRE(seen.insert(row).second);
    for (int64_t c = 0; c < l.k_tiles() * 64; ++c) {
      const int want = row < 0 || c >= l.k ? 8 : codes[row * stride + c / 2] >> (c % 2 * 4) & 15;
      REQUIRE(read_code(packed.data(), l.k_tiles(), p, c) == want);
    }
    for (int64_t g = 0; g < groups; ++g)
      REQUIRE(packed_scales[(p / 16 * groups + g) * 16 + p % 16] == (row < 0 ? 0 : scales[row * groups + g]));
  }
  CHECK(int64_t(seen.size()) == l.n);  // every row of the file once
}

}  // namespace

TEST_CASE("q4 tiles: every code and scale where a lane looks for it") {
  for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {16, 64}, {17, 172}, {48, 257}, {66, 576}})
    for (int64_t group : {int64_t(32), int64_t(64), int64_t(128), k}) check({.n = n, .k = k, .group = group});
  for (int64_t n : {2, 14, 16, 32, 344}) check({.n = n, .k = 96, .group = 32, .map = RowMap::kPairHalves});
  for (int64_t hd : {16, 48, 64, 96})
    check({.n = 8 * hd, .k = 100, .group = 64, .map = RowMap::kRope, .head_dim = hd, .rotated = 6 * hd});
}

TEST_CASE("q4 tiles: int8 and fp16 pieces") {
  for (int bits : {8, 16}) {
    const Q4Layout l{.n = 35, .k = 100, .group = 64, .bits = bits};
    const int size = bits / 8;
    Guarded<uint8_t> values(l.n * l.k * size), packed(l.code_bytes());
    Guarded<uint16_t> scales(l.n * 2), packed_scales(l.scale_bytes() / 2);
    fill_bytes(values.span(), 3);
    q4_pack_cpu(l, {values.data(), scales.data()}, packed.data(), packed_scales.data());
    for (int64_t tile = 0; tile < l.n_tiles() * l.k_tiles(); ++tile)
      for (int step = 0; step < 4; ++step)
        for (int lane = 0; lane < 32; ++lane)
          for (int reg = 0; reg < 4; ++reg)  // a0a1 | a2a3 | a4a5 | a6a7 of an A fragment
            for (int half = 0; half < 2; ++half) {
              const int64_t row = tile / l.k_tiles() * 16 + lane / 4 + reg % 2 * 8;
              const int64_t column = tile % l.k_tiles() * 64 + step * 16 + lane % 4 * 2 + reg / 2 * 8 + half;
              const int64_t at = bits == 8 ? tile * 1024 + (step / 2 * 32 + lane) * 16 + step % 2 * 8 +
                                                 reg % 2 * 4 + reg / 2 * 2 + half
                                           : tile * 2048 + (step * 32 + lane) * 16 + reg * 4 + half * 2;
              for (int b = 0; b < size; ++b)
                REQUIRE(packed[at + b] ==
                        (row >= l.n || column >= l.k ? 0 : values[(row * l.k + column) * size + b]));
            }
  }
}

TEST_CASE("q4 tiles: partners of an epilogue are rows r and r+8 of a tile") {
  const Q4Layout pair{.n = 48, .k = 64, .group = 64, .map = RowMap::kPairHalves};
  const Q4Layout rope{
      .n = 4 * 32, .k = 64, .group = 64, .map = RowMap::kRope, .head_dim = 32, .rotated = 3 * 32};
  for (int64_t t = 0; t < 3; ++t)
    for (int64_t r = 0; r < 8; ++r) {
      CHECK(pair.file_row(16 * t + r) == 8 * t + r);
      CHECK(pair.file_row(16 * t + r + 8) == 24 + 8 * t + r);
    }
  for (int64_t t = 0; t < 6; ++t)
    for (int64_t r = 0; r < 8; ++r) {
      CHECK(rope.file_row(16 * t + r) == t / 2 * 32 + t % 2 * 8 + r);
      CHECK(rope.file_row(16 * t + r + 8) == t / 2 * 32 + t % 2 * 8 + r + 16);
    }
  for (int64_t p = 96; p < 128; ++p) CHECK(rope.file_row(p) == p);
}
