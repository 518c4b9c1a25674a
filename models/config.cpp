#include "models/config.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "runtime/error.h"
#include "runtime/gguf.h"

namespace q4s {
namespace {

using Json = nlohmann::json;
constexpr int64_t kMaxDim = int64_t(1) << 24;  // of any count in a config; keeps every product in 64 bits

// Collects mismatches so that all are reported at once.
class Problems {
 public:
  void add(const std::string& text) { text_ += (text_.empty() ? "" : "; ") + text; }
  void throw_if_any(const std::string& where) const {
    if (!text_.empty()) throw Error(ErrorKind::kInput, where + ": " + text_);
  }

 private:
  std::string text_;
};

Json parse_object(const std::string& text, const std::string& where) {
  Json j = Json::parse(text, nullptr, false);
  if (!j.is_object()) throw Error(ErrorKind::kInput, where + ": not a JSON object");
  return j;
}

bool present(const Json& j, const char* key) { return j.contains(key) && !j.at(key).is_null(); }

int64_t integer(const Json& j, const char* key, int64_t fallback, Problems& problems) {
  if (!present(j, key)) {
    if (fallback < 0) problems.add(std::string(key) + " is missing");
    return fallback;
  }
  if (!j.at(key).is_number_integer()) {
    problems.add(std::string(key) + " is " + j.at(key).dump() + ", expected an integer");
    return 0;
  }
  return j.at(key).get<int64_t>();
}

double number(const Json& j, const char* key, double fallback, Problems& problems) {
  if (!present(j, key)) return fallback;
  if (!j.at(key).is_number()) {
    problems.add(std::string(key) + " is " + j.at(key).dump() + ", expected a number");
    return fallback;
  }
  return j.at(key).get<double>();
}

bool boolean(const Json& j, const char* key, bool fallback, Problems& problems) {
  if (!present(j, key)) return fallback;
  if (!j.at(key).is_boolean()) {
    problems.add(std::string(key) + " is " + j.at(key).dump() + ", expected true or false");
    return fallback;
  }
  return j.at(key).get<bool>();
}

std::string text(const Json& j, const char* key, const std::string& fallback) {
  return present(j, key) && j.at(key).is_string() ? j.at(key).get<std::string>() : fallback;
}

// Every relation between the numbers that the engine relies on.
void check(const LlamaConfig& c, Problems& problems) {
  const std::pair<const char*, int64_t> counts[] = {{"hidden size", c.dim},   {"intermediate size", c.hidden},
                                                    {"layers", c.layers},     {"heads", c.heads},
                                                    {"kv heads", c.kv_heads}, {"head dim", c.head_dim},
                                                    {"vocabulary", c.vocab},  {"context", c.context}};
  bool ok = true;
  for (const auto& [name, value] : counts) {
    if (value >= 1 && value <= kMaxDim) continue;
    problems.add(std::string(name) + " is " + std::to_string(value) + ", expected 1.." +
                 std::to_string(kMaxDim));
    ok = false;
  }
  if (!ok) return;
  if (c.heads % c.kv_heads != 0)
    problems.add("heads " + std::to_string(c.heads) + " is no multiple of kv heads " +
                 std::to_string(c.kv_heads));
  if (c.head_dim % 2 != 0 || c.head_dim > 1024)
    problems.add("head dim " + std::to_string(c.head_dim) + ", expected an even number up to 1024");
  if (!(c.eps >= 0 && c.eps < 1)) problems.add("rms norm eps " + std::to_string(c.eps) + ", expected 0..1");
  if (!(c.rope_theta > 0 && std::isfinite(c.rope_theta)))
    problems.add("rope theta " + std::to_string(c.rope_theta) + ", expected a positive number");
  const RopeScaling& s = c.scaling;
  if (!(s.factor > 0 && std::isfinite(s.factor)) || !(s.low_freq_factor > 0) ||
      (s.kind == RopeScaling::Kind::kLlama3 &&
       (!(s.high_freq_factor > s.low_freq_factor) || s.original_context < 1)))
    problems.add("rope scaling factors are out of range");
}

void read_rope_scaling(const Json& j, LlamaConfig& c, Problems& problems) {
  std::string type = text(j, "rope_type", text(j, "type", "default"));
  c.rope_theta = number(j, "rope_theta", c.rope_theta, problems);
  if (type == "default") return;
  c.scaling.factor = number(j, "factor", 1, problems);
  if (type == "linear") {
    c.scaling.kind = RopeScaling::Kind::kLinear;
  } else if (type == "llama3") {
    c.scaling.kind = RopeScaling::Kind::kLlama3;
    c.scaling.low_freq_factor = number(j, "low_freq_factor", 1, problems);
    c.scaling.high_freq_factor = number(j, "high_freq_factor", 4, problems);
    c.scaling.original_context = integer(j, "original_max_position_embeddings", -1, problems);
  } else {
    problems.add("rope type '" + type + "' is not supported (default, linear and llama3 are)");
  }
}

}  // namespace

LlamaConfig config_from_hf(const std::string& config_json, const std::string& where) {
  const Json j = parse_object(config_json, where);
  Problems problems;
  const std::string type = text(j, "model_type", "");
  if (type != "llama" && type != "mistral")
    problems.add("model_type '" + type + "' is not supported (llama and mistral are)");
  if (present(j, "architectures")) {
    const std::string a = j.at("architectures").dump();
    if (a != R"(["LlamaForCausalLM"])" && a != R"(["MistralForCausalLM"])")
      problems.add("architectures " + a + " is not supported");
  }
  if (const std::string act = text(j, "hidden_act", "silu"); act != "silu" && act != "swish")
    problems.add("hidden_act '" + act + "' is not supported (silu is)");
  for (const char* bias : {"attention_bias", "mlp_bias"})
    if (boolean(j, bias, false, problems)) problems.add(std::string(bias) + " is not supported");
  if (present(j, "quantization_config"))
    problems.add("the checkpoint is already quantised (quantization_config); the unquantised one is needed");

  LlamaConfig c;
  c.dim = integer(j, "hidden_size", -1, problems);
  c.hidden = integer(j, "intermediate_size", -1, problems);
  c.layers = integer(j, "num_hidden_layers", -1, problems);
  c.heads = integer(j, "num_attention_heads", -1, problems);
  c.kv_heads = integer(j, "num_key_value_heads", c.heads, problems);
  c.head_dim = integer(j, "head_dim", c.heads > 0 ? c.dim / c.heads : 0, problems);
  c.vocab = integer(j, "vocab_size", -1, problems);
  c.context = integer(j, "max_position_embeddings", 2048, problems);
  c.eps = float(number(j, "rms_norm_eps", 1e-6, problems));
  c.rope_theta = number(j, "rope_theta", 10000, problems);
  c.tied = boolean(j, "tie_word_embeddings", false, problems);
  if (!present(j, "head_dim") && c.heads > 0 && c.dim % c.heads != 0)
    problems.add("hidden_size " + std::to_string(c.dim) + " is no multiple of num_attention_heads " +
                 std::to_string(c.heads));
  const int64_t window = integer(j, "sliding_window", 0, problems);
  if (window > 0 && window < c.context && boolean(j, "use_sliding_window", true, problems))
    problems.add("a sliding window of " + std::to_string(window) + " below the context of " +
                 std::to_string(c.context) + " is not supported");
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!present(j, key)) continue;
    if (j.at(key).is_object())
      read_rope_scaling(j.at(key), c, problems);
    else
      problems.add(std::string(key) + " is not an object");
  }
  if (number(j, "partial_rotary_factor", 1, problems) != 1)
    problems.add("partial_rotary_factor is not supported");
  check(c, problems);
  problems.throw_if_any(where);
  return c;
}

