// Between linear_q4_gemm.cu, which chooses, and linear_q4_gemm_mma.cu, which holds the mma.sync kernel.
#pragma once
#include "kernels/linear_q4_gemm.h"

namespace q4s {

void q4_gemm_mma_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);

}  // namespace q4s
