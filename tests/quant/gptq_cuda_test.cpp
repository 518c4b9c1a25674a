// Every step of the quantiser on the GPU against the CPU's over odd shapes, buffers between guard words; then
// whole units through both solvers. Without a GPU every case prints SKIPPED. Environment Q4S_QUICK=1: few
// shapes.
#include "kernels/gptq_cuda.h"

#include <doctest/doctest.h>

#include <limits>

#include "kernels/gptq_steps.h"
#include "quant/unit_solver.h"
#include "runtime/error.h"
#include "tests/kernels/device_guarded.h"
#include "tests/quant/oracle.h"

using namespace q4s;

namespace {

const GridKind kGrids[] = {GridKind::kSigned, GridKind::kHalf, GridKind::kSym7, GridKind::kSym8,
                           GridKind::kInt8};

struct Shape {
  int64_t n, k, group;
};
std::vector<Shape> shapes() {
  if (quick()) return {{33, 172, 64}};
  return {{2, 5, 0},    {33, 172, 64},  {65, 75, 32},   {130, 576, 128},
          {70, 300, 0}, {64, 1024, 32}, {36, 1300, 128}};
}

// One linear with what the steps need of it, on both sides.
struct Case {
  int64_t n, k, group, groups;
  Levels levels;
  std::vector<float> w, x;
  HessianFactor f;
  std::vector<uint16_t> scales;  // searched
  std::vector<uint8_t> codes;    // rounded

  Case(const Shape& s, GridKind grid, uint32_t seed)
      : n(s.n),
        k(s.k),
        group(s.group ? s.group : s.k),
        groups(ceil_div(k, group)),
        levels(grid_levels(grid)),
        w(oracle::gaussian(n * k, seed, 0.1f)) {
    const int64_t tokens = k + 40;
    x = oracle::inputs(tokens, k, seed + 1);
    std::vector<float> h(k * k);
    gptq_gram_cpu({x.data(), x.data(), h.data(), tokens, k, k, 0.5f, false});
    f = factor_hessian(std::move(h), k, 0.05, true, one_thread_team);
    for (int64_t j = 0; j < std::min(group, k); ++j) w[j] = 0.0f;  // row 0, group 0: all zero
    scales.resize(n * groups);
    codes.resize(n * k);
    const std::vector<float> d = diagonal();
    gptq_scales_cpu({w.data(), d.data(), scales.data(), n, k, group, levels, true});
    gptq_round_cpu({w.data(), scales.data(), codes.data(), n, k, group, levels});
  }
  std::vector<float> diagonal() const {
    std::vector<float> d(k);
    for (int64_t j = 0; j < k; ++j) d[j] = f.h[j * (k + 1)];
    return d;
  }
  double loss(const std::vector<uint16_t>& s, const std::vector<uint8_t>& c) const {
    std::vector<float> q(n * k);
    for (int64_t i = 0; i < n * k; ++i)
      q[i] = levels.value(c[i], half_to_float(s[i / k * groups + i % k / group]));
    std::vector<RowSums> sums(n);
    gptq_loss_cpu({w.data(), q.data(), f.h.data(), sums.data(), n, k});
    double all = 0;
    for (const RowSums& r : sums) all += r.error_h;
    return all;
  }
};

template <typename T>
double differing(const std::vector<T>& a, const std::vector<T>& b) {
  REQUIRE(a.size() == b.size());
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return double(count) / double(a.size());
}

bool close(double a, double b, double part) { return std::fabs(a - b) <= part * std::fabs(b); }

double worst(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference = std::max(difference, std::fabs(double(a[i]) - b[i]));
    most = std::max(most, std::fabs(double(b[i])));
  }
  return difference / most;
}

struct Stream {
  cudaStream_t s = nullptr;
  Stream() { cuda_check(cudaStreamCreate(&s), "stream"); }
  ~Stream() { cudaStreamDestroy(s); }
  void wait() { cuda_check(cudaStreamSynchronize(s), "steps"); }
};

template <typename T>
using Guard = DeviceGuarded<T>;

}  // namespace

