#include "quant/solver.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "quant/seed.h"
#include "tests/quant/oracle.h"

using namespace q4s;

namespace {

struct Case {
  int64_t n, k;
  std::vector<float> w, h;
  Case(int64_t n_, int64_t k_, uint32_t seed) : n(n_), k(k_), w(oracle::gaussian(n_ * k_, seed, 0.1f)) {
    const int64_t tokens = 3 * k + 5;
    h = oracle::hessian(oracle::inputs(tokens, k, seed + 1), tokens, k, 2.0 / 4);
  }
  HessianFactor factor(double damp = 0.05, bool act_order = true) const {
    return factor_hessian(h, k, damp, act_order, one_thread_team);
  }
  LinearProblem problem() const { return {w.data(), nullptr, nullptr, n, k}; }
};

double total(const QuantizedLinear& q) {
  return std::accumulate(q.rows.begin(), q.rows.end(), 0.0,
                         [](double s, const RowLoss& r) { return s + r.error_damped; });
}

SolveOptions options(GridKind grid, int64_t group, bool search, bool refine) {
  SolveOptions o;
  o.grid = grid;
  o.group = group;
  o.search = search;
  o.refine = refine;
  return o;
}

const GridKind kGrids[] = {GridKind::kSym7, GridKind::kSym8, GridKind::kHalf, GridKind::kSigned,
                           GridKind::kInt8};

}  // namespace

TEST_CASE("with H = I, GPTQ is rounding to nearest") {
  Case c(20, 75, 1);
  std::fill(c.h.begin(), c.h.end(), 0.0f);
  for (int64_t j = 0; j < c.k; ++j) c.h[j * (c.k + 1)] = 3.0f;
  for (GridKind grid : kGrids) {
    SolveOptions o = options(grid, 32, false, false);
    const QuantizedLinear gptq = solve(c.problem(), c.factor(), o, one_thread_team);
    o.rtn = true;
    const QuantizedLinear rtn = solve(c.problem(), c.factor(), o, one_thread_team);
    CHECK(gptq.codes == rtn.codes);
    CHECK(gptq.scales == rtn.scales);
  }
}

TEST_CASE("each step lowers the loss: rounding > GPTQ > refined, on every grid and group") {
  const Case c(30, 172, 3);
  for (GridKind grid : kGrids) {
    for (int64_t group : {32, 64, 128, 0}) {
      const QuantizedLinear plain =
          solve(c.problem(), c.factor(), options(grid, group, true, false), one_thread_team);
      const QuantizedLinear fine =
          solve(c.problem(), c.factor(), options(grid, group, true, true), one_thread_team);
      const LossSummary s = summarize(plain.rows, c.k, 0, c.n);
      CHECK(s.relative < 0.7 * s.rtn_relative);
      CHECK(total(fine) < total(plain));
      CHECK(fine.groups() == ceil_div(c.k, group ? group : c.k));
    }
  }
}

TEST_CASE("dithered sweeps end in a better minimum, on every grid") {
  const Case c(40, 172, 21);
  const HessianFactor f = c.factor();
  for (GridKind grid : kGrids) {
    for (int64_t group : {32, 128}) {
      SolveOptions o = options(grid, group, true, true);
      const QuantizedLinear dithered = solve(c.problem(), f, o, one_thread_team);
      o.dither = false;
      const QuantizedLinear settled = solve(c.problem(), f, o, one_thread_team);
      CHECK(settled.sweeps == 2);
      CHECK(dithered.sweeps == 4 + dithered_sweeps(c.n, c.k));
      CHECK(total(dithered) < total(settled));
    }
  }
}

