// Between attention_prefill.cu, which chooses, and attention_prefill_sm90.cu.
#pragma once
#include "kernels/attention_prefill.h"

namespace q4s {

// Compute capability 9.0, and shared memory where the kernel takes it to be.
bool attention_prefill_sm90_supported();
// head_dim 64 or 128.
void attention_prefill_sm90_cuda(const AttentionPrefillArgs&, cudaStream_t);

}  // namespace q4s
