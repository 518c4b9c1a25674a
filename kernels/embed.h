// y[t,:] = table[ids[t],:], unpacked to f32. Also gathers rows of an f32 matrix (the rows whose logits are wanted).
#pragma once
#include "kernels/types.h"

namespace q4s {

struct EmbedArgs {
  WeightView table;    // (V, D)
  const int32_t* ids;  // (T) each in [0, V)
  float* y;            // (T, D)
  int64_t tokens;
};
void embed_cpu(const EmbedArgs&, Part = {});

}  // namespace q4s
