// A real trained model, stories260K, against an independent float64 implementation: logits, greedy text and
// perplexity, the whole way from the files on disk.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "models/generate.h"
#include "models/perplexity.h"
#include "runtime/sampler.h"
#include "runtime/tokenizer.h"
#include "tests/shared_data.h"

using namespace q4s;

namespace {

std::string contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

nlohmann::json json_of(const std::string& path) { return nlohmann::json::parse(contents(path)); }

// Values of a version 1 .npy file of doubles.
std::vector<double> npy_doubles(const std::string& path) {
  const std::string bytes = contents(path);
  uint16_t header = 0;
  std::memcpy(&header, bytes.data() + 8, 2);
  REQUIRE(bytes.substr(10, header).find("'<f8'") != std::string::npos);
  std::vector<double> values((bytes.size() - 10 - header) / 8);
  std::memcpy(values.data(), bytes.data() + 10 + header, values.size() * 8);
  return values;
}

}  // namespace

TEST_CASE("stories260K: logits within 1e-4 of the golden ones") {
  const std::string folder = test::shared_data("stories260K");
  if (folder.empty()) return;
  const std::vector<int32_t> ids = json_of(folder + "/golden_logits.json")["ids"];
  const std::vector<double> golden = npy_doubles(folder + "/golden_logits.npy");
  LlamaModel model = open_llama(folder);
  REQUIRE(golden.size() == ids.size() * size_t(model.config.vocab));
  const auto backend = make_cpu_backend(2);
  Session session(model, *backend, {.kv = default_kv(model, *backend)});
  double worst = 0;
  int64_t rows = 0;
  session.feed_all(ids, 0, 0, [&](int64_t i, std::span<const float> logits) {
    ++rows;
    for (size_t v = 0; v < logits.size(); ++v)
      worst = std::max(worst, std::abs(logits[v] - golden[size_t(i) * logits.size() + v]));
  });
  CHECK(rows == int64_t(ids.size()));
  MESSAGE("largest difference " << worst);
  CHECK(worst <= 1e-4);
}

TEST_CASE("stories260K: greedy text equals the golden one") {
  const std::string folder = test::shared_data("stories260K");
  if (folder.empty()) return;
  LlamaModel model = open_llama(folder);
  const auto backend = make_cpu_backend(2);
  Session session(model, *backend, {.kv = default_kv(model, *backend)});
  const nlohmann::json cases = json_of(folder + "/golden_greedy.json").at("cases");
  for (const auto& golden : cases) {
    const std::string prompt = golden["prompt"];
    const std::vector<int32_t> ids = model.tokenizer->encode_prompt(prompt, true),
                               expected = golden["greedy_ids"];
    CHECK(ids == golden["prompt_ids"].get<std::vector<int32_t>>());
    SamplerOptions greedy;
    greedy.temperature = 0;
    Sampler sampler(greedy);
    session.truncate(0, 0);
    std::string streamed;
    const Generated g = generate(
        session, *model.tokenizer, sampler, ids, {.predict = int64_t(expected.size()), .stop = {}},
        [&](int32_t, std::string_view text) { streamed += text; }, [] { return false; });
    CHECK(g.tokens == expected);
    CHECK(g.reason == StopReason::kLength);
    CHECK(streamed == g.text);
    // An empty prompt's text begins with the space that the tokenizer puts before a text.
    const std::string whole = prompt + g.text;
    CHECK((prompt.empty() ? whole.substr(1) : whole) == golden["text"].get<std::string>());
  }
}

TEST_CASE("stories260K: perplexity of 400 windows") {
  const std::string folder = test::shared_data("stories260K");
  if (folder.empty()) return;
  LlamaModel model = open_llama(folder);
  const auto backend = make_cpu_backend(1);
  Session session(model, *backend, {.ctx = 128, .kv = default_kv(model, *backend)});
  for (const auto& [file, expected] :
       {std::pair("text/wiki.test.raw", 140.502), std::pair("text/tinystories.txt", 7.0196)}) {
    const std::string path = test::shared_data(file);
    if (path.empty()) return;
    const PplText text = cut_text(contents(path), *model.tokenizer, model.config.context,
                                  {.protocol = PplProtocol::kLlamaCpp, .ctx = 128, .chunks = 400});
    const PplResult r = perplexity(text, session, nullptr, nullptr);
    CHECK(r.scored == 400 * 63);
    CHECK(std::abs(r.ppl - expected) < 0.01);
  }
}
