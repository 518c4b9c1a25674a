// The operations of a graph as launches on a stream: what the CUDA backend runs, eagerly or while it captures
// a step.
#pragma once
#include <vector>

#include "kernels/dense_cuda.h"
#include "kernels/linear_decode.h"
#include "kernels/linear_q4_gemm.h"
#include "runtime/backend.h"

namespace q4s {

// What waits to be one launch: products of few tokens, and the attention between the last of them and the
// next.
struct DecodeChain {
  std::vector<LinearDecodeArgs> products;
  Tensor* attention = nullptr;
};

// Likewise, products of up to kQ4GemmFewTokens.
struct GemmChain {
  std::vector<Q4GemmArgs> products;
  const Tensor* last = nullptr;        // what the last of them makes
  const Tensor* normalised = nullptr;  // whose norm was found last: what q4_gemm_guess() is of by then
};

struct CudaStep {
  Counts counts;
  const KvCache& kv;
  std::byte* scratch;  // node_scratch_cuda() of the graph, all zero before its first use
  cudaStream_t stream;
  DenseCuda& dense;
  int multiprocessors;
  bool hopper;
  DecodeChain& chain;
  GemmChain& gemm_chain;
  bool observed = false;  // someone reads results between nodes: they are all f32
};

// Bytes of scratch that any node of g needs.
size_t node_scratch_cuda(const Graph& g, int multiprocessors);
// Enqueues one node, but what joins the chain only with it: before the next node that does not, or by
// run_chain_cuda(). Throws CudaError, std::runtime_error.
void run_node_cuda(Tensor&, const CudaStep&);
void run_chain_cuda(const CudaStep&);

}  // namespace q4s
