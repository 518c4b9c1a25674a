#include "quant/quantize.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "kernels/linear.h"
#include "quant/block_runner.h"
#include "runtime/error.h"
#include "tests/quant/oracle.h"
#include "tests/quant/tiny_model.h"

using namespace q4s;

namespace {

QuantizeOptions options() {
  QuantizeOptions o;
  o.solve.group = 32;
  return o;
}

double sum_of(const tiny::Result& r, double LossSummary::*what) {
  double s = 0;
  for (const BlockReport& b : r.blocks)
    for (const LinearReport& l : b.linears) s += l.loss.*what;
  return s;
}

void check_same(const UnitResult& a, const UnitResult& b) {
  CHECK(a.packed.data == b.packed.data);
  CHECK(a.packed.scales == b.packed.scales);
  CHECK(a.values == b.values);
}

}  // namespace

TEST_CASE("a block in pieces is the block of the whole graph") {
  LlamaModel m = tiny::model(true);
  const auto backend = make_cpu_backend(2);
  LlamaBlock& b = m.weights.blocks[0];
  fill_rope(m, 16);
  std::vector<Weight*> weights = {&b.attn_norm, &b.qkv,  &b.o,           &b.mlp_norm,
                                  &b.gate_up,   &b.down, &m.weights.rope};
  backend->load(weights);
  const int64_t tokens = 32;  // two sequences of 16
  std::vector<float> x = oracle::gaussian(tokens * m.config.dim, 4);

  Graph g({tokens, 0});
  Inputs in;
  LlamaConfig c = m.config;
  c.layers = 3;  // so that [1, 2) neither embeds nor has a head
  m.weights.blocks.insert(m.weights.blocks.begin(), LlamaBlock{});
  Tensor& y = build_llama(g, c, m.weights, in, {1, 2});
  std::vector<std::byte> arena(g.plan() + 4096);
  g.bind(arena.data());
  std::memcpy(in.x->data, x.data(), x.size() * sizeof(float));
  for (int64_t t = 0; t < tokens; ++t) {
    reinterpret_cast<int32_t*>(in.position->data)[t] = int32_t(t % 16);
    reinterpret_cast<int32_t*>(in.sequence->data)[t] = int32_t(t / 16);
  }
  KvCache kv{nullptr, KvType::kF32, 1, 2, 16, c.kv_dim()};
  kv.base = backend->allocate(kv.bytes(), "test");
  std::byte* scratch = backend->allocate(backend->scratch_bytes(g), "test");
  backend->run(g, {tokens, 0, 16}, kv, scratch);

  const std::unique_ptr<WeightWork> work = make_weight_work(*backend);
  BlockRunner runner(m.config, *backend, *work, m.weights.rope, 16, 32);
  runner.set(m.weights.blocks[1]);
  std::vector<float> a(tokens * c.q_dim()), h(tokens * c.hidden), n(tokens * c.dim);
  runner.attn_input(x.data(), n.data(), tokens);
  CHECK(n != x);
  runner.attention(x.data(), a.data(), tokens);
  runner.add_attention(a.data(), x.data(), tokens);
  runner.mlp_input(x.data(), n.data(), tokens);
  runner.mlp(x.data(), h.data(), tokens);
  runner.add_mlp(h.data(), x.data(), tokens);
  for (size_t i = 0; i < x.size(); ++i) CHECK(x[i] == doctest::Approx(y.f32()[i]).epsilon(1e-5).scale(1.0));
  backend->release(kv.base);
  backend->release(scratch);
}

TEST_CASE("the packed bytes are the values that later blocks saw") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  for (GridKind grid : {GridKind::kSigned, GridKind::kHalf}) {
    QuantizeOptions o = options();
    o.solve.grid = grid;
    const tiny::Result r = tiny::quantize(m, &cal, o, 1);
    REQUIRE(r.units.size() == 8);
    REQUIRE(r.blocks.size() == 2);
    for (const UnitResult& u : r.units) CHECK(u.values.empty());
    CHECK(r.blocks[1].linears.size() == 7);
    CHECK(r.blocks[1].output_error > 0);
    CHECK(r.blocks[1].output_error < 0.1);
  }
}

TEST_CASE("better than rounding; the correction brings the stream nearer to full precision") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  QuantizeOptions o = options();
  const tiny::Result whole = tiny::quantize(m, &cal, o, 2);
  CHECK(sum_of(whole, &LossSummary::relative) < 0.8 * sum_of(whole, &LossSummary::rtn_relative));
  const double whole_error = whole.blocks[1].output_error;
  o.solve.alpha = 1e-6f;  // as good as none, but the full-precision stream is still followed
  o.solve.beta = 0;
  CHECK(whole_error < tiny::quantize(m, &cal, o, 2).blocks[1].output_error);
}