TEST_CASE("a dithered sweep against f64: every code is the level nearest to minimiser plus dither") {
  const Case c(9, 75, 23);
  const HessianFactor f = c.factor();
  const Levels l = grid_levels(GridKind::kSigned);
  for (const auto& [dither, pass] : {std::pair(0.08f, 0u), std::pair(0.5f, 3u)}) {
    QuantizedLinear q = solve(c.problem(), f, options(GridKind::kSigned, 32, true, false), one_thread_team);
    std::vector<uint8_t> expected = q.codes;
    int64_t moved = 0;
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < c.k; ++j) {
        const float s = half_to_float(q.scales[i * q.groups() + j / 32]);
        double slope = 0;
        for (int64_t m = 0; m < c.k; ++m) {
          const float scale = half_to_float(q.scales[i * q.groups() + m / 32]);
          slope += (double(c.w[i * c.k + m]) - l.value(expected[i * c.k + m], scale)) * f.h[m * c.k + j];
        }
        uint8_t& code = expected[i * c.k + j];
        const double best = l.value(code, s) + slope / f.h[j * (c.k + 1)] +
                            double(dither) * s * SweepDither(pass, i, j).at(j);
        const uint8_t next = uint8_t(std::clamp<double>(std::nearbyint(best / s), l.low, l.high) + l.offset);
        moved += next != code;
        code = next;
      }
    GptqRefineArgs args{c.w.data(), f.h.data(), q.scales.data(), q.codes.data(), c.n, c.k, 32, l};
    args.dither = dither;
    args.pass = pass;
    gptq_sweep_cpu(args);
    CHECK(moved > 0);
    CHECK(q.codes == expected);
  }
}

TEST_CASE("the dither of a sweep is uniform, and another one for each pass") {
  double sum = 0, squares = 0, product = 0;
  constexpr int64_t kRows = 50, kColumns = 400;
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kColumns; ++j) {
      const double a = SweepDither(1, i, j).at(j), b = SweepDither(2, i, j).at(j);
      CHECK(a >= -1);
      CHECK(a < 1);
      sum += a, squares += a * a, product += a * b;
    }
  constexpr double n = kRows * kColumns;  // standard errors: .004, .002, .0024
  CHECK(std::abs(sum / n) < 0.02);
  CHECK(squares / n == doctest::Approx(1.0 / 3).epsilon(0.03));
  CHECK(std::abs(product / n) < 0.01);
}

TEST_CASE("GPTQ against the textbook: one column at a time on the inverse Hessian in f64") {
  const Case c(8, 150, 5);
  const SolveOptions o = options(GridKind::kSigned, 64, true, false);
  const HessianFactor f = c.factor();
  const QuantizedLinear q = solve(c.problem(), f, o, one_thread_team);
  const Levels l = grid_levels(o.grid);
  int64_t different = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    oracle::Matrix eye(c.k * c.k);
    for (int64_t j = 0; j < c.k; ++j) eye[j * (c.k + 1)] = 1;
    oracle::Matrix inverse = oracle::linear_solve(oracle::widen(f.h), eye, c.k, c.k);
    std::vector<double> w(c.w.begin() + i * c.k, c.w.begin() + (i + 1) * c.k);
    for (int32_t j : f.order) {
      const float s = half_to_float(q.scales[i * q.groups() + j / 64]);
      const uint8_t code = nearest_code(float(w[j]), s, l);
      different += code != q.codes[i * c.k + j];
      const double e = (w[j] - l.value(code, s)) / inverse[j * c.k + j];
      for (int64_t m = 0; m < c.k; ++m) w[m] -= e * inverse[j * c.k + m];
      const std::vector<double> row(inverse.begin() + j * c.k, inverse.begin() + (j + 1) * c.k);
      for (int64_t a = 0; a < c.k; ++a)
        for (int64_t b = 0; b < c.k; ++b) inverse[a * c.k + b] -= row[a] * row[b] / row[j];
      for (int64_t a = 0; a < c.k; ++a) inverse[a * c.k + j] = inverse[j * c.k + a] = 0;
    }
  }
  CHECK(different <= 2);  // of 1200: f32 may fall on the other side of a half, rarely
}

