#include "quant/pack.h"

#include <doctest/doctest.h>

#include "kernels/linear.h"
#include "quant/report.h"
#include "runtime/error.h"
#include "tests/quant/oracle.h"

using namespace q4s;

TEST_CASE("nibbles: even column low, odd rows padded with zero, and back") {
  const std::vector<uint8_t> codes = {1, 2, 15, 0, 7};
  std::vector<uint8_t> packed(3), back(5);
  pack_nibbles(codes.data(), 5, packed.data());
  CHECK(packed == std::vector<uint8_t>{0x21, 0x0f, 0x07});
  unpack_nibbles(packed.data(), 5, back.data());
  CHECK(back == codes);
}

TEST_CASE("packed and read by the kernels: the solver's own values") {
  const int64_t n = 9, k = 75;
  const auto w = oracle::gaussian(n * k, 1, 0.3f);
  for (GridKind grid :
       {GridKind::kSym7, GridKind::kSym8, GridKind::kHalf, GridKind::kSigned, GridKind::kInt8}) {
    for (int64_t group : {32, 64, 0}) {
      SolveOptions o;
      o.grid = grid;
      o.group = group;
      const QuantizedLinear q = round_to_nearest(w.data(), nullptr, n, k, o, one_thread_team);
      const PackedWeight p = pack(q);
      std::vector<float> read(n * k);
      dequantize_rows(p.view, 0, n, read.data());
      CHECK(read == oracle::values(q));
    }
  }
}

TEST_CASE("tables: fp16, int8 and int4 within a step, slab by slab") {
  const int64_t n = 5000, k = 40;
  const auto values = oracle::gaussian(n * k, 2, 0.05f);
  const Weight w = make_weight_f32("embed", n, k, values);
  const auto error = [&](Format f) {
    const PackedWeight p = pack_table(w, f, nullptr, nullptr, oracle::parts(2));
    std::vector<float> read(n * k);
    dequantize_rows(p.view, 0, n, read.data());
    double worst = 0;
    for (int64_t i = 0; i < n * k; ++i) worst = std::max(worst, std::fabs(double(read[i]) - values[i]));
    return worst;
  };
  CHECK(error(Format::kF16) < 2e-4);
  CHECK(error(Format::kQ8) < 0.3 / 127);
  CHECK(error(Format::kQ4) < 0.3 / 8);
  CHECK(error(Format::kQ4) > error(Format::kQ8));
  std::vector<float> big = values;
  big[77] = 65519.0f;
  CHECK_THROWS_AS(
      pack_table(make_weight_f32("head", n, k, big), Format::kF16, nullptr, nullptr, one_thread_team), Error);
}

TEST_CASE("report: a block survives its JSON, moments of known weights") {
  BlockReport b;
  b.block = 3;
  b.output_error = 0.25;
  LinearReport l;
  l.name = "q_proj";
  l.n = 4;
  l.k = 8;
  l.grid = "signed";
  l.loss = {1.5, 0.1, 0.2, 0.3, 0.04, 0.05};
  l.fallback = "why";
  const std::vector<float> w = {-1, 1, -1, 1, 3, -3, 0, 0};
  l.weights = weight_shape(w.data(), 8, oracle::parts(2));
  b.linears.push_back(l);
  CHECK(to_json(block_report(to_json(b))) == to_json(b));
  CHECK(l.weights.mean == 0.0);
  CHECK(l.weights.sd == doctest::Approx(std::sqrt(22.0 / 8)));
  CHECK(l.weights.skew == 0.0);
  CHECK(l.weights.kurtosis == doctest::Approx(166.0 / 8 / (22.0 / 8 * 22.0 / 8)));
  int64_t count = 0;
  for (int64_t bin : l.weights.histogram) count += bin;
  CHECK(count == 8);
}
