#include "runtime/sampler.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <set>

#include "runtime/error.h"

using namespace q4s;

namespace {

SamplerOptions plain() {  // the model's own distribution
  SamplerOptions options;
  options.temperature = 1;
  options.top_k = 0;
  options.top_p = 1;
  options.min_p = 0;
  return options;
}

std::vector<double> frequencies(const SamplerOptions& options, const std::vector<float>& logits, int draws) {
  Sampler sampler(options);
  std::vector<double> share(logits.size());
  for (int i = 0; i < draws; ++i) share[sampler.sample(logits)] += 1.0 / draws;
  return share;
}

// Ids that can come out at all.
std::set<int32_t> support(const SamplerOptions& options, const std::vector<float>& logits) {
  std::set<int32_t> ids;
  Sampler sampler(options);
  for (int i = 0; i < 3000; ++i) ids.insert(sampler.sample(logits));
  return ids;
}

std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p) + 3));
  return logits;
}

}  // namespace

TEST_CASE("greedy: the highest logit, the lowest id among equals") {
  SamplerOptions options;
  options.temperature = 0;
  Sampler sampler(options);
  CHECK(sampler.sample(std::vector<float>{1, 5, 2, 5}) == 1);
  CHECK(sampler.sample(std::vector<float>{-1, -1}) == 0);
  CHECK(sampler.sample(std::vector<float>{-3}) == 0);
}

TEST_CASE("plain sampling follows the softmax, temperature bends it") {
  const std::vector<double> p = {0.5, 0.1, 0.25, 0.15};
  constexpr int kDraws = 200000;
  for (float temperature : {1.0f, 0.5f, 2.0f}) {
    SamplerOptions options = plain();
    options.temperature = temperature;
    double total = 0;
    for (double x : p) total += std::pow(x, 1 / temperature);
    const auto share = frequencies(options, logits_of(p), kDraws);
    for (size_t i = 0; i < p.size(); ++i) {
      const double expected = std::pow(p[i], 1 / temperature) / total;
      CHECK(std::abs(share[i] - expected) < 5 * std::sqrt(expected * (1 - expected) / kDraws));
    }
  }
}

TEST_CASE("truncation keeps exactly the ids it should, in their old proportions") {
  const std::vector<double> p = {0.1, 0.4, 0.05, 0.3, 0.15};
  const auto logits = logits_of(p);
  SamplerOptions options = plain();
  options.top_k = 2;
  CHECK(support(options, logits) == std::set<int32_t>{1, 3});
  CHECK(std::abs(frequencies(options, logits, 100000)[1] - 4.0 / 7) < 0.01);
  options.top_k = 100;
  CHECK(support(options, logits).size() == 5);

  options = plain();
  options.top_p = 0.65f;
  CHECK(support(options, logits) == std::set<int32_t>{1, 3});
  options.top_p = 0.75f;
  CHECK(support(options, logits) == std::set<int32_t>{1, 3, 4});
  options.top_p = 0;
  CHECK(support(options, logits) == std::set<int32_t>{1});

  options = plain();
  options.min_p = 0.3f;  // of 0.4
  CHECK(support(options, logits) == std::set<int32_t>{1, 3, 4});
  options.min_p = 1;
  CHECK(support(options, logits) == std::set<int32_t>{1});

  options = plain();  // top-p counts shares of what top-k left: 0.4 of 0.85 is not yet 0.47, with 0.3 it is
  options.top_k = 3;
  options.top_p = 0.48f;
  CHECK(support(options, logits) == std::set<int32_t>{1, 3});
  options.top_p = 0.47f;
  CHECK(support(options, logits) == std::set<int32_t>{1});
}

TEST_CASE("equal logits at the edge of top-k: the lowest ids stay") {
  SamplerOptions options = plain();
  options.top_k = 2;
  CHECK(support(options, {0, 1, 1, 1}) == std::set<int32_t>{1, 2});
}