LlamaConfig config_from_gguf(const Gguf& g, const std::string& where) {
  Problems problems;
  const std::string arch(g.text("general.architecture").value_or(""));
  if (arch != "llama") {
    problems.add("architecture '" + arch + "' is not supported (llama is)");
    problems.throw_if_any(where);  // every other key is named after the architecture
  }
  const auto required = [&](const char* key) {
    const auto v = g.integer(key);
    if (!v) problems.add(std::string(key) + " is missing");
    return v.value_or(0);
  };
  LlamaConfig c;
  c.dim = required("llama.embedding_length");
  c.hidden = required("llama.feed_forward_length");
  c.layers = required("llama.block_count");
  c.heads = required("llama.attention.head_count");
  c.kv_heads = g.integer("llama.attention.head_count_kv").value_or(c.heads);
  c.head_dim = g.integer("llama.attention.key_length").value_or(c.heads > 0 ? c.dim / c.heads : 0);
  c.context = required("llama.context_length");
  c.eps = float(g.number("llama.attention.layer_norm_rms_epsilon").value_or(1e-5));
  c.rope_theta = g.number("llama.rope.freq_base").value_or(10000);
  if (const FileTensor* embed = g.find("token_embd.weight")) c.vocab = embed->rows();
  c.tied = !g.find("output.weight");

  if (const auto n = g.integer("llama.attention.value_length"); n && *n != c.head_dim)
    problems.add("llama.attention.value_length " + std::to_string(*n) + " differs from the head dim " +
                 std::to_string(c.head_dim));
  if (const auto n = g.integer("llama.rope.dimension_count"); n && *n != c.head_dim)
    problems.add("llama.rope.dimension_count " + std::to_string(*n) + " differs from the head dim " +
                 std::to_string(c.head_dim));
  if (g.integer("llama.expert_count").value_or(0) > 0) problems.add("mixtures of experts are not supported");
  if (const auto w = g.integer("llama.attention.sliding_window"); w && *w > 0 && *w < c.context)
    problems.add("a sliding window of " + std::to_string(*w) + " is not supported");
  const std::string type(g.text("llama.rope.scaling.type").value_or("none"));
  if (type == "linear") {
    c.scaling.kind = RopeScaling::Kind::kLinear;
    c.scaling.factor = g.number("llama.rope.scaling.factor").value_or(1);
  } else if (type != "none") {
    problems.add("rope scaling type '" + type + "' is not supported (none, linear and rope_freqs are)");
  }
  if (const FileTensor* f = g.find("rope_freqs.weight")) {
    if (f->format != Format::kF32 || f->rows() != 1 || f->columns() != c.head_dim / 2) {
      problems.add("rope_freqs.weight is not (head_dim/2) f32");
    } else {
      c.scaling.kind = RopeScaling::Kind::kFactors;
      const float* v = reinterpret_cast<const float*>(f->data);
      c.scaling.factors.assign(v, v + f->columns());
      for (const float x : c.scaling.factors)
        if (!(x > 0 && std::isfinite(x))) problems.add("rope_freqs.weight holds " + std::to_string(x));
    }
  }
  check(c, problems);
  problems.throw_if_any(where);
  return c;
}

