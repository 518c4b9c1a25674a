// y[t,:] = table[ids[t],:], unpacked to f32. Also gathers rows of an f32 matrix (the rows whose logits are
// wanted).
#pragma once
#include "kernels/device_matrix.h"

namespace q4s {

struct EmbedArgs {
  WeightView table;    // (V, D)
  const int32_t* ids;  // (T) each in [0, V)
  float* y;            // (T, D)
  int64_t tokens;
};
void embed_cpu(const EmbedArgs&, Part = {});
void embed_cuda(const DeviceMatrix& table, const int32_t* ids, float* y, int64_t tokens, cudaStream_t);

}  // namespace q4s
