#include "quant/grid.h"

#include <doctest/doctest.h>

#include "kernels/half.h"
#include "runtime/error.h"
#include "tests/quant/oracle.h"

using namespace q4s;

namespace {
const GridKind kGrids[] = {GridKind::kSym7, GridKind::kSym8, GridKind::kHalf, GridKind::kSigned,
                           GridKind::kInt8};

std::vector<uint16_t> scales_of(const std::vector<float>& w, const float* weight, int64_t n, int64_t k,
                                int64_t group, GridKind kind, bool search) {
  std::vector<uint16_t> s(n * ceil_div(k, group));
  gptq_scales_cpu({w.data(), weight, s.data(), n, k, group, grid_levels(kind), search});
  return s;
}

// Weighted error of a group under one scale, in f64, nearest level by looking at all of them.
double brute_error(const float* w, const float* weight, int64_t k, const Levels& l, double scale) {
  double sum = 0;
  for (int64_t j = 0; j < k; ++j) {
    double best = w[j] * w[j];
    if (scale != 0) best = INFINITY;
    for (int q = l.low; q <= l.high && scale != 0; ++q) {
      const double e = w[j] - scale * (q + double(l.shift));
      best = std::min(best, e * e);
    }
    sum += weight[j] * best;
  }
  return sum;
}
}  // namespace

TEST_CASE("plain scales are those of the table, rounded to fp16") {
  const std::vector<float> w = {0.5f, -2.0f, 1.0f, 0.25f};
  CHECK(scales_of(w, nullptr, 1, 4, 4, GridKind::kSym7, false)[0] == float_to_half(2.0f / 7));
  CHECK(scales_of(w, nullptr, 1, 4, 4, GridKind::kSym8, false)[0] == float_to_half(2.0f / 7.5f));
  CHECK(scales_of(w, nullptr, 1, 4, 4, GridKind::kHalf, false)[0] == float_to_half(2.0f / 7.5f));
  CHECK(scales_of(w, nullptr, 1, 4, 4, GridKind::kSigned, false)[0] == float_to_half(0.25f));
  CHECK(scales_of({0.5f, 2.0f, 1.0f, 0.25f}, nullptr, 1, 4, 4, GridKind::kSigned, false)[0] ==
        float_to_half(-0.25f));
  CHECK(nearest_code(-2.0f, 0.25f, grid_levels(GridKind::kSigned)) == 0);  // the extreme is met exactly
  CHECK(nearest_code(2.0f, -0.25f, grid_levels(GridKind::kSigned)) == 0);
}

TEST_CASE("exact halves go to the even level, levels are clamped") {
  const Levels l = grid_levels(GridKind::kSigned), h = grid_levels(GridKind::kHalf);
  for (int q = -8; q < 7; ++q) {
    CHECK(int(nearest_code((float(q) + 0.5f) * 0.25f, 0.25f, l)) - 8 == (q % 2 == 0 ? q : q + 1));
    CHECK(int(nearest_code((float(q) + 1.0f) * 0.25f, 0.25f, h)) - 8 == (q % 2 == 0 ? q : q + 1));
  }
  CHECK(nearest_code(1e6f, 0.25f, l) == 15);
  CHECK(nearest_code(-1e6f, 0.25f, l) == 0);
  CHECK(nearest_code(-1e6f, 0.25f, grid_levels(GridKind::kSym7)) == 1);
  CHECK(h.value(8, 2.0f) == 1.0f);  // half step: no zero
  CHECK(h.value(7, 2.0f) == -1.0f);
}

TEST_CASE("an all-zero group has scale 0 and value 0 on every grid") {
  const std::vector<float> w(6, 0.0f);
  for (GridKind kind : kGrids) {
    for (bool search : {false, true}) {
      const auto s = scales_of(w, nullptr, 1, 6, 4, kind, search);
      CHECK(s == std::vector<uint16_t>{0, 0});
      CHECK(grid_levels(kind).value(nearest_code(0.0f, 0.0f, grid_levels(kind)), 0.0f) == 0.0f);
    }
  }
}

TEST_CASE("scale search: no worse than any candidate, by an f64 oracle; a short last group stands alone") {
  const int64_t n = 5, k = 75, group = 32;
  const std::vector<float> w = oracle::gaussian(n * k, 1, 0.3f);
  std::vector<float> weight = oracle::gaussian(k, 2);
  for (float& v : weight) v = v * v + 0.01f;
  for (GridKind kind : kGrids) {
    const Levels l = grid_levels(kind);
    const auto s = scales_of(w, weight.data(), n, k, group, kind, true);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t g = 0; g < 3; ++g) {
        const int64_t size = std::min(group, k - g * group);
        const float* row = &w[i * k + g * group];
        const float* h = &weight[g * group];
        double top = 0, best = INFINITY;
        for (int64_t j = 0; j < size; ++j) top = std::max(top, std::fabs(double(row[j])));
        for (int m = 50; m <= 120; ++m) {
          const float c = half_to_float(float_to_half(float(top) / l.reach * (float(m) / 100)));
          best = std::min(best, brute_error(row, h, size, l, c));
          if (l.negative) best = std::min(best, brute_error(row, h, size, l, -c));
        }
        CHECK(brute_error(row, h, size, l, half_to_float(s[i * 3 + g])) <= best * (1 + 1e-5));
      }
    }
  }
}

TEST_CASE("names go both ways") {
  for (const char* name : {"asym", "sym7", "sym8", "half", "signed"})
    CHECK(grid_name(parse_grid(name)) == std::string(name));
  CHECK_THROWS_AS(parse_grid("int5"), Error);
}
