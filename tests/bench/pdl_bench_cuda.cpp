// The floor under a decoding step of a small model: a graph of as many dependent launches, each of which does
// next to nothing, in one block or in one for each multiprocessor. Prints microseconds a node.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <vector>

#include "kernels/convert.h"
#include "kernels/cuda_check.h"

using namespace q4s;

namespace {

double microseconds_a_node(int nodes, int64_t floats, cudaStream_t stream) {
  float *a = nullptr, *b = nullptr;
  cuda_check(cudaMalloc(reinterpret_cast<void**>(&a), size_t(floats) * 4), "memory");
  cuda_check(cudaMalloc(reinterpret_cast<void**>(&b), size_t(floats) * 4), "memory");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
  for (int i = 0; i < nodes; ++i) copy_cuda(i % 2 ? a : b, i % 2 ? b : a, floats, stream);
  cuda_check(cudaStreamEndCapture(stream, &graph), "capture");
  cuda_check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  cuda_check(cudaEventCreate(&begin), "event");
  cuda_check(cudaEventCreate(&end), "event");
  double best = 1e30;
  for (int run = 0; run < 20; ++run) {
    cuda_check(cudaEventRecord(begin, stream), "record");
    cuda_check(cudaGraphLaunch(exec, stream), "launch");
    cuda_check(cudaEventRecord(end, stream), "record");
    cuda_check(cudaEventSynchronize(end), "wait");
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin, end), "time");
    best = std::min(best, double(ms) * 1000 / nodes);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaFree(a);
  cudaFree(b);
  return best;
}

}  // namespace

int main() {
  cudaStream_t stream;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) {
    std::printf("SKIPPED: no GPU\n");
    return 0;
  }
  cudaDeviceProp p;
  cuda_check(cudaGetDeviceProperties(&p, 0), "properties");
  std::printf("%s: least time of a graph of dependent launches\n", p.name);
  for (const int nodes : {20, 113, 153, 163})
    for (const int64_t blocks : {int64_t(1), int64_t(p.multiProcessorCount)})
      std::printf("%4d nodes of %3d blocks: %.2f us a node\n", nodes, int(blocks),
                  microseconds_a_node(nodes, blocks * 256, stream));
}
