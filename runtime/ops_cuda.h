// The operations of a graph as launches on a stream: what the CUDA backend runs, eagerly or while it captures
// a step.
#pragma once
#include <vector>

#include "kernels/dense_cuda.h"
#include "kernels/linear_decode.h"
#include "runtime/backend.h"

namespace q4s {

// What waits to be one launch: products of few tokens, and the attention between the last of them and the
// next.
struct DecodeChain {
  std::vector<LinearDecodeArgs> products;
  Tensor* attention = nullptr;
};

// The residual stream in a form that spares a kernel for its norm (Q4GemmHandover), between the product that
// makes it and the one that normalises it.
struct StreamHandover {
  const Tensor* normalised = nullptr;  // whose norm was found last, in the guesses' place `guess`
  const Tensor* made = nullptr;        // what the handover is of
  int guess = 0;
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
  StreamHandover& stream_handover;
  bool observed = false;  // someone reads results between nodes: they are all f32
};

// Bytes of scratch that any node of g needs.
size_t node_scratch_cuda(const Graph& g, int multiprocessors);
// Enqueues one node, but what joins the chain only with it: before the next node that does not, or by
// run_chain_cuda(). Throws CudaError, std::runtime_error.
void run_node_cuda(Tensor&, const CudaStep&);
void run_chain_cuda(const CudaStep&);

}  // namespace q4s
