// Random weights: the size promised, no dependence on how rows are visited, rows that differ.
#include "kernels/random_weight.h"

#include <cmath>
#include <vector>

#include "kernels/linear.h"
#include "tests/kernels/guarded.h"

using namespace q4s;

TEST_CASE("random_row: size about 1/sqrt(K), mean about 0, the same row twice") {
  const int64_t n = 64, k = 333, group = 128;
  for (Format f : {Format::kF32, Format::kF16, Format::kBF16, Format::kQ8, Format::kQ4}) {
    CAPTURE(int(f));
    WeightView w{.format = f, .n = n, .k = k, .group = f == Format::kQ4 || f == Format::kQ8 ? group : 0};
    Guarded<uint8_t> data(n * row_bytes(f, k)), again(row_bytes(f, k));
    Guarded<uint16_t> scales(w.group ? n * w.groups() : 0), scales_again(w.group ? w.groups() : 0);
    for (int64_t i = 0; i < n; ++i)
      random_row(7, w, i, data.data() + i * row_bytes(f, k), scales.data() + (w.group ? i * w.groups() : 0));
    random_row(7, w, n - 1, again.data(), scales_again.data());
    CHECK(!std::memcmp(again.data(), data.end() - again.size(), size_t(again.size())));
    CHECK(std::memcmp(again.data(), data.data(), size_t(again.size())) != 0);
    random_row(8, w, n - 1, again.data(), scales_again.data());
    CHECK(std::memcmp(again.data(), data.end() - again.size(), size_t(again.size())) != 0);

    w.data = data.data();
    w.scales = scales.data();
    std::vector<float> v(size_t(n * k));
    dequantize_rows(w, 0, n, v.data());
    double sum = 0, squares = 0;
    for (float x : v) sum += x, squares += double(x) * x;
    const double sd = std::sqrt(squares / double(n * k)) * std::sqrt(double(k));
    CHECK(sd > 0.9);
    CHECK(sd < 1.15);
    CHECK(std::abs(sum / double(n * k)) < 0.1 / std::sqrt(double(k)));
  }
}
