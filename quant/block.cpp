#include "quant/block.h"

#include <atomic>
#include <cmath>

#include "kernels/linear.h"
#include "runtime/error.h"

namespace q4s {

std::vector<float> unpack(const Weight& w, const Team& team) {
  std::vector<float> out(w.view.n * w.view.k);
  std::atomic<int64_t> bad = 0;
  team([&](Part part) {
    const auto [begin, end] = part.of(w.view.n);
    dequantize_rows(w.view, begin, end, out.data() + begin * w.view.k);
    int64_t count = 0;
    for (int64_t i = begin * w.view.k; i < end * w.view.k; ++i) count += !std::isfinite(out[i]);
    bad += count;
  });
  if (bad) {
    throw Error(ErrorKind::kInput, w.name + ": " + std::to_string(bad.load()) + " of " + std::to_string(out.size()) +
                                       " weights are not finite");
  }
  return out;
}

BlockWeights unpack_block(const LlamaBlock& b, const Team& team) {
  return {unpack(b.attn_norm, team), unpack(b.qkv, team),     unpack(b.o, team),
          unpack(b.mlp_norm, team),  unpack(b.gate_up, team), unpack(b.down, team)};
}

}  // namespace q4s