TEST_CASE("penalties look at the window only") {
  SamplerOptions options = plain();
  options.temperature = 0;
  options.repeat_penalty = 2;
  options.repeat_last_n = 2;
  Sampler sampler(options);
  const std::vector<float> logits = {4, 3, -1};
  CHECK(sampler.sample(logits) == 0);
  sampler.accept(0);
  CHECK(sampler.sample(logits) == 1);  // 2 against 3
  sampler.accept(1);
  CHECK(sampler.sample(logits) == 0);  // 2 against 1.5
  sampler.accept(1);                   // 0 leaves the window
  CHECK(sampler.sample(logits) == 0);
  sampler.accept(2);
  CHECK(sampler.sample(std::vector<float>{-3, -5, -1}) == 2);  // -2: a negative logit is multiplied
  CHECK(sampler.sample(std::vector<float>{-1.5, -5, -1}) == 0);

  options.repeat_penalty = 1;
  options.frequency_penalty = 0.6f;
  options.repeat_last_n = -1;
  Sampler counting(options);
  counting.accept(0);
  CHECK(counting.sample(std::vector<float>{4, 3}) == 0);  // 3.4
  counting.accept(0);
  CHECK(counting.sample(std::vector<float>{4, 3}) == 1);  // 2.8
  options.frequency_penalty = 0;
  options.presence_penalty = 0.6f;
  Sampler once(options);
  for (int i = 0; i < 5; ++i) once.accept(0);
  CHECK(once.sample(std::vector<float>{4, 3}) == 0);  // 3.4, however often
  options.repeat_last_n = 0;
  options.presence_penalty = 100;
  Sampler off(options);
  off.accept(0);
  CHECK(off.sample(std::vector<float>{4, 3}) == 0);
}

TEST_CASE("banned ids never come out") {
  SamplerOptions options = plain();
  options.banned = {1, 99};
  CHECK(support(options, {0, 5, 0}) == std::set<int32_t>{0, 2});
  options.temperature = 0;
  CHECK(Sampler(options).sample(std::vector<float>{0, 5, 1}) == 2);
  options.banned = {0};
  CHECK_THROWS_AS(Sampler(options).sample(std::vector<float>{0}), Error);
}

TEST_CASE("the same seed and sequence give the same ids, others differ") {
  const std::vector<float> logits(1000, 0.0f);
  auto draw = [&](uint64_t seed, uint64_t sequence) {
    SamplerOptions options = plain();
    options.seed = seed;
    Sampler sampler(options, sequence);
    std::vector<int32_t> ids;
    for (int i = 0; i < 20; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  CHECK(draw(1, 0) == draw(1, 0));
  CHECK(draw(1, 0) != draw(2, 0));
  CHECK(draw(1, 0) != draw(1, 1));
}

TEST_CASE("a logit that is not finite is reported, never sampled from") {
  for (float bad : {NAN, INFINITY, -INFINITY}) {
    for (float temperature : {0.0f, 1.0f}) {
      SamplerOptions options;
      options.temperature = temperature;
      try {
        Sampler(options).sample(std::vector<float>{1, 2, bad, 3});
        FAIL("sampled");
      } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::kRuntime);
        CHECK(std::string(error.what()).find("token 2") != std::string::npos);
      }
    }
  }
  CHECK_THROWS_AS(Sampler({}).sample({}), Error);
}

TEST_CASE("options out of range are usage errors that name the option") {
  auto refused = [](const char* option, auto change) {
    SamplerOptions options;
    options.check();
    change(options);
    try {
      options.check();
      FAIL("accepted: " << option);
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::kUsage);
      CHECK(std::string(error.what()).find(option) == 0);
    }
  };
  refused("--temp", [](SamplerOptions& o) { o.temperature = NAN; });
  refused("--temp", [](SamplerOptions& o) { o.temperature = -1; });
  refused("--temp", [](SamplerOptions& o) { o.temperature = INFINITY; });
  refused("--top-k", [](SamplerOptions& o) { o.top_k = -1; });
  refused("--top-p", [](SamplerOptions& o) { o.top_p = 2; });
  refused("--min-p", [](SamplerOptions& o) { o.min_p = -0.1f; });
  refused("--repeat-penalty", [](SamplerOptions& o) { o.repeat_penalty = 0; });
  refused("--repeat-last-n", [](SamplerOptions& o) { o.repeat_last_n = -2; });
  refused("--presence-penalty", [](SamplerOptions& o) { o.presence_penalty = NAN; });
  refused("--frequency-penalty", [](SamplerOptions& o) { o.frequency_penalty = 1e9f; });
}
