// Between linear_q4_gemm.cu, which chooses, and linear_q4_gemm_sm90.cu, which holds the warpgroup kernels.
#pragma once
#include "kernels/linear_q4_gemm.h"

namespace q4s {

void q4_gemm_sm90_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);

}  // namespace q4s
