// The CUDA backend: memory, one stream, and how a graph runs on it. Steps of few tokens are captured once per
// (graph, counts, context bucket) and replayed. What each node launches is in ops_cuda.cpp.
#include <cuda_runtime_api.h>

#include <bit>
#include <cassert>
#include <cstddef>
#include <map>

#include "kernels/convert.h"
#include "kernels/cuda_check.h"
#include "kernels/read_sweep.h"
#include "runtime/cuda_backend.h"
#include "runtime/error.h"
#include "runtime/ops_cuda.h"
#include "runtime/plan.h"
#include "runtime/weights_cuda.h"

namespace q4s {
namespace {

constexpr int64_t kReplayTokens = 64;  // steps up to here are replayed
constexpr int64_t kFirstBucket = 256;  // context buckets: powers of two from here

// Errors of the device leave as Error(kRuntime) that says what was being done.
template <typename Fn>
auto guarded(const std::string& what, const Fn& fn) {
  try {
    return fn();
  } catch (const CudaError& e) {
    if (e.code == cudaErrorMemoryAllocation) throw Error(ErrorKind::kResource, what + ": " + e.what());
    throw Error(ErrorKind::kRuntime, "GPU: " + what + ": " + e.what());
  }
}

size_t aligned(int64_t bytes) { return size_t(round_up(bytes, int64_t(kArenaAlign))); }

constexpr int64_t kAhead = 8;  // decoding steps that the device may be ahead of the host

// Where a decoding run keeps what it carries from step to step, behind the scratch of the nodes.
struct DrawMemory {
  size_t rows, scratch, bytes;  // offsets after the SampleState, and the end
  DrawMemory(int64_t count, int64_t vocab)
      : rows(aligned(sizeof(SampleState))),
        scratch(rows + aligned(int64_t(sizeof(SampleRow)) * count)),
        bytes(scratch + aligned(int64_t(sample_scratch_bytes(count, vocab)))) {}
};

// Everything that a captured step depends on. drawn: where its tokens go, null for a step without a draw.
struct StepKey {
  const Graph* graph;
  int64_t tokens, outputs, reach;
  const std::byte *kv, *scratch;
  const int32_t* drawn;
  bool adjusts, apart;
  auto operator<=>(const StepKey&) const = default;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device)
      : device_(choose(device)),
        stream_(make_stream()),
        loader_(pool_, stream_.get()),
        dense_(stream_.get()) {}
  ~CudaBackend() override { (void)cudaStreamSynchronize(stream_.get()); }

