// linear() against its definition over all formats, instruction sets and odd shapes, buffers guarded, with 1
// to 8 parts. kQ4 and kQ8 are held to two bounds: to the exact sum over the activations that the contract
// rounds to int8 only f32 rounding may show, and to the definition only that rounding to int8 may add.
#include "kernels/linear.h"

#include <cmath>
#include <memory>
#include <vector>

#include "kernels/half.h"
#include "tests/kernels/cpu_levels.h"
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
  for (int i = 0; i < parts; ++i) linear_prepare(a, {i, parts});
  for (int i = 0; i < parts; ++i) linear(a, {i, parts});
}

// The activations that linear() computes with, and how far each may be from the given one.
struct Rounded {
  std::vector<double> x, off;
};
Rounded rounded_activations(const LinearArgs& a) {
  Rounded r;
  const bool int8 = a.w.format == Format::kQ4 || a.w.format == Format::kQ8;
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t b = 0; b < a.w.k; b += 32) {
      const float* x = a.x + t * a.w.k + b;
      const int64_t n = std::min<int64_t>(32, a.w.k - b);
      float top = 0;
      for (int64_t i = 0; i < n; ++i) top = std::max(top, std::abs(x[i]));
      const float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
      for (int64_t i = 0; i < n; ++i) {
        r.x.push_back(int8 ? double(scale) * std::nearbyint(x[i] * inverse) : x[i]);
        // Half a step, and the roundings of scale, inverse and their product with x: 127 * 3 * 2^-24 steps.
        r.off.push_back(int8 ? scale * (0.5 + 127 * 4 * 0x1p-24) : 0);
      }
    }
  return r;
}

void check(Format f, int64_t tokens, int64_t n, int64_t k, int64_t group = 0, Grid grid = Grid::kInt) {
  CAPTURE(int(f));
  CAPTURE(int(grid));
  CAPTURE(tokens);
  CAPTURE(n);
  CAPTURE(k);
  CAPTURE(group);
  Weights w(f, n, k, group, grid, uint64_t(n * 31 + k));
  Guarded<float> x(tokens * k), residual(tokens * n), want(tokens * n, NAN), y(tokens * n, NAN),
      z(tokens * n, NAN);
  fill_normal(x.span(), 1);
  fill_normal(residual.span(), 2);
  std::vector<float> rows(n * k);
  dequantize_rows(w.view, 0, n, rows.data());
  for (int with_residual = 0; with_residual < 2; ++with_residual) {
    LinearArgs a{.x = x.data(),
                 .w = w.view,
                 .residual = with_residual ? residual.data() : nullptr,
                 .y = want.data(),
                 .tokens = tokens,
                 .scratch = nullptr};
    linear_cpu(a);
    const Rounded r = rounded_activations(a);
    a.y = y.data();
    run(a, 1);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = t * n + i;
        double exact = with_residual ? residual[at] : 0, size = std::abs(exact), off = 0;
        for (int64_t j = 0; j < k; ++j) {
          const double v = rows[i * k + j];
          exact += v * r.x[t * k + j];
          size += std::abs(v * r.x[t * k + j]);
          off += std::abs(v) * r.off[t * k + j];
        }
        // At most k + 3 roundings of relative 2^-24 lie between a product and y; their sum is `size` at most.
        const double rounding = double(k + 3) * 0x1p-24 * size + 1e-30;
        REQUIRE(std::abs(y[at] - exact) <= rounding);
        REQUIRE(std::abs(double(y[at]) - want[at]) <= rounding + off);
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
  on_every_level([] {
    for (int64_t tokens : {1, 2, 3, 5, 17})
      for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {65, 172}, {130, 64}, {64, 257}})
        for (Format f : {Format::kF32, Format::kF16, Format::kBF16}) check(f, tokens, n, k);
    for (int64_t tokens = 5; tokens < 34; ++tokens)
      check(Format::kF32, tokens, 35, 40);  // every rest of a tile
    check(Format::kF16, 15, 70, 2500);      // several depths
    for (int64_t tokens : {1, 4, 9})
      for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 32}, {67, 96}, {128, 576}})
        for (Format f : {Format::kGgufQ8_0, Format::kGgufQ4_0, Format::kGgufQ4_1}) check(f, tokens, n, k);
  });
}

