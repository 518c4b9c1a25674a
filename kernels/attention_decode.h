// attention.h for the tokens of a decoding step: the cache is split over blocks, query heads that share keys
// are packed into one product. All pointers in device memory, lengths included.
#pragma once
#include <cstddef>

#include "kernels/attention.h"
#include "kernels/cuda_stream.h"

namespace q4s {

struct AttentionDecodeArgs {
  const float* q;  // (T, H * head_dim)
  Placement at;    // (T) each
  KvLayer kv;
  void* y;  // (T, H * head_dim) f32, or fp16 where y_half (caches in fp16 with head_dim a multiple of 8)
  bool y_half;
  int64_t tokens, heads, kv_heads, head_dim;  // head_dim <= 256
  int64_t longest;  // no position reaches this: sizes the grid (a graph is captured per such bound)
  int64_t
      fresh;  // newest rows of a sequence, the token's own among them, that work since the last full barrier
              // of the stream may have written: 1, or the tokens of a step that may share a sequence
  std::byte* scratch;  // attention_decode_scratch_bytes, of which the first kAttentionDecodeCounters are
                       // zero, and stay so
};
constexpr size_t kAttentionDecodeCounters = 4096;
size_t attention_decode_scratch_bytes(int multiprocessors);

// Blocks that share the cache of one row, at most; rows: token and kv head (and each 8 of its query heads).
int attention_decode_parts(int64_t rows, int64_t longest, int multiprocessors);

// pdl: programmatic dependent launch. Positions, sequences and rows that are not fresh are then read while
// the predecessor may still run: a full barrier (the start of a graph, a copy) lies between them and what
// wrote them. Throws CudaError.
void attention_decode_cuda(const AttentionDecodeArgs&, cudaStream_t, bool pdl);

}  // namespace q4s
