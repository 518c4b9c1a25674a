// y[t,i] = silu(x[t,i]) * x[t,F+i], silu(a) = a / (1 + exp(-a)); x is the stacked gate|up product.
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/types.h"

namespace q4s {

struct SwigluArgs {
  const float* x;  // (T, 2F)
  float* y;        // (T, F)
  int64_t tokens, hidden;
};
void swiglu_cpu(const SwigluArgs&, Part = {});  // the definition, in double
void swiglu(const SwigluArgs&, Part = {});      // vectorised, within 7e-7 relative
void swiglu_cuda(const SwigluArgs&, cudaStream_t);
// The same stored as (T, F) fp16, the operand of a product; y unused.
void swiglu_f16_cuda(const SwigluArgs&, void* y16, cudaStream_t);

}  // namespace q4s
