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

std::vector<float> unpack_rows(const Weight& w, int64_t begin, int64_t end, const Team& team) {
  const int64_t n = end - begin, k = w.view.k;
  std::vector<float> out(n * k);
  std::atomic<int64_t> bad = 0;
  team([&](Part part) {
    const auto [first, last] = part.of(n);
    dequantize_rows(w.view, begin + first, begin + last, out.data() + first * k);
    bad += std::count_if(out.begin() + first * k, out.begin() + last * k,
                         [](float v) { return !(std::fabs(v) <= kLargest); });
  });
  if (bad) {
    throw Error(ErrorKind::kInput, w.name + ": " + std::to_string(bad.load()) + " of " +
                                       std::to_string(out.size()) + " weights are not finite or beyond fp16");
  }
  return out;
}

std::vector<float> unpack(const Weight& w, const Team& team) { return unpack_rows(w, 0, w.view.n, team); }

BlockWeights unpack_block(const LlamaBlock& b, const Team& team) {
  return {unpack(b.attn_norm, team), unpack(b.qkv, team),     unpack(b.o, team),
          unpack(b.mlp_norm, team),  unpack(b.gate_up, team), unpack(b.down, team)};
}

}  // namespace q4s