TEST_CASE("linear: kQ4 and kQ8 on int8 activations") {
  on_every_level([] {
    for (int64_t tokens : {1, 2, 3, 4, 5, 14, 31})
      for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {5, 33}, {66, 172}, {70, 576}, {19, 1100}})
        for (int64_t group : {int64_t(32), int64_t(64), int64_t(128), k}) {
          check(Format::kQ4, tokens, n, k, group, Grid::kInt);
          check(Format::kQ4, tokens, n, k, group, Grid::kHalf);
          check(Format::kQ8, tokens, n, k, group);
        }
  });
}

TEST_CASE("linear: groups that int8 activations do not serve are unpacked") {
  on_every_level([] {
    for (int64_t tokens : {1, 6}) {
      Weights w(Format::kQ4, 9, 100, 48, Grid::kHalf, 4);
      Guarded<float> x(tokens * 100), want(tokens * 9), y(tokens * 9);
      fill_normal(x.span(), 1);
      LinearArgs a{x.data(), w.view, nullptr, want.data(), tokens, nullptr};
      linear_cpu(a);
      a.y = y.data();
      run(a, 2);
      for (int64_t i = 0; i < y.size(); ++i) REQUIRE(std::abs(y[i] - want[i]) <= 1e-5f);
    }
  });
}

TEST_CASE("linear: exact activations") {
  set_exact_activations(true);
  on_every_level([] {
    for (Format format : {Format::kQ4, Format::kQ8})
      for (int64_t tokens : {1, 6, 40}) {
        const int64_t n = 37, k = 256;
        Weights w(format, n, k, 128, Grid::kInt, 4);
        Guarded<float> x(tokens * k), want(tokens * n), y(tokens * n);
        fill_normal(x.span(), 1);
        LinearArgs a{x.data(), w.view, nullptr, want.data(), tokens, nullptr};
        linear_cpu(a);
        a.y = y.data();
        run(a, 2);
        for (int64_t i = 0; i < y.size(); ++i)
          REQUIRE(std::abs(y[i] - want[i]) <= 1e-5f * (1 + std::abs(want[i])));
      }
  });
  set_exact_activations(false);
}

TEST_CASE("linear: extreme codes do not overflow the integer sums") {
  on_every_level([] {
    for (int64_t tokens : {1, 16})
      for (auto [format, code] : {std::pair<Format, uint8_t>{Format::kQ4, 0x00},
                                  {Format::kQ4, 0xff},
                                  {Format::kQ8, 0x7f},
                                  {Format::kQ8, 0x81},
                                  {Format::kQ8, 0x80}})
        for (Grid grid : {Grid::kInt, Grid::kHalf})
          for (float value : {1.f, -1.f}) {
            const int64_t n = 17, k = 640;
            Guarded<uint8_t> data(n * row_bytes(format, k), code);
            Guarded<uint16_t> scales(n * k / 128, 0x3c00);  // 1
            Guarded<float> x(tokens * k, value), y(tokens * n);
            LinearArgs a{.x = x.data(),
                         .w = {.format = format,
                               .grid = grid,
                               .n = n,
                               .k = k,
                               .group = 128,
                               .data = data.data(),
                               .scales = scales.data()},
                         .residual = nullptr,
                         .y = y.data(),
                         .tokens = tokens,
                         .scratch = nullptr};
            run(a, 1);
            const float w = format == Format::kQ8 ? float(int8_t(code))
                                                  : float(code & 15) - (grid == Grid::kInt ? 8.f : 7.5f);
            for (float v : y) REQUIRE(std::abs(v - w * value * k) <= std::abs(w * k) * 1e-5);
          }
  });
}