  std::string name() const override { return "cuda"; }
  std::string describe() const override {
    int driver = 0;
    (void)cudaDriverGetVersion(&driver);
    return std::string(device_.name) + ", sm_" + std::to_string(device_.major * 10 + device_.minor) + ", " +
           std::to_string(device_.totalGlobalMem >> 30) + " GiB, driver for CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  }
  ThreadPool& pool() override { return pool_; }

  std::byte* allocate(size_t bytes, const std::string& purpose) override {
    return guarded("allocation", [&] {
      std::byte* p = static_cast<std::byte*>(cuda_take(bytes, purpose));
      cuda_check(cudaMemsetAsync(p, 0, bytes, stream_.get()),
                 "clearing memory");  // counters in scratch start at 0
      return p;
    });
  }
  void release(std::byte* p) override {
    steps_.clear();  // captured steps may point into it
    (void)cudaStreamSynchronize(stream_.get());
    (void)cudaFree(p);
  }
  std::optional<size_t> free_bytes() const override {
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) return std::nullopt;
    return free;
  }
  size_t used_bytes() const override {
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? total - free : 0;
  }
  void write(std::byte* to, const void* from, size_t bytes) override {
    guarded("write", [&] {
      cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_.get()),
                 "copy to the device");
    });
  }
  void read(void* to, const std::byte* from, size_t bytes) override {
    guarded("read", [&] {
      cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_.get()),
                 "copy from the device");
      cuda_check(cudaStreamSynchronize(stream_.get()), "running the step");
    });
  }

  size_t weight_bytes(const Weight& w) const override { return device_bytes(device_matrix_of(w)); }
  void load(std::span<Weight* const> weights, const LoadProgress& progress) override {
    guarded("loading weights", [&] { loader_.load(weights, progress); });
  }

  cudaStream_t stream() const { return stream_.get(); }

  int64_t prompt_step() const override { return 2048; }
  bool fuses() const override { return true; }
  double read_bandwidth() override {
    if (read_bandwidth_ == 0)
      read_bandwidth_ = guarded("read sweep", [&] { return read_sweep_cuda(stream_.get()); });
    return read_bandwidth_;
  }

  size_t scratch_bytes(const Graph& g) override {
    const Tensor& last = *g.nodes().back();
    const bool logits = last.rows == Rows::kOutputs;
    return node_scratch(g) + (logits ? DrawMemory(g.max().outputs, last.cols).bytes : 0);
  }

  void run(const Graph& g, Counts counts, const KvCache& kv, std::byte* scratch,
           const Observer* observer) override {
    CudaStep step = step_of(counts, kv, scratch);
    step.observed = observer && *observer;
    if (!observer && counts.tokens <= kReplayTokens) {
      guarded("a step of " + std::to_string(counts.tokens) + " tokens", [&] { replay(g, step, nullptr); });
      return;
    }
    for (const auto& n : g.nodes()) {
      if (observer && *observer) {
        guarded("products", [&] { run_chain_cuda(step); });
        (*observer)(*n);
      }
      launch(*n, step);
    }
    guarded("products", [&] { run_chain_cuda(step); });
  }

  void score(const ScoreLogitsArgs& a) override {
    guarded("scoring logits", [&] {
      if (a.rows > scored_rows_) {
        scored_ = pinned<LogitScore>(a.rows);
        targets_ = pinned<int32_t>(a.rows);
        scored_rows_ = a.rows;
      }
      std::copy_n(a.target, a.rows, targets_.get());
      score_logits_cuda({a.logits, a.reference, targets_.get(), scored_.get(), a.rows, a.vocab},
                        stream_.get());
      cuda_check(cudaStreamSynchronize(stream_.get()), "running the step");
      std::copy_n(scored_.get(), a.rows, a.score);
    });
  }

  bool decodes(const SampleParams& p, int64_t banned) const override { return sample_supported(p, banned); }

  void decode(const DecodeLoop& d, const KvCache& kv, std::byte* scratch, const OnStep& visit) override {
    guarded("decoding", [&] { decode_checked(d, kv, scratch, visit); });
  }

 private:
  struct StreamDeleter {
    void operator()(cudaStream_t s) const { (void)cudaStreamDestroy(s); }
  };
  using Stream = std::unique_ptr<CUstream_st, StreamDeleter>;
  struct GraphDeleter {
    void operator()(cudaGraphExec_t g) const { (void)cudaGraphExecDestroy(g); }
  };
  using Captured = std::unique_ptr<CUgraphExec_st, GraphDeleter>;

  struct EventDeleter {
    void operator()(cudaEvent_t e) const { (void)cudaEventDestroy(e); }
  };
  using Event = std::unique_ptr<CUevent_st, EventDeleter>;
  struct PinnedDeleter {
    void operator()(void* p) const { (void)cudaFreeHost(p); }
  };
  // Host memory that the device reaches.
  template <typename T>
  using Pinned = std::unique_ptr<T, PinnedDeleter>;
  template <typename T>
  static Pinned<T> pinned(int64_t count) {
    void* p = nullptr;
    cuda_check(cudaMallocHost(&p, size_t(count) * sizeof(T)), "pinned memory");
    return Pinned<T>(static_cast<T*>(p));
  }

  static cudaDeviceProp choose(int device) {
    const auto none = [](const std::string& why) {
      return Error(ErrorKind::kNoDevice, "no usable GPU: " + why);
    };
    int count = 0;
    if (const cudaError_t e = cudaGetDeviceCount(&count); e != cudaSuccess) throw none(cudaGetErrorString(e));
    if (device >= count)
      throw none("device " + std::to_string(device) + " of " + std::to_string(count) + " was asked for");
    cudaDeviceProp p;
    cudaError_t e = cudaSetDevice(device);
    if (e == cudaSuccess) e = cudaGetDeviceProperties(&p, device);
    if (e == cudaSuccess) e = cudaError_t(probe_kernel_image());
    if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction)
      throw none(std::string(p.name) + " (sm_" + std::to_string(p.major * 10 + p.minor) +
                 ") is not among those that this program was built for");
    if (e != cudaSuccess) throw none(cudaGetErrorString(e));
    return p;
  }
  static Stream make_stream() {
    cudaStream_t s = nullptr;
    cuda_check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "stream");
    return Stream(s);
  }

  static void launch(Tensor& t, const CudaStep& s) {
    guarded(std::string(op_name(t.op)) + " " + t.name, [&] { run_node_cuda(t, s); });
  }

  CudaStep step_of(Counts counts, const KvCache& kv, std::byte* scratch) {
    return {counts,
            kv,
            scratch,
            stream_.get(),
            dense_,
            device_.multiProcessorCount,
            device_.major == 9,
            chain_,
            gemm_chain_};
  }
  size_t node_scratch(const Graph& g) const { return node_scratch_cuda(g, device_.multiProcessorCount); }

  // Runs a step from its captured graph; with `draw` tokens are drawn at its end.
  void replay(const Graph& g, CudaStep step, const SampleArgs* draw) {
    int64_t& reach = step.counts.reach;
    const int64_t bucket =
        std::max(kFirstBucket, int64_t(std::bit_ceil(uint64_t(std::max<int64_t>(reach, 1)))));
    reach = reach ? std::min(step.kv.ctx, bucket) : step.kv.ctx;
    Captured& found = steps_[{&g, step.counts.tokens, step.counts.outputs, reach, step.kv.base, step.scratch,
                              draw ? draw->drawn : nullptr, draw && draw->adjusts, step.counts.apart}];
    if (!found) found = capture(g, step, draw);
    cuda_check(cudaGraphLaunch(found.get(), stream_.get()), "graph launch");
  }

  Captured capture(const Graph& g, const CudaStep& step, const SampleArgs* draw) {
    cudaGraph_t graph = nullptr;
    cuda_check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeRelaxed), "capture");
    try {
      for (const auto& n : g.nodes()) launch(*n, step);
      run_chain_cuda(step);
      if (draw) sample_cuda(*draw, stream_.get());
    } catch (...) {
      (void)cudaStreamEndCapture(stream_.get(), &graph);
      if (graph) (void)cudaGraphDestroy(graph);
      throw;
    }
    cuda_check(cudaStreamEndCapture(stream_.get(), &graph), "capture");
    cudaGraphExec_t exec = nullptr;
    const cudaError_t e = cudaGraphInstantiate(&exec, graph, 0);
    (void)cudaGraphDestroy(graph);
    cuda_check(e, "graph instantiation");
    return Captured(exec);
  }

  void decode_checked(const DecodeLoop& d, const KvCache& kv, std::byte* scratch, const OnStep& visit) {
    const int64_t rows = int64_t(d.rows.size()), vocab = d.logits->cols;
    assert(decodes(d.params, int64_t(d.banned.size())) && rows <= d.graph->max().outputs);
    if (rows > ring_rows_) {
      steps_.clear();
      ring_ = pinned<int32_t>(kAhead * rows);
      ring_rows_ = rows;
    }
    if (!events_[0])
      for (Event& e : events_) {
        cudaEvent_t event;
        cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
        e.reset(event);
      }

    std::byte* base = scratch + node_scratch(*d.graph);
    const DrawMemory memory(d.graph->max().outputs, vocab);
    SampleState state{.params = d.params, .banned_count = int32_t(d.banned.size())};
    std::copy(d.banned.begin(), d.banned.end(), state.banned);
    std::vector<SampleRow> start(d.rows.size());
    int64_t reach = 0;
    for (size_t i = 0; i < start.size(); ++i) {
      const DecodeLoop::Row& row = d.rows[i];
      start[i].sequence = row.stream;
      start[i].drawn = row.drawn;
      start[i].filled = int32_t(row.window.size());
      if (d.params.repeat_last_n > 0) start[i].next = start[i].filled % d.params.repeat_last_n;
      std::copy(row.window.begin(), row.window.end(), start[i].window);
      reach = std::max<int64_t>(reach, row.position + 1);
    }
    write(base, &state, sizeof state);
    write(base + memory.rows, start.data(), start.size() * sizeof(SampleRow));
    cuda_check(cudaMemsetAsync(base + memory.scratch, 0, memory.bytes - memory.scratch, stream_.get()),
               "decoding");

    const SampleArgs draw{d.logits->f32(),
                          rows,
                          vocab,
                          reinterpret_cast<const SampleState*>(base),
                          reinterpret_cast<SampleRow*>(base + memory.rows),
                          reinterpret_cast<int32_t*>(d.token->data),
                          reinterpret_cast<int32_t*>(d.position->data),
                          ring_.get(),
                          kAhead,
                          base + memory.scratch,
                          d.params.penalises() || !d.banned.empty()};
    CudaStep step = step_of({rows, rows, 0, true}, kv, scratch);
    std::vector<int32_t> tokens(static_cast<size_t>(rows));
    for (int64_t launched = 0, visited = 0; visited < d.steps; ++visited) {
      for (; launched < std::min(d.steps, visited + kAhead); ++launched) {
        step.counts.reach = reach + launched;
        replay(*d.graph, step, &draw);
        cuda_check(cudaEventRecord(events_[launched % kAhead].get(), stream_.get()), "decoding");
      }
      cuda_check(cudaEventSynchronize(events_[visited % kAhead].get()), "running a decoding step");
      std::copy_n(ring_.get() + visited % kAhead * rows, rows, tokens.begin());
      for (size_t i = 0; i < tokens.size(); ++i)
        if (tokens[i] < 0)
          throw Error(ErrorKind::kRuntime, "logits are not finite after position " +
                                               std::to_string(d.rows[i].position + visited) + " of row " +
                                               std::to_string(i));
      if (!visit(visited, tokens)) break;
    }
    cuda_check(cudaStreamSynchronize(stream_.get()), "running a decoding step");  // those that ran ahead
  }

  cudaDeviceProp device_;
  ThreadPool pool_;
  Stream stream_;
  CudaLoader loader_;
  DenseCuda dense_;
  DecodeChain chain_;  // of the step being launched
  GemmChain gemm_chain_;
  std::map<StepKey, Captured> steps_;
  Pinned<int32_t> ring_;  // (kAhead, ring_rows_) tokens drawn
  int64_t ring_rows_ = 0;
  Pinned<LogitScore> scored_;  // (scored_rows_)
  Pinned<int32_t> targets_;    // (scored_rows_)
  int64_t scored_rows_ = 0;
  double read_bandwidth_ = 0;
  Event events_[kAhead];
};

}  // namespace

cudaStream_t cuda_stream(Backend& b) {
  if (const auto* cuda = dynamic_cast<const CudaBackend*>(&b)) return cuda->stream();
  throw Error(ErrorKind::kRuntime, "the " + b.name() + " backend has no CUDA stream");
}

std::unique_ptr<Backend> make_cuda_backend(int device) {
  try {
    return std::make_unique<CudaBackend>(device);
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& e) {
    throw Error(ErrorKind::kNoDevice, std::string("no usable GPU: ") + e.what());
  }
}

}  // namespace q4s