TEST_CASE("against brute force on a tiny case") {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    const Case c(1, 4, 100 + seed);
    const QuantizedLinear q =
        solve(c.problem(), c.factor(), options(GridKind::kSigned, 0, true, true), one_thread_team);
    const Levels l = grid_levels(q.grid);
    const float s = half_to_float(q.scales[0]);
    const auto h = c.factor().h;
    double best = INFINITY;
    for (int code = 0; code < 16 * 16 * 16 * 16; ++code) {
      float v[4];
      for (int j = 0; j < 4; ++j) v[j] = l.value(uint8_t(code >> 4 * j & 15), s);
      best = std::min(best, oracle::row_loss(c.w.data(), v, h, 4));
    }
    const double mine = oracle::row_loss(c.w.data(), oracle::values(q).data(), h, 4);
    CHECK(mine >= best * (1 - 1e-9));
    CHECK(mine <= best * 3);
    CHECK(q.rows[0].error_damped == doctest::Approx(mine).epsilon(1e-4));
  }
}

TEST_CASE("after the last sweep no single code can be improved much, and a sweep never raises the loss") {
  const Case c(6, 75, 7);
  const HessianFactor f = c.factor();
  for (GridKind grid : {GridKind::kSigned, GridKind::kHalf}) {
    QuantizedLinear q = solve(c.problem(), f, options(grid, 32, true, false), one_thread_team);
    const Levels l = grid_levels(grid);
    const GptqRefineArgs args{c.w.data(), f.h.data(), q.scales.data(), q.codes.data(), c.n, c.k, 32, l};
    const auto loss = [&] {
      double sum = 0;
      const auto v = oracle::values(q);
      for (int64_t i = 0; i < c.n; ++i) sum += oracle::row_loss(&c.w[i * c.k], &v[i * c.k], f.h, c.k);
      return sum;
    };
    double before = loss();
    for (int sweep = 0; sweep < 30; ++sweep) {  // to a fixed point
      gptq_sweep_cpu(args);
      const double after = loss();
      CHECK(after <= before * (1 + 1e-6));
      before = after;
    }
    const auto codes = q.codes;
    gptq_sweep_cpu(args);
    CHECK(codes == q.codes);
    for (int64_t i = 0; i < c.n * c.k; ++i) {  // every move of one code, by f64
      const uint8_t old = q.codes[i];
      for (int step : {-1, 1}) {
        const int code = int(old) + step;
        if (code < l.low + l.offset || code > l.high + l.offset) continue;
        q.codes[i] = uint8_t(code);
        CHECK(loss() >= before * (1 - 1e-5));
      }
      q.codes[i] = old;
    }
  }
}

TEST_CASE("refit against the f64 least squares; a group of zeros keeps its scale") {
  const Case c(5, 75, 9);
  const HessianFactor f = c.factor();
  const Levels l = grid_levels(GridKind::kSigned);
  QuantizedLinear q = solve(c.problem(), f, options(GridKind::kSigned, 32, false, false), one_thread_team);
  for (int64_t j = 32; j < 64; ++j) q.codes[2 * c.k + j] = 8;  // row 2, group 1: all zero
  const auto old = q.scales;
  const auto before = oracle::values(q);
  gptq_refit_cpu({c.w.data(), f.h.data(), q.scales.data(), q.codes.data(), c.n, c.k, 32, l});
  const auto after = oracle::values(q);
  CHECK(q.scales != old);
  CHECK(q.scales[2 * 3 + 1] == old[2 * 3 + 1]);
  for (int64_t i = 0; i < c.n; ++i) {
    std::vector<int64_t> live;
    for (int64_t g = 0; g < 3; ++g)
      if (!(i == 2 && g == 1)) live.push_back(g);
    const int64_t m = int64_t(live.size());
    oracle::Matrix a(m * m), b(m);
    const auto level = [&](int64_t j) { return double(int(q.codes[i * c.k + j]) - 8); };
    for (int64_t x = 0; x < m; ++x)
      for (int64_t s = live[x] * 32; s < std::min<int64_t>(c.k, live[x] * 32 + 32); ++s)
        for (int64_t t = 0; t < c.k; ++t) {
          b[x] += level(s) * f.h[s * c.k + t] * c.w[i * c.k + t];
          for (int64_t y = 0; y < m; ++y)
            if (t / 32 == live[y]) a[x * m + y] += level(s) * f.h[s * c.k + t] * level(t);
        }
    const oracle::Matrix best = oracle::linear_solve(a, b, m, 1);
    for (int64_t x = 0; x < m; ++x)
      CHECK(half_to_float(q.scales[i * 3 + live[x]]) == doctest::Approx(best[x]).epsilon(1e-3));  // fp16
    CHECK(oracle::row_loss(&c.w[i * c.k], &after[i * c.k], f.h, c.k) <=
          oracle::row_loss(&c.w[i * c.k], &before[i * c.k], f.h, c.k));
  }
}

