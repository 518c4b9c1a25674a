// y[t,:] = w * x[t,:] / sqrt(mean(x[t,:]^2) + eps)
#pragma once
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

}  // namespace q4s
