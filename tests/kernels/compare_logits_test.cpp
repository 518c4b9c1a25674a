#include "kernels/compare_logits.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

using namespace q4s;

TEST_CASE("compare_logits against f64, at every length around the lanes and over several pieces") {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int64_t n : {1, 2, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2064, 5000}) {
    for (float wide : {0.1f, 3.0f, 40.0f}) {  // 40: most terms vanish
      std::vector<float> p(n), q(n);
      for (int64_t i = 0; i < n; ++i) {
        p[i] = wide * normal(random) + 7;
        q[i] = p[i] + 0.3f * normal(random) - 2;
      }
      const auto lse = [](const std::vector<float>& x) {
        const double top = *std::max_element(x.begin(), x.end());
        double sum = 0;
        for (float v : x) sum += std::exp(double(v) - top);
        return top + std::log(sum);
      };
      const double lse_p = lse(p), lse_q = lse(q);
      double kl = 0;
      for (int64_t i = 0; i < n; ++i) kl += std::exp(p[i] - lse_p) * ((p[i] - lse_p) - (q[i] - lse_q));
      const LogitComparison c = compare_logits(p.data(), q.data(), n);
      CHECK(std::abs(c.lse_p - lse_p) < 1e-6);
      CHECK(std::abs(c.lse_q - lse_q) < 1e-6);
      CHECK(std::abs(c.kl - kl) < 4e-6);
      CHECK(c.top_p == std::max_element(p.begin(), p.end()) - p.begin());
      CHECK(c.top_q == std::max_element(q.begin(), q.end()) - q.begin());
    }
  }
}

TEST_CASE("compare_logits: a row against itself, equal tops, logits far below the top") {
  std::vector<float> p(3000, -500.0f);
  p[17] = p[2999] = 2.0f;
  const LogitComparison c = compare_logits(p.data(), p.data(), 3000);
  CHECK(std::abs(c.kl) < 1e-7);
  CHECK(c.top_p == 17);
  CHECK(c.lse_p == doctest::Approx(2 + std::log(2.0)));
}