TEST_CASE("the correction: W' = W + alpha W D H^-1 + beta E H^-1 by an f64 oracle") {
  // Eight bits and a whole-row group follow the target closely; the rest is quantisation error.
  const Case c(4, 40, 11);
  const auto d = oracle::gaussian(c.k * c.k, 12, 12.0f), e = oracle::gaussian(c.n * c.k, 13, 1.5f);
  const HessianFactor f = c.factor();
  SolveOptions o = options(GridKind::kInt8, 0, true, true);
  o.alpha = 0.5f;
  o.beta = 0.25f;
  oracle::Matrix right(c.k * c.n);  // (alpha W D + beta E)^T
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.k; ++j) {
      double s = 0.25 * e[i * c.k + j];
      for (int64_t l = 0; l < c.k; ++l) s += 0.5 * double(c.w[i * c.k + l]) * d[l * c.k + j];
      right[j * c.n + i] = s;
    }
  const oracle::Matrix change = oracle::linear_solve(oracle::widen(f.h), right, c.k, c.n);
  const LinearProblem p{c.w.data(), d.data(), e.data(), c.n, c.k};
  const auto v = oracle::values(solve(p, f, o, one_thread_team));
  for (int64_t i = 0; i < c.n; ++i) {
    std::vector<float> target(c.k);
    for (int64_t j = 0; j < c.k; ++j) target[j] = float(c.w[i * c.k + j] + change[j * c.n + i]);
    const std::vector<float> zero(c.k, 0.0f);
    CHECK(oracle::row_loss(target.data(), &v[i * c.k], f.h, c.k) <
          1e-3 * oracle::row_loss(&c.w[i * c.k], target.data(), f.h, c.k));
  }
  // One of the two alone goes the same way.
  o.beta = 0.0f;
  const auto only_d = oracle::values(solve({c.w.data(), d.data(), nullptr, c.n, c.k}, f, o, one_thread_team));
  CHECK(only_d == oracle::values(solve({c.w.data(), d.data(), e.data(), c.n, c.k}, f, o, one_thread_team)));
}

TEST_CASE("fallbacks are taken and recorded") {
  Case c(4, 40, 15);
  std::vector<float> bad(c.k * c.k, std::numeric_limits<float>::infinity());
  const HessianFactor f = c.factor();
  SolveOptions o;
  const QuantizedLinear no_target = solve({c.w.data(), bad.data(), nullptr, c.n, c.k}, f, o, one_thread_team);
  CHECK(no_target.fallback.find("correction") != std::string::npos);
  CHECK(no_target.codes == solve(c.problem(), f, o, one_thread_team).codes);

  c.h[0] = std::numeric_limits<float>::quiet_NaN();
  const QuantizedLinear rounded = solve(c.problem(), c.factor(), o, one_thread_team);
  CHECK(rounded.fallback.find("nearest") != std::string::npos);
  o.rtn = true;
  o.search = false;
  const QuantizedLinear asked = solve(c.problem(), f, o, one_thread_team);
  CHECK(asked.fallback.empty());
  CHECK(summarize(asked.rows, c.k, 0, c.n).relative == summarize(asked.rows, c.k, 0, c.n).rtn_relative);
}