TEST_CASE("cuda gptq: scales and plain rounding have the CPU's bits") {
  if (no_device()) return;
  Stream stream;
  for (const Shape& s : shapes())
    for (GridKind grid : kGrids) {
      const Case c(s, grid, 3);
      CAPTURE(s.k);
      CAPTURE(grid_name(grid));
      Guard<float> w(c.w), weight(c.diagonal());
      for (const bool search : {true, false})
        for (const bool weighted : {true, false}) {
          std::vector<uint16_t> scales(c.scales.size());
          std::vector<uint8_t> codes(c.codes.size());
          gptq_scales_cpu({c.w.data(), weighted ? c.diagonal().data() : nullptr, scales.data(), c.n, c.k,
                           c.group, c.levels, search});
          gptq_round_cpu({c.w.data(), scales.data(), codes.data(), c.n, c.k, c.group, c.levels});
          Guard<uint16_t> got_scales(c.n * c.groups);
          Guard<uint8_t> got_codes(c.n * c.k);
          gptq_scales_cuda({w.data(), weighted ? weight.data() : nullptr, got_scales.data(), c.n, c.k,
                            c.group, c.levels, search},
                           stream.s);
          gptq_round_cuda({w.data(), got_scales.data(), got_codes.data(), c.n, c.k, c.group, c.levels},
                          stream.s);
          stream.wait();
          CHECK(got_scales.get() == scales);
          CHECK(got_codes.get() == codes);
        }
    }
}

TEST_CASE("cuda gptq: the pass, sweep, refit and losses") {
  if (no_device()) return;
  Stream stream;
  GptqCuda gptq(stream.s);
  for (const Shape& s : shapes())
    for (GridKind grid : kGrids) {
      const Case c(s, grid, 7);
      CAPTURE(s.n);
      CAPTURE(s.k);
      CAPTURE(s.group);
      CAPTURE(grid_name(grid));
      std::vector<float> ordered(c.n * c.k);
      for (int64_t i = 0; i < c.n * c.k; ++i) ordered[i] = c.w[i / c.k * c.k + c.f.order[i % c.k]];
      Guard<float> w(c.w), h(c.f.h), u(c.f.u), work(ordered);
      Guard<int32_t> order(c.f.order);
      Guard<uint16_t> scales(c.scales);
      Guard<uint8_t> codes(c.n * c.k);

      std::vector<uint8_t> expected(c.n * c.k);
      gptq.solve(
          {work.data(), u.data(), order.data(), scales.data(), codes.data(), c.n, c.k, c.group, c.levels});
      stream.wait();
      gptq_solve_cpu({ordered.data(), c.f.u.data(), c.f.order.data(), c.scales.data(), expected.data(), c.n,
                      c.k, c.group, c.levels});
      const std::vector<uint8_t> solved = codes.get();
      CHECK(differing(solved, expected) <= 0.005);
      CHECK(close(c.loss(c.scales, solved), c.loss(c.scales, expected), 1e-3));

      // Sweep and refit from the CPU's codes, so that each step is judged alone.
      codes.put(expected);
      const GptqRefineArgs there{w.data(), h.data(), scales.data(), codes.data(),
                                 c.n,      c.k,      c.group,       c.levels};
      std::vector<uint16_t> host_scales = c.scales;
      const GptqRefineArgs here{c.w.data(), c.f.h.data(), host_scales.data(), expected.data(), c.n, c.k,
                                c.group,    c.levels};
      const double before = c.loss(c.scales, expected);
      gptq.sweep(there);
      stream.wait();
      gptq_sweep_cpu(here);
      CHECK(differing(codes.get(), expected) <= 0.005);
      CHECK(close(c.loss(c.scales, codes.get()), c.loss(c.scales, expected), 1e-3));
      CHECK(c.loss(c.scales, codes.get()) <= before * (1 + 1e-6));

      GptqRefineArgs there_dithered = there, here_dithered = here;
      there_dithered.dither = here_dithered.dither = 0.3f;
      there_dithered.pass = here_dithered.pass = 5;
      codes.put(expected);
      gptq.sweep(there_dithered);
      stream.wait();
      gptq_sweep_cpu(here_dithered);
      CHECK(differing(codes.get(), expected) <= 0.005);
      CHECK(close(c.loss(c.scales, codes.get()), c.loss(c.scales, expected), 1e-3));

      codes.put(expected);
      gptq.refit(there);
      stream.wait();
      gptq_refit_cpu(here);
      const std::vector<uint16_t> refitted = scales.get();
      CHECK(differing(refitted, host_scales) <= 0.01);
      CHECK(close(c.loss(refitted, expected), c.loss(host_scales, expected), 1e-5));

      scales.put(host_scales);
      Guard<RowSums> sums(c.n);
      gptq.losses(there, sums.data(), true);
      stream.wait();
      std::vector<float> q(c.n * c.k);
      for (int64_t i = 0; i < c.n * c.k; ++i)
        q[i] =
            c.levels.value(expected[i], half_to_float(host_scales[i / c.k * c.groups + i % c.k / c.group]));
      std::vector<RowSums> want(c.n);
      gptq_loss_cpu({c.w.data(), q.data(), c.f.h.data(), want.data(), c.n, c.k});
      const std::vector<RowSums> got = sums.get();
      for (int64_t i = 0; i < c.n; ++i) {
        CHECK(close(got[i].error_h, want[i].error_h, 1e-4));
        CHECK(close(got[i].error_2, want[i].error_2, 1e-9));
        CHECK(close(got[i].weight_h, want[i].weight_h, 1e-4));
        CHECK(close(got[i].weight_2, want[i].weight_2, 1e-9));
        CHECK(close(got[i].error_abs, want[i].error_abs, 1e-6));
        CHECK(got[i].error_max == want[i].error_max);
      }
    }
}

