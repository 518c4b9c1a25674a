// Times of work on the device: captured as a CUDA graph, between events.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
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
    const Graph graph(*this, work);
    run(graph, 1);
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) times.push_back(run(graph, 1));
    std::sort(times.begin(), times.end());
    return times;
  }
  // Microseconds of one `work` where its graph is launched again and again without waiting.
  double back_to_back(const std::function<void(cudaStream_t)>& work) {
    const Graph graph(*this, work);
    run(graph, 1);
    return run(graph, 64);
  }
  // Several works in turn, `rounds` times, each for about `burst` microseconds at a time: a card at its power
  // limit slows down for all of them alike. With a `rest` of so many microseconds before each it is not there
  // yet. Median microseconds of each.
  std::vector<double> alternate(const std::vector<std::function<void(cudaStream_t)>>& works, double burst,
                                int rounds, int rest = 0) {
    std::vector<Graph> graphs;
    std::vector<int> launches;
    for (const auto& work : works) {
      graphs.emplace_back(*this, work);
      run(graphs.back(), 1);
      launches.push_back(std::max(1, int(burst / run(graphs.back(), 1))));
    }
    std::vector<std::vector<double>> times(works.size());
    for (int round = 0; round < rounds; ++round)
      for (size_t i = 0; i < works.size(); ++i) {
        if (rest) std::this_thread::sleep_for(std::chrono::microseconds(rest));
        times[i].push_back(run(graphs[i], launches[i]));
      }
    std::vector<double> medians;
    for (auto& t : times) std::sort(t.begin(), t.end()), medians.push_back(t[t.size() / 2]);
    return medians;
  }

 private:
  struct Graph {
    Graph(const Timer& timer, const std::function<void(cudaStream_t)>& work) {
      cudaGraph_t graph;
      cuda_check(cudaStreamBeginCapture(timer.stream_, cudaStreamCaptureModeThreadLocal), "capture");
      work(timer.stream_);
      cuda_check(cudaStreamEndCapture(timer.stream_, &graph), "capture");
      cuda_check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
      cudaGraphDestroy(graph);
    }
    Graph(Graph&& o) noexcept : exec(o.exec) { o.exec = nullptr; }
    ~Graph() {
      if (exec) cudaGraphExecDestroy(exec);
    }
    cudaGraphExec_t exec;
  };
  // Microseconds of one of `launches` launches.
  double run(const Graph& graph, int launches) {
    cuda_check(cudaEventRecord(begin_, stream_), "event");
    for (int i = 0; i < launches; ++i) cuda_check(cudaGraphLaunch(graph.exec, stream_), "graph");
    cuda_check(cudaEventRecord(end_, stream_), "event");
    cuda_check(cudaEventSynchronize(end_), "timing");
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin_, end_), "event");
    return ms * 1e3 / launches;
  }

  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

}  // namespace q4s
