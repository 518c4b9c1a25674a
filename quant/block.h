// The weights of one block in f32: what the quantiser works on. Loaded from the mapped source, rotated, then
// replaced piece by piece by what was quantised.
#pragma once
#include <vector>

#include "models/llama.h"
#include "quant/factor.h"

namespace q4s {

struct BlockWeights {
  std::vector<float> attn_norm;  // (D)
  std::vector<float> qkv;        // (H hd + 2 Hkv hd, D)
  std::vector<float> o;          // (D, H hd)
  std::vector<float> mlp_norm;   // (D)
  std::vector<float> gate_up;    // (2F, D)
  std::vector<float> down;       // (D, F)
};

// Rows of w as f32. Throws Error(kInput) naming the tensor and the count where values are not finite or so
// large that their groups' scales would pass fp16.
std::vector<float> unpack_rows(const Weight& w, int64_t begin, int64_t end, const Team& team);
std::vector<float> unpack(const Weight& w, const Team& team);
BlockWeights unpack_block(const LlamaBlock&, const Team& team);

}  // namespace q4s
