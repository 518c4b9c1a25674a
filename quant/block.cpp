#include "quant/block.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels/linear.h"
#include "runtime/error.h"

namespace q4s {
namespace {
constexpr float kLargest = 65504.0f;  // of fp16
}

std::string unit_name(int64_t block, Unit u) {
  static constexpr const char* kNames[] = {"qkv", "o", "gate_up", "down"};
  return "blk." + std::to_string(block) + "." + kNames[int(u)];
}
int64_t unit_rows(const LlamaConfig& c, Unit u) {
  return u == Unit::kQkv ? c.qkv_dim() : u == Unit::kGateUp ? 2 * c.hidden : c.dim;
}
int64_t unit_columns(const LlamaConfig& c, Unit u) {
  return u == Unit::kO ? c.q_dim() : u == Unit::kDown ? c.hidden : c.dim;
}
const Weight& unit_weight(const LlamaBlock& b, Unit u) {
  return u == Unit::kQkv ? b.qkv : u == Unit::kO ? b.o : u == Unit::kGateUp ? b.gate_up : b.down;
}
Weight& unit_weight(LlamaBlock& b, Unit u) {
  return const_cast<Weight&>(unit_weight(const_cast<const LlamaBlock&>(b), u));
}

std::vector<Projection> projections(const LlamaConfig& c) {
  const int64_t q = c.q_dim(), kv = c.kv_dim(), f = c.hidden;
  return {{"q_proj", Unit::kQkv, 0, q},
          {"k_proj", Unit::kQkv, q, q + kv},
          {"v_proj", Unit::kQkv, q + kv, q + 2 * kv},
          {"o_proj", Unit::kO, 0, c.dim},
          {"gate_proj", Unit::kGateUp, 0, f},
          {"up_proj", Unit::kGateUp, f, 2 * f},
          {"down_proj", Unit::kDown, 0, c.dim}};
}

BlockNorms block_norms(const LlamaBlock& b, const Team& team) {
  return {unpack(b.attn_norm, team), unpack(b.mlp_norm, team)};
}

void unpack_rows(const Weight& w, int64_t begin, int64_t end, float* to, const Team& team) {
  const int64_t n = end - begin, k = w.view.k;
  std::atomic<int64_t> bad = 0;
  team([&](Part part) {
    const auto [first, last] = part.of(n);
    std::vector<float> own(to ? 0 : k);
    int64_t seen = 0;
    for (int64_t i = first; i < last; ++i) {
      float* row = to ? to + i * k : own.data();
      dequantize_rows(w.view, begin + i, begin + i + 1, row);
      // Counted as numbers, not by a branch: the loop becomes vector code.
      int32_t count = 0;
      for (int64_t j = 0; j < k; ++j) count += !(std::fabs(row[j]) <= kLargest);
      seen += count;
    }
    bad += seen;
  });
  if (bad) {
    throw Error(ErrorKind::kInput, w.name + ": " + std::to_string(bad.load()) + " of " +
                                       std::to_string(n * k) + " weights are not finite or beyond fp16");
  }
}

std::vector<float> unpack_rows(const Weight& w, int64_t begin, int64_t end, const Team& team) {
  std::vector<float> out((end - begin) * w.view.k);
  unpack_rows(w, begin, end, out.data(), team);
  return out;
}

std::vector<float> unpack(const Weight& w, const Team& team) { return unpack_rows(w, 0, w.view.n, team); }

}  // namespace q4s
