// attention.h for the tokens of a decoding step: the cache is split over the blocks of a cluster, query heads
// that share keys are packed into one product. All pointers in device memory, lengths included.
#pragma once
#include "kernels/attention.h"
#include "kernels/cuda_stream.h"

namespace q4s {

struct AttentionDecodeArgs {
  const float* q;  // (T, H * head_dim)
  Placement at;    // (T) each
  KvLayer kv;
  float* y;                                   // (T, H * head_dim)
  int64_t tokens, heads, kv_heads, head_dim;  // head_dim <= 256
  int64_t longest;  // no position reaches this: sizes the grid (a graph is captured per such bound)
};
// pdl as in linear_decode.h. Throws CudaError.
void attention_decode_cuda(const AttentionDecodeArgs&, cudaStream_t, bool pdl);

}  // namespace q4s
