// What a decoding step is made of: the graph of a whole step with random weights, then the same with parts
// left out, in microseconds. A part costs what its absence saves; "alone" is a graph of nothing but it.
//   step_bench_cuda [SHAPE[:f16] [DEPTH[xBATCH]...]]    default: llama-2-7b 0
// SHAPE: a shape of llama-bench, or smollm2-135m; in int4 with an 8-bit head, or all fp16.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>

#include "device_buffer.h"
#include "graph_timer.h"
#include "models/llama.h"
#include "runtime/cuda_backend.h"
#include "runtime/ops_cuda.h"

using namespace q4s;

namespace {

LlamaConfig config_of(const std::string& name) {
  if (name != "smollm2-135m") return config_of_shape(name);
  LlamaConfig c;
  c.dim = 576, c.hidden = 1536, c.layers = 30, c.heads = 9, c.kv_heads = 3, c.head_dim = 64, c.vocab = 49152;
  c.context = 8192, c.tied = true;
  return c;
}

class Step {
 public:
  Step(LlamaModel& model, int64_t depth, int64_t rows, cudaStream_t stream)
      : config_(model.config),
        depth_(depth),
        rows_(rows),
        vocab_(model.config.vocab),
        graph_({rows, rows}),
        logits_(&build_llama(graph_, model.config, model.weights, in_, {0, model.config.layers}, true)),
        arena_(graph_.plan()),
        dense_(stream) {
    cudaDeviceProp p;
    cuda_check(cudaGetDeviceProperties(&p, 0), "properties");
    multiprocessors_ = p.multiProcessorCount, hopper_ = p.major == 9;
    graph_.bind(arena_.data());
    scratch_ = DeviceBuffer<std::byte>(node_scratch_cuda(graph_, multiprocessors_));
    scratch_.fill_byte(0);
    kv_ = {nullptr, KvType::kF16, config_.layers, rows, depth + 16, config_.kv_dim()};
    cache_ = DeviceBuffer<std::byte>(kv_.bytes());
    cache_.fill_byte(0);
    kv_.base = cache_.data();
    const size_t count = static_cast<size_t>(rows);
    std::vector<int32_t> each(count), same(count, int32_t(depth));
    std::iota(each.begin(), each.end(), 0);
    const auto put = [&](Tensor* t, const std::vector<int32_t>& v) {
      cuda_check(cudaMemcpy(t->data, v.data(), v.size() * 4, cudaMemcpyHostToDevice), "inputs");
    };
    put(in_.token, each), put(in_.position, same), put(in_.sequence, each), put(in_.wanted, each);

    // A draw that leaves the step's inputs alone.
    state_ = DeviceBuffer<SampleState>(std::vector<SampleState>(1));
    row_ = DeviceBuffer<SampleRow>(std::vector<SampleRow>(size_t(rows)));
    token_ = DeviceBuffer<int32_t>(same), position_ = DeviceBuffer<int32_t>(same);
    drawn_ = DeviceBuffer<int32_t>(size_t(8 * rows));
    draw_scratch_ = DeviceBuffer<std::byte>(sample_scratch_bytes(rows, vocab_));
    draw_scratch_.fill_byte(0);
  }

  enum Part : unsigned { kEnds = 1, kLinears = 2, kAttention = 4, kHead = 8, kDraw = 16, kAll = 31 };
  void run(unsigned parts, cudaStream_t stream) {
    const CudaStep step{{rows_, rows_, depth_ + 1, true},
                        kv_,
                        scratch_.data(),
                        stream,
                        dense_,
                        multiprocessors_,
                        hopper_,
                        chain_,
                        gemm_chain_};
    for (const auto& n : graph_.nodes()) {
      const unsigned part = n->op == Op::kAttention ? kAttention
                            : n.get() == logits_    ? kHead
                            : n->op == Op::kLinear  ? kLinears
                                                    : kEnds;
      if (parts & part) run_node_cuda(*n, step);
    }
    run_chain_cuda(step);
    if (parts & kDraw)
      sample_cuda({logits_->f32(), rows_, vocab_, state_.data(), row_.data(), token_.data(), position_.data(),
                   drawn_.data(), 8, draw_scratch_.data(), false},
                  stream);
  }
  int64_t layers() const { return config_.layers; }

