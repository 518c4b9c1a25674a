// The shape and settings of a LLaMA-family model, from config.json, GGUF metadata or a .q4s header.
// Everything that is not supported (other architectures, biases, a sliding window in use, unknown rope types)
// is refused here, all mismatches in one error.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace q4s {

class Gguf;

struct RopeScaling {
  enum class Kind { kNone, kLinear, kLlama3, kFactors } kind = Kind::kNone;
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;  // kLinear: factor; kLlama3: all
  int64_t original_context = 8192;                               // kLlama3
  std::vector<float> factors;  // kFactors: divisor of each frequency (head_dim/2), a GGUF's rope_freqs
};

struct LlamaConfig {
  int64_t dim = 0, hidden = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, context = 0;
  float eps = 1e-5f;
  double rope_theta = 10000;
  RopeScaling scaling;
  bool tied = false;     // the head is the embedding
  bool rotated = false;  // the residual stream is rotated and must be turned back (tied embedding); .q4s only

  int64_t q_dim() const { return heads * head_dim; }
  int64_t kv_dim() const { return kv_heads * head_dim; }
  int64_t qkv_dim() const { return q_dim() + 2 * kv_dim(); }
  int64_t linear_weights() const {  // in the blocks
    return layers * (qkv_dim() * dim + q_dim() * dim + 3 * dim * hidden);
  }
};

// Each throws Error(kInput) naming `where` and every mismatch at once.
LlamaConfig config_from_hf(const std::string& config_json, const std::string& where);
LlamaConfig config_from_gguf(const Gguf&, const std::string& where);
LlamaConfig config_from_q4s(const std::string& config_json, const std::string& where);
std::string config_to_json(const LlamaConfig&);  // what config_from_q4s reads; deterministic

// llama-2-7b, llama-3-8b, llama-2-13b, llama-2-70b, tinyllama. Throws Error(kUsage) for others.
LlamaConfig config_of_shape(const std::string& name);

// (rows, head_dim/2, 2) cos and sin of position * frequency, computed in double.
std::vector<float> rope_table(const LlamaConfig&, int64_t rows);

}  // namespace q4s
