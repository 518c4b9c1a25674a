// Times of work on the device: captured as a CUDA graph, between events.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "kernels/cuda_check.h"

namespace q4s {

class Timer {
 public:
  Timer() {
    cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    cuda_check(cudaEventCreate(&begin_), "event"), cuda_check(cudaEventCreate(&end_), "event");
  }
  ~Timer() { cudaEventDestroy(begin_), cudaEventDestroy(end_), cudaStreamDestroy(stream_); }
  cudaStream_t stream() const { return stream_; }
  // Median microseconds of one `work` captured as a graph, over `repeats` after one warm-up.
  double microseconds(const std::function<void(cudaStream_t)>& work, int repeats) {
    const std::vector<double> sorted = times(work, repeats);
    return sorted[sorted.size() / 2];
  }
  // All of them, ascending.
  std::vector<double> times(const std::function<void(cudaStream_t)>& work, int repeats) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cuda_check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    work(stream_);
    cuda_check(cudaStreamEndCapture(stream_, &graph), "capture");
    cuda_check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    cuda_check(cudaGraphLaunch(exec, stream_), "graph");
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
      cuda_check(cudaEventRecord(begin_, stream_), "event");
      cuda_check(cudaGraphLaunch(exec, stream_), "graph");
      cuda_check(cudaEventRecord(end_, stream_), "event");
      cuda_check(cudaEventSynchronize(end_), "timing");
      float ms = 0;
      cuda_check(cudaEventElapsedTime(&ms, begin_, end_), "event");
      times.push_back(ms * 1e3);
    }
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
    std::sort(times.begin(), times.end());
    return times;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

}  // namespace q4s
