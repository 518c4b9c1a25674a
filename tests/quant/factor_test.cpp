#include "quant/factor.h"

#include <doctest/doctest.h>

#include <limits>

#include "kernels/gptq.h"
#include "tests/quant/oracle.h"

using namespace q4s;

TEST_CASE("U^T U is the inverse of the damped H in its order") {
  for (int64_t k : {1, 7, 128, 300}) {
    const auto x = oracle::inputs(2 * k + 3, k, 5);
    const auto h = oracle::hessian(x, 2 * k + 3, k);
    const HessianFactor f = factor_hessian(h, k, 0.01, true, one_thread_team);
    REQUIRE(f.ok());
    CHECK(f.damp == 0.01);
    double worst = 0;
    for (int64_t i = 0; i < k; ++i) {
      std::vector<double> row(k);  // row i of U^T U
      for (int64_t l = 0; l <= i; ++l)
        for (int64_t j = l; j < k; ++j) row[j] += double(f.u[l * k + i]) * f.u[l * k + j];
      for (int64_t j = 0; j < k; ++j) {
        double s = 0;
        for (int64_t l = 0; l < k; ++l) s += row[l] * f.h[int64_t(f.order[l]) * k + f.order[j]];
        worst = std::max(worst, std::fabs(s - (i == j)));
      }
      if (i > 0) CHECK(h[f.order[i - 1] * (k + 1)] >= h[f.order[i] * (k + 1)]);
    }
    CHECK(worst < 2e-5);  // U is kept in f32; the condition number is about 1e3
  }
}

TEST_CASE("a Hessian without full rank needs damping: the ladder climbs until it factors") {
  const int64_t k = 20;
  std::vector<float> h(k * k, 1.0f);   // rank one
  h[3 * k + 4] = h[4 * k + 3] = 1.2f;  // and indefinite: smallest eigenvalue about -0.2
  const HessianFactor f = factor_hessian(h, k, 0.001, true, one_thread_team);
  REQUIRE(f.ok());
  CHECK(f.damp > 0.1);
  CHECK(f.damp < 1.0);
  CHECK(f.lambda == doctest::Approx(f.damp));
}

TEST_CASE("what cannot be factored is reported, not returned") {
  const int64_t k = 4;
  std::vector<float> h(k * k, 0.0f);
  for (int64_t j = 0; j < k; ++j) h[j * (k + 1)] = 1.0f;
  h[1] = h[k] = std::numeric_limits<float>::quiet_NaN();
  CHECK_FALSE(factor_hessian(h, k, 0.01, true, one_thread_team).ok());
  h[1] = h[k] = 100.0f;
  CHECK_FALSE(factor_hessian(h, k, 0.01, true, one_thread_team).ok());
}

TEST_CASE("dead columns get diagonal 1 and are marked") {
  const int64_t k = 3;
  const std::vector<float> h = {4, 0, 2, 0, 0, 0, 2, 0, 5};
  const HessianFactor f = factor_hessian(h, k, 0.0, false, one_thread_team);
  REQUIRE(f.ok());
  CHECK(f.dead == std::vector<uint8_t>{0, 1, 0});
  CHECK(f.h[4] == 1.0f);
}

TEST_CASE("the factor is the same bits for every number of threads") {
  const int64_t k = 517;
  const auto h = oracle::hessian(oracle::inputs(600, k, 9), 600, k);
  const HessianFactor one = factor_hessian(h, k, 0.01, true, one_thread_team);
  for (int count : {2, 3, 7}) CHECK(factor_hessian(h, k, 0.01, true, oracle::parts(count)).u == one.u);
}

TEST_CASE("gram: H, D and E against f64, in pieces, for every number of threads") {
  const int64_t tokens = 37, k = 130, n = 101;
  const auto x = oracle::inputs(tokens, k, 1), other = oracle::gaussian(tokens * n, 2);
  std::vector<float> h(k * k), e(n * k);
  for (int64_t at = 0, step = 10; at < tokens; at += step) {
    const int64_t size = std::min(step, tokens - at);
    gptq_gram_cpu({&x[at * k], &x[at * k], h.data(), size, k, k, 0.5f, true});
    gptq_gram_cpu({&other[at * n], &x[at * k], e.data(), size, n, k, 0.5f, false});
  }
  const auto exact = oracle::hessian(x, tokens, k, 0.5);
  double worst = 0, scale = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      if (j >= i) worst = std::max(worst, std::fabs(double(h[i * k + j]) - exact[i * k + j]));
      scale = std::max(scale, std::fabs(double(exact[i * k + j])));
    }
  CHECK(worst < 1e-6 * scale);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) {
      double s = 0;
      for (int64_t t = 0; t < tokens; ++t) s += 0.5 * double(other[t * n + i]) * x[t * k + j];
      CHECK(e[i * k + j] == doctest::Approx(s).epsilon(1e-4).scale(1.0));
    }
  std::vector<float> split(n * k), whole(n * k);
  gptq_gram_cpu({other.data(), x.data(), whole.data(), tokens, n, k, 0.5f, false});
  oracle::parts(3)([&](Part p) {
    gptq_gram_cpu({other.data(), x.data(), split.data(), tokens, n, k, 0.5f, false}, p);
  });
  CHECK(split == whole);
}
