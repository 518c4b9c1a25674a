// y[t,:] = w * x[t,:] / sqrt(mean(x[t,:]^2) + eps)
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/types.h"

namespace q4s {

struct RmsNormArgs {
  const float* x;  // (T, D)
  const float* w;  // (D)
  float* y;        // (T, D), may be x
  int64_t tokens, dim;
  float eps;
};
void rms_norm_cpu(const RmsNormArgs&, Part = {});  // the definition: double accumulator
void rms_norm(const RmsNormArgs&, Part = {});      // vectorised
void rms_norm_cuda(const RmsNormArgs&, cudaStream_t);
// The same, stored as the fp16 operand of a product: columns [dim, ld) are zeroed. x, w as above, y unused.
void rms_norm_f16_cuda(const RmsNormArgs&, void* y16 /* (T, ld) fp16 */, int64_t ld, cudaStream_t);

}  // namespace q4s