TEST_CASE("cuda gptq: a refit with more groups than shared memory holds") {
  if (no_device() || quick()) return;
  Stream stream;
  GptqCuda gptq(stream.s);
  Case c({3, 1000, 4}, GridKind::kSigned, 9);  // 250 groups
  Guard<float> w(c.w), h(c.f.h);
  Guard<uint16_t> scales(c.scales);
  Guard<uint8_t> codes(c.codes);
  gptq.refit({w.data(), h.data(), scales.data(), codes.data(), c.n, c.k, c.group, c.levels});
  stream.wait();
  std::vector<uint16_t> want = c.scales;
  gptq_refit_cpu({c.w.data(), c.f.h.data(), want.data(), c.codes.data(), c.n, c.k, c.group, c.levels});
  CHECK(want != c.scales);
  CHECK(differing(scales.get(), want) <= 0.01);
}

TEST_CASE("cuda gptq: factor and correction") {
  if (no_device()) return;
  Stream stream;
  GptqCuda gptq(stream.s);
  for (const Shape& s : shapes()) {
    const Case c(s, GridKind::kSigned, 11);
    CAPTURE(s.k);
    Guard<float> h(c.f.h), u(c.k * c.k);
    Guard<int32_t> order(c.f.order);
    REQUIRE(gptq.factor(h.data(), order.data(), u.data(), c.k));
    CHECK(worst(u.get(), c.f.u) < 1e-5);
    REQUIRE(gptq.factor(h.data(), order.data(), u.data(), c.k, false));
    CHECK(worst(u.get(), c.f.u) < 1e-4);

    const auto d = oracle::gaussian(c.k * c.k, 12, 0.4f), e = oracle::gaussian(c.n * c.k, 13, 0.05f);
    std::vector<int32_t> inverse(c.k);
    for (int64_t i = 0; i < c.k; ++i) inverse[c.f.order[i]] = int32_t(i);
    Guard<int32_t> back(inverse);
    Guard<float> dd(d), de(e);
    for (int which = 1; which < 4; ++which) {  // D, E, both
      std::vector<double> right(c.k * c.n);
      for (int64_t i = 0; i < c.n; ++i)
        for (int64_t j = 0; j < c.k; ++j) {
          double v = which & 2 ? 0.25 * e[i * c.k + j] : 0.0;
          for (int64_t l = 0; which & 1 && l < c.k; ++l) v += 0.5 * double(c.w[i * c.k + l]) * d[l * c.k + j];
          right[j * c.n + i] = v;
        }
      if (c.k > 200 && which < 3) continue;  // the oracle is slow
      const oracle::Matrix change = oracle::linear_solve(oracle::widen(c.f.h), right, c.k, c.n);
      std::vector<float> want(c.w);
      for (int64_t i = 0; i < c.n * c.k; ++i) want[i] += float(change[i % c.k * c.n + i / c.k]);
      Guard<float> w(c.w);
      CHECK(gptq.correct({w.data(), which & 1 ? dd.data() : nullptr, which & 2 ? de.data() : nullptr,
                          u.data(), order.data(), back.data(), c.n, c.k, 0.5f, 0.25f}));
      stream.wait();
      CHECK(worst(w.get(), want) < 1e-4);
    }
    std::vector<float> bad(c.n * c.k, std::numeric_limits<float>::infinity());
    de.put(bad);
    Guard<float> w(c.w);
    CHECK_FALSE(gptq.correct(
        {w.data(), nullptr, de.data(), u.data(), order.data(), back.data(), c.n, c.k, 0.5f, 0.5f}));
    CHECK(w.get() == c.w);
  }
  std::vector<float> bad = {1, 2, 2, 1};  // not positive
  Guard<float> h(bad), u(4);
  Guard<int32_t> order(std::vector<int32_t>{0, 1});
  CHECK_FALSE(gptq.factor(h.data(), order.data(), u.data(), 2));
  bad = {1, NAN, NAN, 1};
  h.put(bad);
  CHECK_FALSE(gptq.factor(h.data(), order.data(), u.data(), 2));
}