TEST_CASE("dead inputs: their weights become zero, the others do not notice") {
  Case c(4, 40, 17);
  for (int64_t j = 0; j < c.k; ++j) c.h[5 * c.k + j] = c.h[j * c.k + 5] = 0.0f;
  const QuantizedLinear q = solve(c.problem(), c.factor(), SolveOptions{}, one_thread_team);
  const auto v = oracle::values(q);
  for (int64_t i = 0; i < c.n; ++i) CHECK(v[i * c.k + 5] == 0.0f);
}

TEST_CASE("the same bits for every number of threads, rows are independent") {
  const Case c(400, 172, 19);
  const auto d = oracle::gaussian(c.k * c.k, 20, 0.4f), e = oracle::gaussian(c.n * c.k, 21, 0.05f);
  const LinearProblem p{c.w.data(), d.data(), e.data(), c.n, c.k};
  const HessianFactor f = c.factor();
  const SolveOptions o = options(GridKind::kSigned, 64, true, true);
  const QuantizedLinear one = solve(p, f, o, one_thread_team);
  for (int count : {2, 3, 5}) {
    const QuantizedLinear many = solve(p, f, o, oracle::parts(count));
    CHECK(many.codes == one.codes);
    CHECK(many.scales == one.scales);
    CHECK(total(many) == total(one));
  }
}

TEST_CASE("losses: the report's sums against f64") {
  const Case c(7, 75, 23);
  const HessianFactor f = c.factor();
  const QuantizedLinear q =
      solve(c.problem(), f, options(GridKind::kSigned, 32, true, true), one_thread_team);
  const auto v = oracle::values(q);
  const std::vector<float> zero(c.k, 0.0f);
  double loss = 0, error = 0, weight = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    loss += 0.5 * oracle::row_loss(&c.w[i * c.k], &v[i * c.k], f.h, c.k);
    error += oracle::row_loss(&c.w[i * c.k], &v[i * c.k], c.h, c.k);
    weight += oracle::row_loss(&c.w[i * c.k], zero.data(), c.h, c.k);
  }
  const LossSummary s = summarize(q.rows, c.k, 0, c.n);
  CHECK(s.loss == doctest::Approx(loss).epsilon(1e-4));
  CHECK(s.relative == doctest::Approx(error / weight).epsilon(1e-3));
  CHECK(summarize(q.rows, c.k, 0, 3).loss + summarize(q.rows, c.k, 3, 7).loss == doctest::Approx(s.loss));
}

TEST_CASE("the seed's method: levels, zero points, and its loss above the static groups' with search") {
  const Case c(12, 172, 25);
  const HessianFactor f = c.factor(0.01);
  for (GridKind grid : {GridKind::kAsym, GridKind::kSym7, GridKind::kSym8, GridKind::kHalf}) {
    const SeedResult r = seed_solve(c.w.data(), c.n, f, grid, 64, one_thread_team);
    const LossSummary s = summarize(r.rows, c.k, 0, c.n);
    CHECK(s.relative > 0.0);
    CHECK(s.relative < 0.1);
    for (int64_t i = 0; i < c.n; ++i) {  // a group of ranks has at most 16 values, evenly spaced
      std::vector<float> group;
      for (int64_t rank = 64; rank < 128; ++rank) group.push_back(r.values[i * c.k + f.order[rank]]);
      std::sort(group.begin(), group.end());
      group.erase(
          std::unique(group.begin(), group.end(), [](float a, float b) { return std::fabs(a - b) < 1e-6f; }),
          group.end());
      CHECK(group.size() <= (grid == GridKind::kSym7 ? 15u : 16u));
    }
    if (grid == GridKind::kSym7) {
      const QuantizedLinear ours =
          solve(c.problem(), f, options(GridKind::kSigned, 64, true, true), one_thread_team);
      CHECK(summarize(ours.rows, c.k, 0, c.n).relative < s.relative);
    }
    CHECK(seed_solve(c.w.data(), c.n, f, grid, 64, oracle::parts(3)).values == r.values);
  }
}
