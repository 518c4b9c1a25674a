#include "quant/hidden_order.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "tests/quant/oracle.h"
#include "tests/quant/tiny_model.h"

using namespace q4s;

namespace {

const Team kTeam = oracle::parts(3);

std::vector<int32_t> order_of(const std::vector<float>& down, int64_t n, int64_t k) {
  const auto backend = make_cpu_backend(3);
  return hidden_order(*make_weight_work(*backend), down.data(), n, k);
}

// What the unit's weights of a model are once in order.
std::vector<float> ordered(const LlamaConfig& c, Unit u, std::vector<float> w,
                           const std::vector<int32_t>& order, int threads) {
  const auto backend = make_cpu_backend(threads);
  order_hidden(*make_weight_work(*backend), c, u, w.data(), order);
  return w;
}

// down (silu(gate x) * up x) in double.
std::vector<double> mlp(const LlamaConfig& c, const std::vector<float>& gate_up,
                        const std::vector<float>& down, const std::vector<float>& x) {
  std::vector<double> h(c.hidden), y(c.dim);
  for (int64_t i = 0; i < c.hidden; ++i) {
    double g = 0, u = 0;
    for (int64_t j = 0; j < c.dim; ++j) {
      g += double(gate_up[i * c.dim + j]) * x[j];
      u += double(gate_up[(c.hidden + i) * c.dim + j]) * x[j];
    }
    h[i] = g / (1 + std::exp(-g)) * u;
  }
  for (int64_t i = 0; i < c.dim; ++i)
    for (int64_t j = 0; j < c.hidden; ++j) y[i] += h[j] * down[i * c.hidden + j];
  return y;
}

}  // namespace

TEST_CASE("channels by the size of down's columns, equal ones as they stood") {
  //                          norms 5, 13, 0, 5, 0.5
  const std::vector<float> w = {3, 5,   0, -4, 0.5f,  //
                                4, -12, 0, 3,  0};
  CHECK(order_of(w, 2, 5) == std::vector<int32_t>{1, 0, 3, 4, 2});
}

TEST_CASE("in order, the block's function is unchanged") {
  const LlamaConfig c = tiny::config(true);
  const std::vector<float> gate_up = oracle::gaussian(2 * c.hidden * c.dim, 1, 0.3f),
                           down = oracle::gaussian(c.dim * c.hidden, 2, 0.3f), x = oracle::gaussian(c.dim, 3);
  const std::vector<int32_t> order = order_of(down, c.dim, c.hidden);
  CHECK(!std::is_sorted(order.begin(), order.end()));
  std::vector<int32_t> all = order;
  std::sort(all.begin(), all.end());
  for (int64_t i = 0; i < c.hidden; ++i) CHECK(all[i] == i);

  const std::vector<float> a = ordered(c, Unit::kGateUp, gate_up, order, 3),
                           b = ordered(c, Unit::kDown, down, order, 2);
  const std::vector<double> want = mlp(c, gate_up, down, x), got = mlp(c, a, b, x);
  for (int64_t i = 0; i < c.dim; ++i) CHECK(got[i] == doctest::Approx(want[i]).epsilon(1e-12).scale(1.0));
  double last = INFINITY;
  for (int64_t j = 0; j < c.hidden; ++j) {
    double size = 0;
    for (int64_t i = 0; i < c.dim; ++i) size += double(b[i * c.hidden + j]) * b[i * c.hidden + j];
    CHECK(size <= last);
    last = size;
  }
  // Attention has no hidden channels.
  const std::vector<float> o = oracle::gaussian(c.dim * c.q_dim(), 4);
  CHECK(ordered(c, Unit::kO, o, order, 1) == o);
}

TEST_CASE("quantised rows are those of the ordered weights") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  QuantizeOptions o;
  o.rotate = false;
  o.solve.alpha = o.solve.beta = 0;
  o.only = std::regex("nothing");  // so that the weights leave in fp16
  const tiny::Result plain = [&] {
    QuantizeOptions off = o;
    off.order_hidden = false;
    return tiny::quantize(m, &cal, off, 2);
  }();
  const tiny::Result sorted = tiny::quantize(m, &cal, o, 2);
  const LlamaConfig& c = m.config;
  for (int64_t l = 0; l < c.layers; ++l) {
    const std::vector<int32_t> order = order_of(unpack(m.weights.blocks[l].down, kTeam), c.dim, c.hidden);
    const auto half = [&](const tiny::Result& r, Unit u, int64_t i) {
      return reinterpret_cast<const uint16_t*>(r.units[l * 4 + int64_t(u)].packed.data.data())[i];
    };
    for (int64_t i = 0; i < c.hidden; ++i) {
      for (int64_t j = 0; j < c.dim; ++j) {
        REQUIRE(half(sorted, Unit::kGateUp, i * c.dim + j) ==
                half(plain, Unit::kGateUp, order[i] * c.dim + j));
        REQUIRE(half(sorted, Unit::kGateUp, (c.hidden + i) * c.dim + j) ==
                half(plain, Unit::kGateUp, (c.hidden + order[i]) * c.dim + j));
        REQUIRE(half(sorted, Unit::kDown, j * c.hidden + i) ==
                half(plain, Unit::kDown, j * c.hidden + order[i]));
      }
    }
  }
}