TEST_CASE("cuda gptq: statistics, exact on fp16 inputs, within its rounding on others") {
  if (no_device()) return;
  Stream stream;
  GptqCuda gptq(stream.s);
  for (const Shape& s : {Shape{33, 172, 0}, Shape{7, 75, 0}, Shape{130, 1300, 0}}) {
    const int64_t tokens = 700, k = s.k, n = s.n;
    for (const bool exact : {true, false}) {
      auto x = oracle::inputs(tokens, k, 1), r = oracle::gaussian(tokens * n, 2), x_full = x, r_full = r;
      const auto more = oracle::gaussian(tokens * k, 3, 0.02f),
                 more_r = oracle::gaussian(tokens * n, 4, 0.02f);
      const auto grain = [&](float v) {
        return exact ? std::round(v * 64) / 64 : v;
      };  // few bits: exact in fp16
      for (float& v : x) v = grain(v);
      for (int64_t i = 0; i < tokens * k; ++i) x_full[i] = x[i] + grain(more[i]);
      for (float& v : r) v = grain(v);
      for (int64_t i = 0; i < tokens * n; ++i) r_full[i] = r[i] + grain(more_r[i]);
      Guard<float> gx(x), gx_full(x_full), gr(r), gr_full(r_full);
      Guard<float> h(std::vector<float>(k * k)), d(std::vector<float>(k * k)), e(std::vector<float>(n * k));
      std::vector<float> ch(k * k), cd(k * k), ce(n * k), dx(tokens * k), dr(tokens * n);
      for (int64_t i = 0; i < tokens * k; ++i) dx[i] = x_full[i] - x[i];
      for (int64_t i = 0; i < tokens * n; ++i) dr[i] = r_full[i] - r[i];
      for (int64_t t = 0; t < tokens; t += 350) {
        gptq.statistics({gx.data() + t * k, gx_full.data() + t * k, gr.data() + t * n, gr_full.data() + t * n,
                         h.data(), d.data(), e.data(), 350, k, n, 0.25f});
        gptq_gram_cpu({&x[t * k], &x[t * k], ch.data(), 350, k, k, 0.25f, false});
        gptq_gram_cpu({&dx[t * k], &x[t * k], cd.data(), 350, k, k, 0.25f, false});
        gptq_gram_cpu({&dr[t * n], &x[t * k], ce.data(), 350, n, k, 0.25f, false});
      }
      gptq.finish_statistics();
      gptq_mirror_cuda(h.data(), k, stream.s);
      stream.wait();
      const double bound = exact ? 5e-6 : 3e-4;
      CHECK(worst(h.get(), ch) < bound);
      CHECK(worst(d.get(), cd) < bound);
      CHECK(worst(e.get(), ce) < bound);
    }
  }
}

