// Hand-worked rows of every storage format, and the row arithmetic of types.h.
#include <vector>

#include "kernels/half.h"
#include "kernels/linear.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

constexpr uint16_t kOne = 0x3c00, kHalf = 0x3800, kMinusTwo = 0xc000;  // fp16 1, 0.5, -2

std::vector<float> row_of(const WeightView& w, int64_t n) {
  std::vector<float> y(w.k);
  dequantize_rows(w, n, n + 1, y.data());
  return y;
}

}  // namespace

TEST_CASE("kQ4: even column low, signed scales, short last group, odd K") {
  const uint8_t data[] = {0x21, 0x0f, 0x08, /* row 1 */ 0x98, 0xff, 0x07};
  const uint16_t scales[] = {kOne, kMinusTwo, kHalf, kOne};
  WeightView w{.format = Format::kQ4, .n = 2, .k = 5, .group = 3, .data = data, .scales = scales};
  CHECK(row_of(w, 0) == std::vector<float>{-7, -6, 7, 16, 0});
  CHECK(row_of(w, 1) == std::vector<float>{0, 0.5f, 3.5f, 7, -1});
  w.grid = Grid::kHalf;
  CHECK(row_of(w, 0) == std::vector<float>{-6.5f, -5.5f, 7.5f, 15, -1});
}

TEST_CASE("kQ8 and the float formats") {
  const uint8_t q8[] = {127, 0x81, 3};
  const uint16_t scales[] = {kHalf, kMinusTwo};
  CHECK(row_of({.format = Format::kQ8, .n = 1, .k = 3, .group = 2, .data = q8, .scales = scales}, 0) ==
        std::vector<float>{63.5f, -63.5f, -6});
  const uint16_t f16[] = {kOne, 0x0001, 0xfbff};
  const uint8_t* rows[] = {reinterpret_cast<const uint8_t*>(f16)};
  CHECK(row_of({.format = Format::kF16, .n = 1, .k = 3, .rows = rows}, 0) ==
        std::vector<float>{1, 0x1p-24f, -65504});
  const uint16_t bf16[] = {0x3f80, 0xc000, 0x0001};
  rows[0] = reinterpret_cast<const uint8_t*>(bf16);
  CHECK(row_of({.format = Format::kBF16, .n = 1, .k = 3, .rows = rows}, 0) ==
        std::vector<float>{1, -2, 0x1p-133f});
  const float f32[] = {1.5f, -0.f, 3e38f};
  rows[0] = reinterpret_cast<const uint8_t*>(f32);
  CHECK(row_of({.format = Format::kF32, .n = 1, .k = 3, .rows = rows}, 0) ==
        std::vector<float>{1.5f, 0, 3e38f});
}

TEST_CASE("GGUF blocks: byte i of a nibble block holds columns i and i + 16") {
  uint8_t q4_0[36] = {0x00, 0x38, 0x9f};  // d = 0.5; column 0 = 15 - 8, column 16 = 9 - 8, the others 0 - 8
  q4_0[18 + 1] = 0x3c;                    // second block: d = 1
  q4_0[18 + 17] = 0xf8;                   // column 15 = 0, column 31 = 7
  std::vector<float> y = row_of({.format = Format::kGgufQ4_0, .n = 1, .k = 64, .data = q4_0}, 0);
  CHECK(y[0] == 3.5f);
  CHECK(y[16] == 0.5f);
  CHECK(y[1] == -4);
  CHECK(y[31] == -4);
  CHECK(y[32 + 15] == 0);
  CHECK(y[32 + 31] == 7);
  uint8_t q4_1[20] = {0x00, 0x38, 0x00, 0xc0, 0x9f};  // d = 0.5, m = -2
  y = row_of({.format = Format::kGgufQ4_1, .n = 1, .k = 32, .data = q4_1}, 0);
  CHECK(y[0] == 5.5f);
  CHECK(y[16] == 2.5f);
  CHECK(y[15] == -2);
  uint8_t q8_0[34] = {0x00, 0xc0, 0x80, 0x7f};  // d = -2
  y = row_of({.format = Format::kGgufQ8_0, .n = 1, .k = 32, .data = q8_0}, 0);
  CHECK(y[0] == 256);
  CHECK(y[1] == -254);
  CHECK(y[31] == 0);
}

TEST_CASE("Part: shares cover everything once, whatever the count") {
  for (int64_t n : {0, 1, 7, 64, 1000})
    for (int64_t grain : {1, 3, 64})
      for (int count = 1; count <= 8; ++count) {
        int64_t next = 0;
        for (int i = 0; i < count; ++i) {
          const auto [begin, end] = Part{i, count}.of(n, grain);
          REQUIRE(begin == next);
          REQUIRE((begin == end || begin % grain == 0));
          next = end;
        }
        REQUIRE(next == n);
      }
}
