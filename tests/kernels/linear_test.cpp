// linear() against its definition over all formats and odd shapes, buffers guarded, with 1 to 8 parts.
#include "kernels/linear.h"

#include <cmath>
#include <memory>
#include <vector>

#include "kernels/half.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

namespace {

// Random weights of any format: about +-0.05 each, every bit pattern of the codes.
struct Weights {
  Guarded<uint8_t> data;
  Guarded<uint16_t> scales;
  WeightView view;
  Weights(Format f, int64_t n, int64_t k, int64_t group, Grid grid, uint64_t seed)
      : data(n * row_bytes(f, k)), scales(group ? n * ceil_div(k, group) : 0) {
    std::mt19937_64 rng(seed);
    fill_bytes(data.span(), seed);
    const auto put16 = [&](int64_t at, uint16_t v) { std::memcpy(data.data() + at, &v, 2); };
    const auto scale = [&](float s) {
      return float_to_half((rng() % 2 ? s : -s) * (0.5f + float(rng() % 100) / 100));
    };
    for (uint16_t& s : scales) s = scale(f == Format::kQ8 ? 0.0005f : 0.008f);
    if (f == Format::kQ8)
      for (uint8_t& c : data) c = c == 0x80 ? 0x81 : c;  // -127..127
    std::normal_distribution<float> normal(0, 0.05f);
    for (int64_t i = 0; i < n * k; ++i) {
      const float v = normal(rng);
      if (f == Format::kF32) std::memcpy(data.data() + 4 * i, &v, 4);
      if (f == Format::kF16) put16(2 * i, float_to_half(v));
      if (f == Format::kBF16) put16(2 * i, uint16_t(std::bit_cast<uint32_t>(v) >> 16));
    }
    const bool q8 = f == Format::kGgufQ8_0;
    if (q8 || f == Format::kGgufQ4_0 || f == Format::kGgufQ4_1)
      for (int64_t b = 0; b < n * k / 32; ++b) {
        const int64_t at = b * (q8 ? 34 : f == Format::kGgufQ4_0 ? 18 : 20);
        put16(at, scale(q8 ? 0.0005f : 0.008f));
        if (f == Format::kGgufQ4_1) put16(at + 2, scale(0.05f));
      }
    view = {.format = f,
            .grid = grid,
            .n = n,
            .k = k,
            .group = group,
            .data = data.data(),
            .scales = scales.data()};
  }
};

struct Scratch {
  Guarded<std::byte> bytes;
  std::byte* data;  // 64-aligned; the buffer ends at a page, so a multiple of 64 keeps it so
  explicit Scratch(size_t n) : bytes(round_up(int64_t(n), 64)), data(bytes.data()) {}
};

void run(LinearArgs a, int parts) {
  Scratch scratch(linear_scratch_bytes(a.w, a.tokens, parts));
  a.scratch = scratch.data;
  for (int i = 0; i < parts; ++i) linear_quantize(a, {i, parts});
  for (int i = 0; i < parts; ++i) linear(a, {i, parts});
}

// sum_k |w x| per output: what the rounding of f32 sums is proportional to.
std::vector<double> magnitude(const LinearArgs& a) {
  std::vector<double> m(a.tokens * a.w.n);
  std::vector<float> row(a.w.k);
  for (int64_t n = 0; n < a.w.n; ++n) {
    dequantize_rows(a.w, n, n + 1, row.data());
    for (int64_t t = 0; t < a.tokens; ++t)
      for (int64_t k = 0; k < a.w.k; ++k) m[t * a.w.n + n] += std::abs(double(row[k]) * a.x[t * a.w.k + k]);
  }
  return m;
}

void check(Format f, int64_t tokens, int64_t n, int64_t k, int64_t group = 0, Grid grid = Grid::kInt) {
  CAPTURE(int(f));
  CAPTURE(tokens);
  CAPTURE(n);
  CAPTURE(k);
  CAPTURE(group);
  Weights w(f, n, k, group, grid, uint64_t(n * 31 + k));
  Guarded<float> x(tokens * k), residual(tokens * n), want(tokens * n, NAN), y(tokens * n, NAN),
      z(tokens * n, NAN);
  fill_normal(x.span(), 1);
  fill_normal(residual.span(), 2);
  for (int with_residual = 0; with_residual < 2; ++with_residual) {
    LinearArgs a{.x = x.data(),
                 .w = w.view,
                 .residual = with_residual ? residual.data() : nullptr,
                 .y = want.data(),
                 .tokens = tokens,
                 .scratch = nullptr};
    linear_cpu(a);
    const std::vector<double> size = magnitude(a);
    a.y = y.data();
    run(a, 1);
    for (int64_t i = 0; i < tokens * n; ++i) {
      // f32 products and sums: at most k+1 roundings of relative 2^-24 each, on the sum of magnitudes.
      const double bound = (double(k) + 2) * 0x1p-24 * (size[i] + std::abs(residual[i])) + 1e-30;
      REQUIRE(std::abs(double(y[i]) - want[i]) <= bound);
    }
    a.y = z.data();
    for (int parts = 2; parts <= 8; ++parts) {
      run(a, parts);
      REQUIRE(z.same_bits(y));
    }
    if (with_residual) {  // in place
      std::copy(residual.begin(), residual.end(), z.begin());
      a.residual = z.data();
      run(a, 3);
      REQUIRE(z.same_bits(y));
    }
  }
}

}  // namespace

TEST_CASE("linear_cpu: hand-worked") {
  const float x[] = {1, 2, 3, -1, 0.5f, 0}, r[] = {100, 200, 300, 400};
  const float data[] = {1, 0, -1, 2, 2, 2};
  WeightView w{.format = Format::kF32, .n = 2, .k = 3, .data = reinterpret_cast<const uint8_t*>(data)};
  float y[4];
  linear_cpu({.x = x, .w = w, .residual = r, .y = y, .tokens = 2, .scratch = nullptr});
  CHECK(y[0] == 98);
  CHECK(y[1] == 212);
  CHECK(y[2] == 299);
  CHECK(y[3] == 399);
}

TEST_CASE("linear: float and GGUF formats against the definition") {
  for (int64_t tokens : {1, 2, 3, 5, 17})
    for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {65, 172}, {130, 64}, {64, 257}})
      for (Format f : {Format::kF32, Format::kF16, Format::kBF16}) check(f, tokens, n, k);
  for (int64_t tokens : {1, 4, 9})
    for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 32}, {67, 96}, {128, 576}})
      for (Format f : {Format::kGgufQ8_0, Format::kGgufQ4_0, Format::kGgufQ4_1}) check(f, tokens, n, k);
}

TEST_CASE("linear: quantised formats against the definition") {
  for (int64_t tokens : {1, 2, 9})
    for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {5, 33}, {66, 172}, {64, 576}})
      for (int64_t group : {int64_t(32), int64_t(64), int64_t(128), k}) {
        check(Format::kQ4, tokens, n, k, group, Grid::kInt);
        check(Format::kQ4, tokens, n, k, group, Grid::kHalf);
        check(Format::kQ8, tokens, n, k, group);
      }
}
