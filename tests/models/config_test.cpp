#include "models/config.h"

#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "runtime/error.h"

using namespace q4s;
using Json = nlohmann::json;

namespace {

Json good() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 64},
          {"intermediate_size", 172},
          {"num_hidden_layers", 5},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 4},
          {"vocab_size", 512},
          {"max_position_embeddings", 512},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0}};
}

std::string message(const Json& j) {
  try {
    config_from_hf(j.dump(), "config.json");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("a Hugging Face config and its way through .q4s") {
  Json j = good();
  j["rope_scaling"] = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 256}};
  const LlamaConfig c = config_from_hf(j.dump(), "x");
  CHECK(c.head_dim == 8);
  CHECK(c.qkv_dim() == 128);
  const LlamaConfig d = config_from_q4s(config_to_json(c), "x");
  CHECK(config_to_json(d) == config_to_json(c));
  CHECK(d.scaling.kind == RopeScaling::Kind::kLlama3);
  CHECK(d.eps == c.eps);
}

TEST_CASE("every mismatch is listed at once") {
  Json j = good();
  j["model_type"] = "gemma";
  j["attention_bias"] = true;
  j["sliding_window"] = 128;
  j["rope_scaling"] = {{"type", "yarn"}, {"factor", 2.0}};
  j["num_key_value_heads"] = 3;
  j["hidden_act"] = "gelu";
  j["quantization_config"] = Json::object();
  const std::string m = message(j);
  for (const char* part :
       {"gemma", "attention_bias", "sliding window", "yarn", "kv heads 3", "gelu", "quantised"}) {
    CAPTURE(part);
    CHECK(has(m, part));
  }
}

TEST_CASE("bad numbers are refused") {
  for (const auto& [key, value] : {std::pair<const char*, Json>{"hidden_size", 0},
                                   {"hidden_size", -64},
                                   {"hidden_size", 1e18},
                                   {"hidden_size", "64"},
                                   {"vocab_size", int64_t(1) << 40},
                                   {"num_attention_heads", 0},
                                   {"rope_theta", -1.0},
                                   {"rms_norm_eps", 5.0},
                                   {"num_hidden_layers", nullptr},
                                   {"hidden_size", 60}}) {
    Json j = good();
    j[key] = value;
    CAPTURE(key);
    CAPTURE(value.dump());
    CHECK(!message(j).empty());
  }
  CHECK_THROWS_AS(config_from_hf("[1]", "x"), Error);
  CHECK_THROWS_AS(config_from_hf("{", "x"), Error);
}

TEST_CASE("a window as wide as the context is no window") {
  Json j = good();
  j["model_type"] = "mistral";
  j["architectures"] = {"MistralForCausalLM"};
  j["sliding_window"] = 512;
  CHECK(message(j).empty());
}

TEST_CASE("rope frequencies") {
  LlamaConfig c = config_from_hf(good().dump(), "x");
  const auto table = rope_table(c, 3);
  CHECK(table[0] == 1.0f);
  CHECK(table[1] == 0.0f);
  CHECK(table[2 * 8 + 2] == doctest::Approx(std::cos(2 * std::pow(10000.0, -0.25))));
  c.scaling.kind = RopeScaling::Kind::kLinear;
  c.scaling.factor = 4;
  CHECK(rope_table(c, 3)[2 * 8 + 2] == doctest::Approx(std::cos(0.5 * std::pow(10000.0, -0.25))));
  // Llama-3: long waves slowed by the factor, short ones kept.
  c.scaling.kind = RopeScaling::Kind::kLlama3;
  c.scaling.factor = 8;
  c.scaling.original_context = 256;
  CHECK(rope_table(c, 2)[8 + 0] == doctest::Approx(std::cos(1.0)));
  CHECK(rope_table(c, 2)[8 + 6 + 1] == doctest::Approx(std::sin(std::pow(10000.0, -0.75) / 8)));
}
