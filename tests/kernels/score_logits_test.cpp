#include "kernels/score_logits.h"

#include <doctest/doctest.h>

#include <cstring>
#include <limits>

#include "tests/kernels/guarded.h"
#include "tests/kernels/score_cases.h"

using namespace q4s;

TEST_CASE("score_logits against double, whatever the share of a thread") {
  for (const int64_t vocab : {1, 31, 1025, 32000})
    for (const float wide : {0.1f, 3.f, 40.f})
      for (const bool with_reference : {false, true}) {
        CAPTURE(vocab);
        CAPTURE(wide);
        CAPTURE(with_reference);
        const test::ScoreCase c(7, vocab, wide);
        std::vector<LogitScore> first;
        for (const int parts : {1, 3}) {
          Guarded<float> q(7 * vocab), p(7 * vocab);  // faults on a read past the last row
          std::copy(c.logits.begin(), c.logits.end(), q.begin());
          std::copy(c.reference.begin(), c.reference.end(), p.begin());
          Guarded<LogitScore> score(7);
          for (int i = 0; i < parts; ++i)
            score_logits(
                {q.data(), with_reference ? p.data() : nullptr, c.target.data(), score.data(), 7, vocab},
                {i, parts});
          const std::vector<LogitScore> got(score.begin(), score.end());
          CHECK(test::right(c, got, with_reference));
          if (first.empty()) first = got;
          CHECK(std::memcmp(got.data(), first.data(), 7 * sizeof(LogitScore)) == 0);
        }
      }
}

TEST_CASE("score_logits: what is not finite makes that row's score NaN and no other's") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()})
    for (const bool in_reference : {false, true})
      for (const int64_t at : {0, 17, 30}) {
        test::ScoreCase c(3, 31, 1);
        (in_reference ? c.reference : c.logits)[31 + at] = bad;
        std::vector<LogitScore> s(3);
        score_logits({c.logits.data(), c.reference.data(), c.target.data(), s.data(), 3, 31});
        CHECK(std::isnan(s[1].nll + s[1].ref_nll + s[1].kl));
        for (const int i : {0, 2}) CHECK(std::abs(s[i].kl - c.score_of(i).kl) < 4e-6);
        score_logits({c.logits.data(), nullptr, c.target.data(), s.data(), 3, 31});
        CHECK(std::isnan(s[1].nll) != in_reference);
      }
}

TEST_CASE("score_logits: negative log-likelihood of plain cases") {
  const std::vector<float> even(8, 3.f), sure = {0, 1000, 0};
  const auto nll = [](const std::vector<float>& logits, int32_t target) {
    LogitScore s;
    score_logits({logits.data(), nullptr, &target, &s, 1, int64_t(logits.size())});
    return s.nll;
  };
  CHECK(nll(even, 5) == doctest::Approx(std::log(8.0)));
  CHECK(nll(sure, 1) == 0);
  CHECK(nll(sure, 0) == 1000);
}
