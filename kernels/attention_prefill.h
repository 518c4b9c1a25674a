// attention.h for many tokens: tiles of queries against tiles of the cache on the tensor cores, softmax on
// the fly. All pointers in device memory. Tokens of one tile may belong to several sequences and stand at any
// positions; one sequence in rising order is what it is fast for.
#pragma once
#include "kernels/attention.h"

namespace q4s {

struct AttentionPrefillArgs {
  const void* q;  // (T, H * head_dim) f32, or fp16 where q_half; 16-aligned
  bool q_half;
  Placement at;  // (T) each
  KvLayer kv;    // fp16
  void* y;       // (T, H * head_dim) f32, or fp16 where y_half; 16-aligned
  bool y_half;
  int64_t tokens, heads, kv_heads, head_dim;
};
// fp16 cache, head_dim <= 128 and a multiple of 8.
bool attention_prefill_supported(const KvLayer&, int64_t head_dim);
// q, the weights of the softmax and, where asked for, y are rounded to fp16. Throws CudaError.
void attention_prefill_cuda(const AttentionPrefillArgs&, cudaStream_t);
// The kernel that needs no sm_90a instructions, which the above takes for few tokens, other heads and older
// devices.
void attention_prefill_portable_cuda(const AttentionPrefillArgs&, cudaStream_t);

}  // namespace q4s
