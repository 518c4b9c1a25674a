#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/half.h"
#include "kernels/split_product.h"
#include "tests/kernels/device_guarded.h"

using namespace q4s;

namespace {

// Values of very different size from row to row and from column to column.
std::vector<float> values(int64_t rows, int64_t cols) {
  std::mt19937 rng(uint32_t(rows * 131 + cols));
  std::normal_distribution<float> normal;
  std::vector<float> v(rows * cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      v[i * cols + j] = normal(rng) * std::ldexp(1.0f, int(i * 7 % 41 - 20 + j * 5 % 19 - 9));
  return v;
}

struct Split {
  int64_t rows, cols, ld;
  DeviceGuarded<uint16_t> high, low;
  DeviceGuarded<float> scale;
  SplitMatrix s;
  Split(int64_t r, int64_t c, bool by_column)
      : rows(r), cols(c), ld((c + 7) / 8 * 8), high(r * ld), low(r * ld), scale(by_column ? c : r) {
    s = {high.data(), low.data(), scale.data(), r, c, by_column};
  }
};

}  // namespace

TEST_CASE("cuda split: two fp16 numbers and a power of two keep a value's first 22 bits") {
  if (no_device()) return;
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {130, 77}, {257, 640}})
    for (const bool by_column : {false, true}) {
      CAPTURE(rows);
      CAPTURE(by_column);
      std::vector<float> v = values(rows, cols);
      for (int64_t j = 0; j < cols; ++j) v[(rows - 1) * cols + j] = 0;  // a row of zeros
      DeviceGuarded<float> x(v);
      Split to(rows, cols, by_column);
      split_cuda(x.data(), to.s, nullptr);
      const std::vector<uint16_t> high = to.high.get(), low = to.low.get();
      const std::vector<float> scale = to.scale.get();
      std::vector<double> most(by_column ? cols : rows);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          double& m = most[by_column ? j : i];
          m = std::max(m, std::fabs(double(v[i * cols + j])));
        }
      bool close = true, padded = true, power = true;
      for (const float s : scale) power &= std::exp2(std::round(std::log2(s))) == s;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < to.ld; ++j) {
          const float h = half_to_float(high[i * to.ld + j]), l = half_to_float(low[i * to.ld + j]);
          if (j >= cols) {
            padded &= h == 0 && l == 0;
            continue;
          }
          const double want = v[i * cols + j],
                       got = (double(h) + double(l) / kSplitLow) / scale[by_column ? j : i];
          const double largest = most[by_column ? j : i];
          close &=
              std::fabs(got - want) <= std::max(std::ldexp(std::fabs(want), -22), std::ldexp(largest, -35));
          close &= std::fabs(h) <= 1;
        }
      CHECK(power);
      CHECK(close);
      CHECK(padded);
    }
}

TEST_CASE("cuda split: what is not finite stays so") {
  if (no_device()) return;
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    for (const bool by_column : {false, true}) {
      std::vector<float> v(12, 1.0f);
      v[5] = bad;
      DeviceGuarded<float> x(v);
      Split to(3, 4, by_column);
      split_cuda(x.data(), to.s, nullptr);
      CHECK_FALSE(std::isfinite(half_to_float(to.high.get()[1 * to.ld + 1])));
      CHECK(half_to_float(to.high.get()[0]) > 0);
    }
}

TEST_CASE("cuda split: scales leave a product, factor and sum as asked") {
  if (no_device()) return;
  const int64_t m = 33, n = 300;
  const std::vector<float> y = values(m, n), add = values(n, m);
  std::vector<float> row(m), column(n);
  for (int64_t i = 0; i < m; ++i) row[i] = std::ldexp(1.0f, int(i % 9) - 4);
  for (int64_t j = 0; j < n; ++j) column[j] = std::ldexp(1.0f, int(j % 23) - 11);
  DeviceGuarded<float> gy(y), ga(add), gr(row), gc(column);
  for (const bool adds : {false, true}) {
    gy.put(y);
    unsplit_cuda(gy.data(), gr.data(), gc.data(), m, n, 0.5f, adds ? ga.data() : nullptr, 0.25f, nullptr);
    const std::vector<float> got = gy.get();
    bool same = true;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const float v = y[i * n + j] / row[i] / column[j] * 0.5f;
        same &= got[i * n + j] == (adds ? std::fmaf(0.25f, add[i * n + j], v) : v);
      }
    CHECK(same);
  }
}
