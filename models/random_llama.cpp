// Random weights of a shape, for speed measurements and tests. Nothing is filled here: a backend makes the
// values where it keeps its weights (kernels/random_weight.h).
#include "models/llama.h"
#include "runtime/checksum.h"
#include "runtime/error.h"

namespace q4s {
namespace {

Weight random_matrix(std::string name, int64_t n, int64_t k, Format format, int64_t group, uint64_t seed) {
  if (format != Format::kF32 && format != Format::kF16 && format != Format::kBF16 && format != Format::kQ4 &&
      format != Format::kQ8)
    throw Error(ErrorKind::kUsage, name + ": no random weights in this format");
  const bool grouped = format == Format::kQ4 || format == Format::kQ8;
  Weight w;
  w.view = {.format = format, .n = n, .k = k, .group = grouped ? group : 0};
  w.random = seed ^ xxh3(name.data(), name.size());
  w.name = std::move(name);
  return w;
}

}  // namespace

LlamaModel random_llama(const LlamaConfig& c, uint64_t seed, Format linears, int64_t group, Format head) {
  LlamaModel m;
  m.kind = "random";
  m.config = c;
  const auto ones = [&](std::string name) {
    return make_weight_f32(std::move(name), 1, c.dim, std::vector<float>(size_t(c.dim), 1.0f));
  };
  const auto matrix = [&](std::string name, int64_t n, int64_t k) {
    return random_matrix(std::move(name), n, k, linears, group, seed);
  };
  const int64_t head_group = head == Format::kQ8 ? 64 : group;
  m.weights.embed = random_matrix("embed", c.vocab, c.dim, head, head_group, seed);
  for (int64_t l = 0; l < c.layers; ++l) {
    const std::string blk = "blk." + std::to_string(l) + ".";
    LlamaBlock b{ones(blk + "attn_norm"),
                 matrix(blk + "qkv", c.qkv_dim(), c.dim),
                 matrix(blk + "o", c.dim, c.q_dim()),
                 ones(blk + "mlp_norm"),
                 matrix(blk + "gate_up", 2 * c.hidden, c.dim),
                 matrix(blk + "down", c.dim, c.hidden)};
    set_row_roles(b, c);
    m.weights.blocks.push_back(std::move(b));
  }
  m.weights.final_norm = ones("final_norm");
  if (!c.tied) m.weights.head = random_matrix("head", c.vocab, c.dim, head, head_group, seed);
  m.weights.mark_head();
  return m;
}

}  // namespace q4s