LlamaConfig config_from_q4s(const std::string& config_json, const std::string& where) {
  const Json j = parse_object(config_json, where);
  Problems problems;
  LlamaConfig c;
  if (const std::string a = text(j, "architecture", ""); a != "llama")
    problems.add("architecture '" + a + "' is not supported (llama is)");
  c.dim = integer(j, "dim", -1, problems);
  c.hidden = integer(j, "hidden", -1, problems);
  c.layers = integer(j, "layers", -1, problems);
  c.heads = integer(j, "heads", -1, problems);
  c.kv_heads = integer(j, "kv_heads", -1, problems);
  c.head_dim = integer(j, "head_dim", -1, problems);
  c.vocab = integer(j, "vocab", -1, problems);
  c.context = integer(j, "context", -1, problems);
  c.eps = float(number(j, "eps", -1, problems));
  c.rope_theta = number(j, "rope_theta", -1, problems);
  c.tied = boolean(j, "tied", false, problems);
  c.rotated = boolean(j, "rotated", false, problems);
  if (present(j, "rope_scaling")) {
    const Json& s = j.at("rope_scaling");
    if (s.is_object() && text(s, "rope_type", "") == "factors" && present(s, "factors") &&
        s.at("factors").is_array()) {
      c.scaling.kind = RopeScaling::Kind::kFactors;
      for (const Json& v : s.at("factors")) c.scaling.factors.push_back(v.is_number() ? v.get<float>() : 0.f);
      if (int64_t(c.scaling.factors.size()) != c.head_dim / 2)
        problems.add("rope_scaling: number of factors");
      for (const float x : c.scaling.factors)
        if (!(x > 0 && std::isfinite(x))) problems.add("rope_scaling: a factor is not positive");
    } else if (s.is_object()) {
      read_rope_scaling(s, c, problems);
    } else {
      problems.add("rope_scaling is not an object");
    }
  }
  check(c, problems);
  problems.throw_if_any(where);
  return c;
}

