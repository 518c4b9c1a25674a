// The operations of a graph as launches on a stream: what the CUDA backend runs, eagerly or while it captures
// a step.
#pragma once
#include "kernels/dense_cuda.h"
#include "runtime/backend.h"

namespace q4s {

struct CudaStep {
  Counts counts;
  const KvCache& kv;
  std::byte* scratch;  // node_scratch_cuda() of the graph, all zero before its first use
  cudaStream_t stream;
  DenseCuda& dense;
  int multiprocessors;
  bool hopper;
  bool observed = false;  // someone reads results between nodes: they are all f32
};

// Bytes of scratch that any node of g needs.
size_t node_scratch_cuda(const Graph& g, int multiprocessors);
// Enqueues one node. Throws CudaError, std::runtime_error.
void run_node_cuda(Tensor&, const CudaStep&);

}  // namespace q4s
