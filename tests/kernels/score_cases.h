// Rows of logits and their scores in double, for the tests of score_logits.h on both devices.
#pragma once
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/score_logits.h"

namespace q4s::test {

struct ScoreCase {
  int64_t rows, vocab;
  std::vector<float> logits, reference;  // (R, V)
  std::vector<int32_t> target;

  // wide: standard deviation of the logits. Every third row is largest at the same id as the reference's,
  // twice.
  ScoreCase(int64_t r, int64_t v, float wide)
      : rows(r), vocab(v), logits(r * v), reference(r * v), target(r) {
    std::mt19937 random(uint32_t(r * 131 + v));
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < logits.size(); ++i) {
      reference[i] = wide * normal(random) - 7;
      logits[i] = reference[i] + 0.3f * normal(random) + 2;
    }
    for (int64_t i = 0; i < rows; ++i) {
      target[i] = int32_t(i == 0 ? 0 : i == 1 ? vocab - 1 : random() % vocab);
      if (i % 3 == 0)
        for (std::vector<float>* x : {&logits, &reference})
          (*x)[i * vocab + vocab / 2] = (*x)[i * vocab + vocab - 1] = 5 * wide;
    }
  }

  LogitScore score_of(int64_t row) const {
    const float *q = &logits[row * vocab], *p = &reference[row * vocab];
    const auto lse = [&](const float* x) {
      const double top = *std::max_element(x, x + vocab);
      double sum = 0;
      for (int64_t i = 0; i < vocab; ++i) sum += std::exp(x[i] - top);
      return top + std::log(sum);
    };
    const double lse_q = lse(q), lse_p = lse(p);
    double kl = 0;
    for (int64_t i = 0; i < vocab; ++i) kl += std::exp(p[i] - lse_p) * ((p[i] - lse_p) - (q[i] - lse_q));
    const bool same = std::max_element(p, p + vocab) - p == std::max_element(q, q + vocab) - q;
    return {lse_q - q[target[row]], lse_p - p[target[row]], kl, same};
  }
};

// Whether all rows are right, for scores made with and without the reference.
inline bool right(const ScoreCase& c, const std::vector<LogitScore>& got, bool with_reference) {
  for (int64_t i = 0; i < c.rows; ++i) {
    const LogitScore want = c.score_of(i), &s = got[i];
    if (!(std::abs(s.nll - want.nll) < 1e-6)) return false;
    if (!with_reference && (s.ref_nll != 0 || s.kl != 0 || s.same_top != 0)) return false;
    if (with_reference && !(std::abs(s.ref_nll - want.ref_nll) < 1e-6 && std::abs(s.kl - want.kl) < 4e-6 &&
                            s.same_top == want.same_top))
      return false;
  }
  return true;
}

}  // namespace q4s::test