TEST_CASE("cuda gptq: a unit through both solvers, and the same bits twice") {
  if (no_device()) return;
  const std::unique_ptr<Backend> gpu = make_cuda_backend(0), cpu = make_cpu_backend(2);
  const int64_t n = quick() ? 40 : 200, k = quick() ? 172 : 576, tokens = quick() > 1 ? 400 : 2048;
  const auto w = oracle::gaussian(n * k, 21, 0.1f), x = oracle::inputs(tokens, k, 22),
             r = oracle::gaussian(tokens * n, 23);
  auto x_full = x, r_full = r;
  const auto more = oracle::gaussian(tokens * k, 24, 0.05f), more_r = oracle::gaussian(tokens * n, 25, 0.05f);
  for (size_t i = 0; i < x.size(); ++i) x_full[i] += more[i];
  for (size_t i = 0; i < r.size(); ++i) r_full[i] += more_r[i];
  // The solution with its codes, and the values that come of them.
  const auto run = [&](Backend& b, UnitSolver& s, const SolveOptions& o) {
    std::vector<std::byte*> memory;
    const auto put = [&](const std::vector<float>& v) {
      memory.push_back(b.allocate(v.size() * sizeof(float), "test"));
      b.write(memory.back(), v.data(), v.size() * sizeof(float));
      return reinterpret_cast<float*>(memory.back());
    };
    s.begin(n, k, 4, true, true);
    s.add(put(x), put(x_full), put(r), put(r_full), tokens);
    s.finish();
    CHECK(s.factor(0.05, true) == 0.05);
    float* weights = put(w);
    QuantizedLinear q = s.solve(weights, o);
    CHECK(q.codes.empty());
    const PackedWeight packed = s.packed();
    q.codes.resize(n * k);
    for (int64_t i = 0; i < n; ++i) unpack_nibbles(packed.view.row(i), k, &q.codes[i * k]);
    q.scales = packed.scales;
    std::vector<float> values(n * k), expected(n * k);
    s.values(weights);
    b.read(values.data(), reinterpret_cast<std::byte*>(weights), values.size() * sizeof(float));
    q.dequantize(0, n, expected.data());
    CHECK(values == expected);
    for (std::byte* p : memory) b.release(p);
    return q;
  };
  const auto on_gpu = make_unit_solver(*gpu), on_cpu = make_unit_solver(*cpu);
  const int64_t size = n / 5;
  std::vector<float> metric;  // two blocks of rows, each with few directions that count
  for (uint32_t b = 0; b < 2; ++b) {
    const auto m = oracle::hessian(oracle::inputs(2 * size, size, 26 + b), 2 * size, size, 1.0);
    metric.insert(metric.end(), m.begin(), m.end());
  }
  const RowCoupling coupling = couple_rows(metric, 2, size, n, one_thread_team);
  struct Way {
    bool refine, rtn, dither, coupled;
  };
  for (const Way& way :
       {Way{false, false, false, false}, Way{true, false, false, false}, Way{true, false, true, false},
        Way{false, false, false, true}, Way{true, false, true, true}, Way{false, true, false, false},
        Way{true, true, true, true}}) {
    SolveOptions o;
    o.refine = way.refine;
    o.rtn = way.rtn;
    o.dither = way.dither;
    if (way.coupled) o.coupling = &coupling;
    CAPTURE(way.refine);
    CAPTURE(way.rtn);
    CAPTURE(way.dither);
    CAPTURE(way.coupled);
    const QuantizedLinear a = run(*gpu, *on_gpu, o), b = run(*cpu, *on_cpu, o), again = run(*gpu, *on_gpu, o);
    CHECK(a.fallback == b.fallback);
    CHECK(a.damp == b.damp);
    // The statistics are rounded to fp16, and one code that falls the other way moves what is decided after
    // it: in its row, and where rows are coupled or dithered sweeps repeated, in all that follow.
    const bool chain = !way.rtn && (way.dither || way.coupled);
    MESSAGE("codes that differ: " << differing(a.codes, b.codes));
    if (!chain) CHECK(differing(a.codes, b.codes) < 0.02);
    const LossSummary la = summarize(a.rows, k, 0, n), lb = summarize(b.rows, k, 0, n);
    const double apart = chain ? 2e-2 : 2e-3;
    CHECK(close(la.loss, lb.loss, apart));
    CHECK(close(la.relative, lb.relative, apart));
    CHECK(close(la.target, lb.target, apart));
    CHECK(close(la.rtn_relative, lb.rtn_relative, 2e-3));
    CHECK(a.codes == again.codes);
    CHECK(a.scales == again.scales);
  }
  const HessianFactor& f = on_gpu->fetch();
  CHECK(f.ok());
  CHECK(worst(f.h, on_cpu->fetch().h) < 1e-3);
  CHECK(f.dead == on_cpu->fetch().dead);
}
