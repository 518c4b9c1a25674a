// Weights in the GPU's memory against the CPU's, and a whole walk over a small model on both. Without a GPU
// every case prints SKIPPED.
#include <doctest/doctest.h>

#include <cmath>

#include "kernels/half.h"
#include "quant/activations.h"
#include "quant/hidden_order.h"
#include "quant/weight_work.h"
#include "tests/kernels/device_guarded.h"
#include "tests/quant/oracle.h"
#include "tests/quant/tiny_model.h"

using namespace q4s;

namespace {

std::vector<float> get(Backend& b, const float* p, int64_t count) {
  std::vector<float> v(count);
  b.read(v.data(), reinterpret_cast<const std::byte*>(p), v.size() * sizeof(float));
  return v;
}
Buffer put(Backend& b, const std::vector<float>& v) {
  Buffer r(b, int64_t(v.size()), "test");
  b.write(r.bytes(), v.data(), v.size() * sizeof(float));
  return r;
}
void check_close(const std::vector<float>& a, const std::vector<float>& b, double epsilon) {
  REQUIRE(a.size() == b.size());
  double worst = 0, most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    worst = std::max(worst, std::fabs(double(a[i]) - b[i]));
    most = std::max(most, std::fabs(double(b[i])));
  }
  CHECK(worst <= epsilon * most);
}

}  // namespace

TEST_CASE("cuda weights: files' formats arrive exactly, bad ones are named") {
  if (no_device()) return;
  const auto gpu = make_cuda_backend(0), cpu = make_cpu_backend(2);
  const auto on_gpu = make_weight_work(*gpu), on_cpu = make_weight_work(*cpu);
  const int64_t n = 70, k = 96;
  const std::vector<float> w = oracle::gaussian(n * k, 5);
  for (Format format : {Format::kF32, Format::kF16, Format::kBF16, Format::kQ8, Format::kGgufQ8_0}) {
    CAPTURE(int(format));
    std::vector<uint8_t> bytes(n * row_bytes(format, k));
    std::vector<uint16_t> scales(n * 3, float_to_half(0.01f));
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 37 % 61);  // a number in every format
    if (format == Format::kF32) std::memcpy(bytes.data(), w.data(), bytes.size());
    Weight weight;
    weight.name = "w";
    weight.view = {.format = format, .n = n, .k = k, .data = bytes.data()};
    if (format == Format::kQ8) weight.view.group = 32, weight.view.scales = scales.data();
    const Buffer there(*gpu, n * k, "test"), here(*cpu, n * k, "test");
    on_gpu->load(weight, there.get());
    on_cpu->load(weight, here.get());
    CHECK(get(*gpu, there.get(), n * k) == get(*cpu, here.get(), n * k));
  }
  std::vector<float> bad = w;
  bad[17] = NAN;
  bad[90] = 1e6f;
  const Weight weight = make_weight_f32("blk.1.o", n, k, bad);
  const Buffer there(*gpu, n * k, "test");
  CHECK_THROWS_WITH(on_gpu->load(weight, there.get()), doctest::Contains("blk.1.o: 2 of 6720"));
}