std::string config_to_json(const LlamaConfig& c) {
  Json j = {
      {"architecture", "llama"}, {"dim", c.dim},           {"hidden", c.hidden},         {"layers", c.layers},
      {"heads", c.heads},        {"kv_heads", c.kv_heads}, {"head_dim", c.head_dim},     {"vocab", c.vocab},
      {"context", c.context},    {"eps", c.eps},           {"rope_theta", c.rope_theta}, {"tied", c.tied},
      {"rotated", c.rotated}};
  const RopeScaling& s = c.scaling;
  if (s.kind == RopeScaling::Kind::kLinear)
    j["rope_scaling"] = {{"rope_type", "linear"}, {"factor", s.factor}};
  if (s.kind == RopeScaling::Kind::kLlama3)
    j["rope_scaling"] = {{"rope_type", "llama3"},
                         {"factor", s.factor},
                         {"low_freq_factor", s.low_freq_factor},
                         {"high_freq_factor", s.high_freq_factor},
                         {"original_max_position_embeddings", s.original_context}};
  if (s.kind == RopeScaling::Kind::kFactors)
    j["rope_scaling"] = {{"rope_type", "factors"}, {"factors", s.factors}};
  return j.dump();
}

LlamaConfig config_of_shape(const std::string& name) {
  LlamaConfig c;
  c.context = 131072;  // random weights: any depth may be measured
  const auto set = [&](int64_t dim, int64_t hidden, int64_t layers, int64_t heads, int64_t kv_heads,
                       int64_t vocab) {
    c.dim = dim, c.hidden = hidden, c.layers = layers, c.heads = heads, c.kv_heads = kv_heads,
    c.vocab = vocab;
    c.head_dim = dim / heads;
    return c;
  };
  if (name == "llama-2-7b") return set(4096, 11008, 32, 32, 32, 32000);
  if (name == "llama-2-13b") return set(5120, 13824, 40, 40, 40, 32000);
  if (name == "llama-2-70b") return set(8192, 28672, 80, 64, 8, 32000);
  if (name == "llama-3-8b") return set(4096, 14336, 32, 32, 8, 128256);
  if (name == "tinyllama") return set(2048, 5632, 22, 32, 4, 32000);
  throw Error(ErrorKind::kUsage,
              "shape '" + name + "': expected llama-2-7b, llama-3-8b, llama-2-13b, llama-2-70b or tinyllama");
}

// Llama-3 scaling as Meta published it: long wavelengths are slowed by `factor`, short ones kept, between
// them a linear blend in original_context / wavelength.
static double scaled_frequency(const RopeScaling& s, int64_t i, double freq) {
  switch (s.kind) {
    case RopeScaling::Kind::kNone: return freq;
    case RopeScaling::Kind::kLinear: return freq / s.factor;
    case RopeScaling::Kind::kFactors: return freq / s.factors.at(size_t(i));
    case RopeScaling::Kind::kLlama3: break;
  }
  const double turns = double(s.original_context) * freq / (2 * M_PI);
  if (turns < s.low_freq_factor) return freq / s.factor;
  if (turns > s.high_freq_factor) return freq;
  const double keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - keep) * freq / s.factor + keep * freq;
}

std::vector<float> rope_table(const LlamaConfig& c, int64_t rows) {
  const int64_t half = c.head_dim / 2;
  std::vector<double> frequency(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i)
    frequency[size_t(i)] =
        scaled_frequency(c.scaling, i, std::pow(c.rope_theta, -2.0 * double(i) / double(c.head_dim)));
  std::vector<float> table(size_t(rows * c.head_dim));
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = double(p) * frequency[size_t(i)];
      table[size_t(p * c.head_dim + 2 * i)] = float(std::cos(angle));
      table[size_t(p * c.head_dim + 2 * i + 1)] = float(std::sin(angle));
    }
  }
  return table;
}

}  // namespace q4s
