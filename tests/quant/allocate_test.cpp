#include "quant/allocate.h"

#include <doctest/doctest.h>

#include <cmath>

#include "quant/compare.h"
#include "runtime/error.h"
#include "tests/quant/tiny_model.h"

using namespace q4s;

namespace {

// Four linears of one block with made-up damage.
std::vector<UnitChoices> made_up() {
  const double effects[] = {1, 10, 1, 100};
  std::vector<UnitChoices> all;
  for (Unit u : kUnits) {
    UnitChoices c{0, u, effects[int(u)], 0.0, {}, 0};
    for (int i = 0; i < 3; ++i)
      c.candidates.push_back(
          {{GridKind::kSigned, 128 >> i}, 1000 + 100 * i, 8.0 / (1 << i), 1.0 / (1 << 2 * i)});
    all.push_back(c);
  }
  return all;
}

LlamaConfig of_weights(int64_t count) {  // a config of one block with `count` weights
  LlamaConfig c;
  c.layers = 1;
  c.dim = 1;
  c.hidden = 0;
  c.heads = 1;
  c.kv_heads = 0;
  c.head_dim = count / 2;
  return c;
}

int64_t bytes_of(const std::vector<UnitChoices>& all) {
  int64_t sum = 0;
  for (const UnitChoices& c : all) sum += c.candidates[c.chosen].bytes;
  return sum;
}

double damage_of(const std::vector<UnitChoices>& all) {
  double sum = 0;
  for (const UnitChoices& c : all) sum += c.damage(c.chosen);
  return sum;
}

}  // namespace

TEST_CASE("budget: spent where it saves most, never passed, no worse than any other choice within it") {
  const LlamaConfig c = of_weights(8000);
  REQUIRE(c.linear_weights() == 8000);
  for (int64_t budget : {4000, 4050, 4100, 4200, 4300, 4500, 4800, 9000}) {
    auto all = made_up();
    choose_by_budget(all, c, 8.0 * double(budget) / 8000);
    CHECK(bytes_of(all) <= budget);
    double best = INFINITY;  // every choice there is
    auto other = made_up();
    for (int code = 0; code < 81; ++code) {
      for (int i = 0, rest = code; i < 4; ++i, rest /= 3) other[i].chosen = rest % 3;
      if (bytes_of(other) <= budget) best = std::min(best, damage_of(other));
    }
    CHECK(damage_of(all) == doctest::Approx(best));  // all steps here cost the same: greedy is exact
  }
  auto all = made_up();
  choose_by_budget(all, c, 8.0 * 4100 / 8000);
  CHECK(all[3].chosen == 1);
  CHECK(all[0].chosen + all[1].chosen + all[2].chosen == 0);
  CHECK_THROWS_AS(choose_by_budget(all, c, 3.9), Error);
}

TEST_CASE("worst first: the first format that halves the loss") {
  auto all = made_up();
  all[2].candidates[0].loss = 9;
  all[2].candidates[1].loss = 5;
  choose_worst(all, 1);
  CHECK(all[2].chosen == 2);  // 5 is not below half of 9
  CHECK(all[0].chosen + all[1].chosen + all[3].chosen == 0);
  choose_worst(all, 100);
  for (const UnitChoices& c : all) CHECK(c.chosen == 2);  // 4 is not below half of 8 either
}

TEST_CASE("on a model: finer formats lose less, effects are those of a damaged linear") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  QuantizeOptions o;
  o.solve.group = 0;
  tiny::quantize(m, &cal, o, 1);  // gives the random weights their storage
  const auto backend = make_cpu_backend(2);
  const Team team = [&](const std::function<void(Part)>& fn) { backend->pool().run(fn); };
  const QuantizedFrame frame = quantize_frame(m, o, team);
  auto all = try_formats(m, *backend, frame, cal, o, nullptr);
  REQUIRE(all.size() == 8);
  for (const UnitChoices& c : all) {
    for (size_t i = 1; i < c.candidates.size(); ++i) {
      CHECK(c.candidates[i].bytes > c.candidates[i - 1].bytes);
      CHECK(c.candidates[i].target < c.candidates[0].target);
    }
    CHECK(c.candidates.back().format.grid == GridKind::kInt8);
    CHECK(c.candidates.back().target < 0.05 * c.candidates[0].target);
  }
  measure_effects(m, *backend, cal, all, true, nullptr);
  for (const UnitChoices& c : all) {
    CHECK(c.effect > 0);
    CHECK(c.alone > 0);
    CHECK(std::isfinite(c.effect));
  }
}

TEST_CASE("the seed's observe makes what it retries worse, done right better") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  QuantizeOptions o;
  o.solve.group = 0;
  o.head = Format::kF16;
  tiny::quantize(m, &cal, o, 1);
  const auto backend = make_cpu_backend(2);
  PplText text{PplProtocol::kLlamaCpp, 32, 8, tiny::calibration(8, 32).tokens, -1, "none", 0};
  std::vector<VersionResult> all;
  compare_grids(
      m, *backend, cal, text, o, 5, [&](const VersionResult& v) { all.push_back(v); },
      [](const std::string&, int64_t, int64_t) {});
  REQUIRE(all.size() == 7);
  const VersionResult &base = all[1], &written = all[2], &right = all[3];
  CHECK(written.sum > base.sum);
  CHECK(written.logged < written.largest);  // what it prints looks like progress
  CHECK(right.sum < base.sum);
  CHECK(right.output.kl_mean < base.output.kl_mean);
  for (const VersionResult& v : all) {
    CHECK(v.output.kl_mean > 0);
    CHECK(v.blocks.size() == 2);
  }
  CHECK(all[0].bits > base.bits);
}
