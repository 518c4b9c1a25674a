// Scores of logits on the GPU against double over odd vocabularies; all buffers between guard words.
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <limits>

#include "tests/kernels/device_guarded.h"
#include "tests/kernels/score_cases.h"

using namespace q4s;

TEST_CASE("cuda score_logits against double, the same bits twice") {
  if (no_device()) return;
  for (const int64_t vocab : {1, 31, 513, 32000, 128256})
    for (const float wide : {0.1f, 3.f, 40.f})
      for (const bool with_reference : {false, true}) {
        if (quick() && vocab > 513 && wide != 3.f) continue;
        CAPTURE(vocab);
        CAPTURE(wide);
        CAPTURE(with_reference);
        const test::ScoreCase c(5, vocab, wide);
        DeviceGuarded<float> q(c.logits), p(c.reference);
        DeviceGuarded<int32_t> target(c.target);
        DeviceGuarded<LogitScore> score(5);
        std::vector<LogitScore> first;
        for (int run = 0; run < 2; ++run) {
          score_logits_cuda(
              {q.data(), with_reference ? p.data() : nullptr, target.data(), score.data(), 5, vocab},
              nullptr);
          const std::vector<LogitScore> got = score.get();
          CHECK(test::right(c, got, with_reference));
          if (first.empty()) first = got;
          CHECK(std::memcmp(got.data(), first.data(), 5 * sizeof(LogitScore)) == 0);
        }
        CHECK(q.get() == c.logits);
      }
}

TEST_CASE("cuda score_logits: what is not finite makes that row's score NaN and no other's") {
  if (no_device()) return;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()})
    for (const bool in_reference : {false, true})
      for (const int64_t at : {0, 700, 999}) {
        test::ScoreCase c(3, 1000, 1);
        (in_reference ? c.reference : c.logits)[1000 + at] = bad;
        DeviceGuarded<float> q(c.logits), p(c.reference);
        DeviceGuarded<int32_t> target(c.target);
        DeviceGuarded<LogitScore> score(3);
        score_logits_cuda({q.data(), p.data(), target.data(), score.data(), 3, 1000}, nullptr);
        const std::vector<LogitScore> s = score.get();
        CHECK(std::isnan(s[1].nll + s[1].ref_nll + s[1].kl));
        for (const int i : {0, 2}) CHECK(std::abs(s[i].kl - c.score_of(i).kl) < 4e-6);
        score_logits_cuda({q.data(), nullptr, target.data(), score.data(), 3, 1000}, nullptr);
        CHECK(std::isnan(score.get()[1].nll) != in_reference);
      }
}
