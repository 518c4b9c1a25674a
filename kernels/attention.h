// Causal attention over the cache: token t of sequence s at position p sees rows s*ctx + 0..p.
//   y[t,h,:] = softmax(q[t,h,:] . k[j,h/G,:] / sqrt(head_dim)) v[j,h/G,:],  G = H / Hkv
#pragma once
#include <cstddef>

#include "kernels/cuda_stream.h"
#include "kernels/rope_kv.h"

namespace q4s {

struct AttentionArgs {
  const float* q;  // (T, H * head_dim)
  Placement at;
  KvLayer kv;
  float* y;  // (T, H * head_dim)
  int64_t tokens, heads, kv_heads, head_dim;
  std::byte* scratch;  // attention_scratch_bytes; unused by the reference
};
void attention_cpu(const AttentionArgs&, Part = {});  // the definition: double accumulators
size_t attention_scratch_bytes(int64_t ctx, int64_t head_dim, int threads);
void attention(const AttentionArgs&, Part = {});                    // online softmax, vectorised
void attention_reference_cuda(const AttentionArgs&, cudaStream_t);  // any shape with head_dim <= 512

}  // namespace q4s
