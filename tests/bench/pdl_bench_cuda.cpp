// The floor under a decoding step of a small model: a graph of as many dependent launches, each of which does
// next to nothing, in one block or in one for each multiprocessor. Prints microseconds a node.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "device_buffer.h"
#include "graph_timer.h"
#include "kernels/convert.h"

using namespace q4s;

namespace {

double microseconds_a_node(int nodes, int64_t floats, Timer& timer) {
  const DeviceBuffer<float> a(static_cast<size_t>(floats)), b(static_cast<size_t>(floats));
  const auto work = [&](cudaStream_t stream) {
    for (int i = 0; i < nodes; ++i)
      copy_cuda(i % 2 ? a.data() : b.data(), i % 2 ? b.data() : a.data(), floats, stream);
  };
  return timer.times(work, 20).front() / nodes;
}

}  // namespace

int main() {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) {
    std::printf("SKIPPED: no GPU\n");
    return 0;
  }
  Timer timer;
  std::printf("%s: least time of a graph of dependent launches\n", p.name);
  for (const int nodes : {20, 113, 153, 163})
    for (const int64_t blocks : {int64_t(1), int64_t(p.multiProcessorCount)})
      std::printf("%4d nodes of %3d blocks: %.2f us a node\n", nodes, int(blocks),
                  microseconds_a_node(nodes, blocks * 256, timer));
}