TEST_CASE("the coupling of rows changes queries and keys and the last output; values stay as they are") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  QuantizeOptions o;
  o.solve.dither = false;  // whose random numbers go by the row's place
  const tiny::Result coupled = tiny::quantize(m, &cal, o, 2);
  o.couple = false;
  const tiny::Result alone = tiny::quantize(m, &cal, o, 2);
  const LlamaConfig& c = m.config;
  const auto same_rows = [&](size_t unit, int64_t begin, int64_t end) {
    const WeightView &a = coupled.units[unit].packed.view, &b = alone.units[unit].packed.view;
    int64_t same = 0;
    std::vector<float> x(a.k), y(a.k);
    for (int64_t i = begin; i < end; ++i) {
      dequantize_rows(a, i, i + 1, x.data());
      dequantize_rows(b, i, i + 1, y.data());
      same += x == y;
    }
    return same;
  };
  const int64_t qk = c.q_dim() + c.kv_dim(), all = qk + c.kv_dim();
  CHECK(same_rows(0, qk, all) == all - qk);
  CHECK(same_rows(0, 0, qk) < qk / 2);
  CHECK(same_rows(size_t(4 * (c.layers - 1) + 3), 0, c.dim) < c.dim / 2);
  for (const BlockReport& b : coupled.blocks)
    for (const LinearReport& l : b.linears) CHECK(l.fallback.empty());
}

TEST_CASE("inputs held or made again, all or a part of them: the same bytes") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration(160);  // two steps
  QuantizeOptions o = options();
  const WalkShape all = walk_shape(m.config, o, 160, 32, false);
  CHECK(all.held_down == 160 * 32);
  const tiny::Result held = tiny::quantize(m, &cal, o, 2);
  for (const int64_t most : {int64_t(0), all.chunk * 4 * m.config.hidden}) {
    o.most_held = most;
    CHECK(walk_shape(m.config, o, 160, 32, false).held_down == (most ? all.chunk : 0));
    const tiny::Result part = tiny::quantize(m, &cal, o, 2);
    for (size_t i = 0; i < held.units.size(); ++i) check_same(held.units[i], part.units[i]);
    CHECK(held.blocks[1].output_error == part.blocks[1].output_error);
  }
}

TEST_CASE("rotation alone does not change the function: nothing quantised, nothing lost") {
  for (bool tied : {true, false}) {
    LlamaModel m = tiny::model(tied);
    const Calibration cal = tiny::calibration();
    QuantizeOptions o = options();
    o.head = Format::kF16;
    o.only = std::regex("nothing");
    const tiny::Result r = tiny::quantize(m, &cal, o, 2);
    CHECK(r.blocks[1].output_error < 1e-5);  // fp16 weights
    CHECK(r.blocks[1].linears[0].bits == 16);
    CHECK(r.units[0].packed.view.format == Format::kF16);
  }
}

TEST_CASE("the same bytes for every number of threads, and after kept blocks") {
  LlamaModel m = tiny::model(false);
  const Calibration cal = tiny::calibration();
  const QuantizeOptions o = options();
  const tiny::Result one = tiny::quantize(m, &cal, o, 1), three = tiny::quantize(m, &cal, o, 3);
  for (size_t i = 0; i < one.units.size(); ++i) check_same(one.units[i], three.units[i]);
  CHECK(one.blocks[1].output_error == three.blocks[1].output_error);
  const tiny::Result rest = tiny::quantize(m, &cal, o, 2, &one, 1);
  REQUIRE(rest.units.size() == 4);
  for (size_t i = 0; i < 4; ++i) check_same(rest.units[i], one.units[4 + i]);
  CHECK(rest.blocks[0].output_error == one.blocks[1].output_error);
}

TEST_CASE("formats per linear, plain rounding without calibration") {
  LlamaModel m = tiny::model(true);
  QuantizeOptions o = options();
  o.solve.rtn = true;
  o.solve.search = false;
  o.rotate = false;
  o.special.emplace_back(std::regex("blk.1.down"), Format4{GridKind::kInt8, 64});
  o.special.emplace_back(std::regex("down"), Format4{GridKind::kSigned, 0});
  const tiny::Result r = tiny::quantize(m, nullptr, o, 2);
  CHECK(r.units[3].packed.view.format == Format::kQ4);
  CHECK(r.units[3].packed.view.group == 100);
  CHECK(r.units[7].packed.view.format == Format::kQ8);
  CHECK(r.units[7].packed.view.group == 64);
  CHECK(r.units[0].packed.view.group == 32);
  for (const BlockReport& b : r.blocks)
    for (const LinearReport& l : b.linears) CHECK(l.loss.relative == l.loss.rtn_relative);
  CHECK(r.blocks[1].linears[6].loss.relative < 1e-3);
}

TEST_CASE("the seed's method runs through the same walk") {
  LlamaModel m = tiny::model(true);
  const Calibration cal = tiny::calibration();
  QuantizeOptions o = options();
  o.seed_method = true;
  o.rotate = false;
  o.damp = 0.01;
  o.solve.grid = GridKind::kAsym;
  const tiny::Result r = tiny::quantize(m, &cal, o, 2);
  CHECK(r.units[0].packed.data.empty());
  CHECK(sum_of(r, &LossSummary::relative) > 0);
  CHECK(r.blocks[0].linears[0].damp == 0.01);
}

TEST_CASE("weights that are not finite are refused by name and count") {
  LlamaModel m = tiny::model(true);
  std::vector<float> bad(72 * 48, 0.5f);
  bad[7] = NAN;
  bad[8] = 1e6f;
  m.weights.blocks[0].o = make_weight_f32("blk.0.o", 72, 48, bad);
  const auto backend = make_cpu_backend(1);
  try {
    unpack(m.weights.blocks[0].o, one_thread_team);
    FAIL("accepted");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    CHECK(std::string(e.what()).find("blk.0.o: 2 of 3456") == 0);
  }
}