TEST_CASE("linear: a NaN or infinity in x reaches y; zeros and denormals are harmless") {
  on_every_level([] {
    for (Format f : {Format::kQ4, Format::kQ8})
      for (int64_t tokens : {1, 20}) {
        Weights w(f, 16, 256, 64, Grid::kInt, 5);
        Guarded<float> x(tokens * 256), y(tokens * 16);
        LinearArgs a{.x = x.data(),
                     .w = w.view,
                     .residual = nullptr,
                     .y = y.data(),
                     .tokens = tokens,
                     .scratch = nullptr};
        run(a, 1);
        for (float v : y) REQUIRE(v == 0);
        for (float& v : x) v = 1e-40f;
        run(a, 1);
        for (float v : y) REQUIRE(std::abs(v) < 1e-30f);
        for (float bad : {NAN, INFINITY, -INFINITY}) {
          fill_normal(x.span(), 3);
          x[77] = bad;  // token 0
          run(a, 1);
          for (int i = 0; i < 16; ++i) REQUIRE(!std::isfinite(y[i]));
          for (int64_t i = 16; i < y.size(); ++i) REQUIRE(std::isfinite(y[i]));
        }
      }
  });
}

TEST_CASE("linear: row pointers are followed") {
  on_every_level([] {
    for (Format f : {Format::kF16, Format::kQ4, Format::kQ8, Format::kGgufQ4_1})
      for (int64_t tokens : {1, 20}) {
        Weights w(f, 40, 64, 32, Grid::kInt, 9);
        std::vector<const uint8_t*> rows;
        for (int64_t i = 0; i < 40; ++i) rows.push_back(w.view.row(i));
        Guarded<float> x(tokens * 64), y(tokens * 40), z(tokens * 40);
        fill_normal(x.span(), 3);
        LinearArgs a{.x = x.data(),
                     .w = w.view,
                     .residual = nullptr,
                     .y = y.data(),
                     .tokens = tokens,
                     .scratch = nullptr};
        run(a, 1);
        a.w.data = nullptr;
        a.w.rows = rows.data();
        a.y = z.data();
        run(a, 2);
        REQUIRE(z.same_bits(y));
      }
  });
}

TEST_CASE("dequantize_rows: the same bits at every level") {
  for (Format f : {Format::kF32, Format::kF16, Format::kBF16, Format::kQ4, Format::kQ8, Format::kGgufQ8_0,
                   Format::kGgufQ4_0, Format::kGgufQ4_1})
    for (int64_t k : {int64_t(32), int64_t(96), int64_t(171)}) {
      if (k % 32 && f > Format::kQ4) continue;
      Weights w(f, 7, k, 64, Grid::kHalf, uint64_t(k));
      Guarded<float> want(7 * k), y(7 * k);
      set_cpu_level(CpuLevel::kPortable);
      dequantize_rows(w.view, 0, 7, want.data());
      on_every_level([&] {
        dequantize_rows(w.view, 0, 7, y.data());
        REQUIRE(y.same_bits(want));
      });
    }
  // Every half, NaN apart: exact.
  Guarded<uint16_t> halves(65536);
  for (int i = 0; i < 65536; ++i) halves[i] = uint16_t(i);
  Guarded<float> y(65536);
  on_every_level([&] {
    dequantize_rows(
        {.format = Format::kF16, .n = 1, .k = 65536, .data = reinterpret_cast<uint8_t*>(halves.data())}, 0, 1,
        y.data());
    for (int i = 0; i < 65536; ++i) {
      const float want = half_to_float(uint16_t(i));
      REQUIRE((std::isnan(want) ? std::isnan(y[i])
                                : std::bit_cast<uint32_t>(want) == std::bit_cast<uint32_t>(y[i])));
    }
  });
}