TEST_CASE("cuda weights: rotation, shape, what graphs multiply, activations at rest") {
  if (no_device()) return;
  const auto gpu = make_cuda_backend(0), cpu = make_cpu_backend(2);
  const auto on_gpu = make_weight_work(*gpu), on_cpu = make_weight_work(*cpu);
  const LlamaConfig c = tiny::config(false);
  const Rotation r1 = make_rotation(c.dim, 1), r2 = make_rotation(c.head_dim, 2);
  const BlockNorms norms{oracle::gaussian(c.dim, 3), oracle::gaussian(c.dim, 4)};
  for (Unit u : kUnits) {
    const int64_t n = unit_rows(c, u), k = unit_columns(c, u);
    const std::vector<float> w = oracle::gaussian(n * k, 5 + uint32_t(u));
    const Buffer there = put(*gpu, w), here = put(*cpu, w);
    rotate_unit(*on_gpu, c, u, there.get(), norms, r1, r2);
    rotate_unit(*on_cpu, c, u, here.get(), norms, r1, r2);
    check_close(get(*gpu, there.get(), n * k), get(*cpu, here.get(), n * k), 1e-5);

    const Buffer moved = put(*gpu, w), moved_here = put(*cpu, w);
    std::vector<int32_t> order(c.hidden);
    for (int64_t i = 0; i < c.hidden; ++i) order[i] = int32_t(i * 37 % c.hidden);
    order_hidden(*on_gpu, c, u, moved.get(), order);
    order_hidden(*on_cpu, c, u, moved_here.get(), order);
    CHECK(get(*gpu, moved.get(), n * k) == get(*cpu, moved_here.get(), n * k));
    CHECK(on_gpu->column_squares(moved.get(), n, k) == on_cpu->column_squares(moved_here.get(), n, k));
  }

  const std::vector<float> w = oracle::gaussian((1 << 16) + 1000, 9, 0.3f);  // more than a piece
  const Buffer there = put(*gpu, w);
  const WeightShape a = on_gpu->shape(there.get(), int64_t(w.size())),
                    b = on_cpu->shape(w.data(), int64_t(w.size()));
  CHECK(a.low == b.low);
  CHECK(a.high == b.high);
  CHECK(a.mean == doctest::Approx(b.mean).epsilon(1e-9));
  CHECK(a.sd == doctest::Approx(b.sd).epsilon(1e-9));
  CHECK(a.skew == doctest::Approx(b.skew).epsilon(1e-6));
  CHECK(a.kurtosis == doctest::Approx(b.kurtosis).epsilon(1e-9));
  int64_t moved = 0;  // a weight on the border of two bins may fall on either side
  for (size_t i = 0; i < a.histogram.size(); ++i) moved += std::abs(a.histogram[i] - b.histogram[i]);
  CHECK(moved <= 4);

  Activations x(*gpu, *on_gpu, 40, 24, 16, "test");
  std::vector<float> rows = oracle::gaussian(16 * 24, 11);
  rows[3] = 1e6f;
  gpu->write(reinterpret_cast<std::byte*>(x.blank(24)), rows.data(), rows.size() * sizeof(float));
  x.close(24, 16);
  x.blank(0);
  const std::vector<float> back = get(*gpu, x.open(24, 16), 16 * 24);
  for (size_t i = 0; i < rows.size(); ++i)
    CHECK(back[i] == (i == 3 ? 65504.0f : half_to_float(float_to_half(rows[i]))));
}

TEST_CASE("cuda weights: a small model through the whole walk, as on the CPU") {
  if (no_device()) return;
  for (const bool corrects : {false, true}) {
    if (quick() > 1 && !corrects) continue;
    LlamaModel m = tiny::model(!corrects);
    const Calibration cal = tiny::calibration(64);
    QuantizeOptions o;
    o.solve.group = 32;
    if (!corrects) o.solve.alpha = o.solve.beta = 0;
    const tiny::Result a = tiny::quantize(m, &cal, o, *make_cuda_backend(0));
    for (Weight* w : all_weights(m.weights)) w->device.reset();
    const tiny::Result b = tiny::quantize(m, &cal, o, *make_cpu_backend(2));
    REQUIRE(a.units.size() == b.units.size());
    for (size_t l = 0; l < a.blocks.size(); ++l)
      for (size_t i = 0; i < a.blocks[l].linears.size(); ++i) {
        const LinearReport &x = a.blocks[l].linears[i], &y = b.blocks[l].linears[i];
        CAPTURE(x.name);
        CHECK(x.loss.relative == doctest::Approx(y.loss.relative).epsilon(l == 0 ? 0.02 : 0.1));
        CHECK(x.weights.sd == doctest::Approx(y.weights.sd).epsilon(1e-5));
      }
    for (size_t u = 0; u < 4; ++u) {
      CHECK(a.units[u].packed.data.size() == b.units[u].packed.data.size());
      CHECK(a.units[u].values.empty());
    }
    // What was kept is taken as it is, and the rest comes out the same.
    unload(m);
    const tiny::Result rest = tiny::quantize(m, &cal, o, *make_cuda_backend(0), &a, 1);
    REQUIRE(rest.units.size() == 4);
    for (size_t u = 0; u < 4; ++u) CHECK(rest.units[u].packed.data == a.units[4 + u].packed.data);
    unload(m);
    QuantizeOptions lean = o;  // inputs made again instead of held
    lean.most_held = 0;
    const tiny::Result again = tiny::quantize(m, &cal, lean, *make_cuda_backend(0));
    for (size_t u = 0; u < a.units.size(); ++u) CHECK(again.units[u].packed.data == a.units[u].packed.data);
    unload(m);
  }
}