 private:
  LlamaConfig config_;
  int64_t depth_, rows_, vocab_;
  Graph graph_;
  Inputs in_;
  Tensor* logits_;
  DeviceBuffer<std::byte> arena_, scratch_, cache_, draw_scratch_;
  KvCache kv_;
  DenseCuda dense_;
  DecodeChain chain_;
  GemmChain gemm_chain_;
  int multiprocessors_ = 0;
  bool hopper_ = false;
  DeviceBuffer<SampleState> state_;
  DeviceBuffer<SampleRow> row_;
  DeviceBuffer<int32_t> token_, position_, drawn_;
};

void bench(LlamaModel& model, int64_t depth, int64_t rows, double read, Timer& timer) {
  constexpr int kSteps = 8;  // to a graph: what lies between two graphs is not looked at
  Step step(model, depth, rows, timer.stream());
  const auto time = [&](unsigned parts) {
    return timer.microseconds(
               [&](cudaStream_t s) {
                 for (int i = 0; i < kSteps; ++i) step.run(parts, s);
               },
               9) /
           kSteps;
  };
  const double layers = double(step.layers()), whole = time(Step::kAll);
  const double kv = double(rows * (depth + 1) * step.layers() * 4 * model.config.kv_dim());
  const double bytes = double(model.weights.read_bytes_per_token()) + kv;
  std::printf("depth %lld, %lld rows: %.1f us a step, %.3f of read; a graph for each step %.1f\n",
              (long long)depth, (long long)rows, whole, bytes / read * 1e6 / whole,
              timer.back_to_back([&](cudaStream_t s) { step.run(Step::kAll, s); }));
  const double none = time(Step::kAll & ~Step::kAttention), only = time(Step::kAttention);
  std::printf("  attention: %.2f us a layer; alone %.2f, %.3f of read\n", (whole - none) / layers,
              only / layers, kv / read * 1e6 / only);
  std::printf("  products: alone %.2f us a layer; with attention %.2f\n", time(Step::kLinears) / layers,
              time(Step::kLinears | Step::kAttention) / layers);
  std::printf(
      "  head %.1f us, alone %.1f (read: %.1f); draw %.1f, alone %.1f; embedding and gathering %.1f, alone "
      "%.1f\n",
      whole - time(Step::kAll & ~Step::kHead), time(Step::kHead),
      double(model.weights.output().read_bytes()) / read * 1e6, whole - time(Step::kAll & ~Step::kDraw),
      time(Step::kDraw), whole - time(Step::kAll & ~Step::kEnds), time(Step::kEnds));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) {
    std::printf("SKIPPED: no GPU\n");
    return 0;
  }
  const std::string name = argc > 1 ? argv[1] : "llama-2-7b", shape = name.substr(0, name.find(':'));
  const bool half = name != shape;
  const std::unique_ptr<Backend> backend = make_cuda_backend(0);
  LlamaModel model = random_llama(config_of(shape), 1, half ? Format::kF16 : Format::kQ4,
                                  shape == "smollm2-135m" ? 64 : 128, half ? Format::kF16 : Format::kQ8);
  model.config.context = 1 << 17;
  fill_rope(model, 1 << 15);
  backend->load(all_weights(model.weights));
  Timer timer;
  std::printf("%s, %s, read speed %.0f GB/s\n", name.c_str(), p.name, backend->read_bandwidth() / 1e9);
  for (int i = 2; i < std::max(argc, 3); ++i) {
    const char* at = i < argc ? argv[i] : "0";
    const char* batch = std::strchr(at, 'x');
    bench(model, std::atoll(at), batch ? std::atoll(batch + 1) : 1, backend->read_bandwidth(), timer);
  }
}
