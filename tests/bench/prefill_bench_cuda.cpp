// Prefill kernels on the device: a bring-up ladder (each tile shape in a process of its own, so that a fault in one
// does not hide the others), random shapes against fp64, repeatability, and times beside cuBLAS of the same process.
//   prefill_bench_cuda [--quick] [--sweep] [--no-fork]
// --quick: few small shapes and no timing, for compute-sanitizer (with --no-fork).
#include <cublas_v2.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>

#include "prefill_gemm_check.h"

namespace q4s {
namespace {

void cublas_check(cublasStatus_t s, const char* what) {
  if (s != CUBLAS_STATUS_SUCCESS) throw std::runtime_error(std::string(what) + ": cuBLAS status " + std::to_string(int(s)));
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string tile_name(const Q4GemmTile& t) {
  return std::to_string(t.rows) + "x" + std::to_string(t.columns) + (t.cluster > 1 ? "c" + std::to_string(t.cluster) : "");
}

Q4GemmShape shape_of(const GemmCase& c, int sms, bool hopper) { return {c.tokens, c.layout(), sms, hopper}; }

// Runs a case twice: error within the bound, guards intact, the same bits again. Returns error / bound.
double run_case(const GemmCase& c, const Q4GemmConfig& config, uint64_t seed, bool pdl = false) {
  GemmProblem problem(c, seed);
  const GemmResult first = problem.run(config, pdl);
  double worst = std::max(problem.check(first, c.print().c_str()), problem.activation_error());
  if (!first.guards_intact) std::printf("    guard words or flags damaged: %s\n", c.print().c_str()), worst = 1e9;
  const GemmResult second = problem.run(config, pdl);
  if (first.y != second.y || first.k != second.k || first.v != second.v)
    std::printf("    not repeatable: %s\n", c.print().c_str()), worst = 1e9;
  if (worst > 1) std::printf("    failed: %s | %s | error/bound %.3g\n", c.print().c_str(), config.print().c_str(), worst);
  return worst;
}

// From one tile and one stage to rings that wrap, many tiles, split tiles and every epilogue.
int ladder(const std::function<Q4GemmConfig(const GemmCase&, bool)>& config, int columns, bool quick) {
  const int64_t m = columns;
  std::vector<std::pair<GemmCase, bool>> steps = {
      {{m, 16, 64, 64}, false},
      {{m, 128, 128, 128}, false},
      {{m, 256, 128, 32, Grid::kHalf}, false},
      {{m, 256, 512, 64}, false},
      {{m - 3, 300, 1000, 128, Grid::kInt, Q4GemmOutput::kStore, true}, false},
      {{m + 5, 260, 4096, 128, Grid::kHalf, Q4GemmOutput::kStore, false, true}, false},
      {{m, 256, 2048, 128}, true},
      {{m + 1, 700, 1100, 32, Grid::kInt, Q4GemmOutput::kStore, true}, true},
      {{m - 1, 2 * 172, 576, 1 << 20, Grid::kInt, Q4GemmOutput::kSwiglu}, true},
      {{m, 6 * 64, 512, 64, Grid::kHalf, Q4GemmOutput::kRopeKv, false, false, true, 4, 1, 64}, true}};
  if (!quick) steps.push_back({{3 * m, 9000, 256, 64}, false}), steps.push_back({{2 * m, 9000, 320, 64}, true});
  int failed = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const double worst = run_case(steps[i].first, config(steps[i].first, steps[i].second), 100 + i, i % 2);
    if (worst > 1) ++failed;
    std::printf(" %.2g", worst);
    std::fflush(stdout);
    if (failed >= 3) break;
  }
  return failed;
}

// In a process of its own: a trap or a fault ends only that. True where it returned 0.
bool isolated(const std::function<int()>& f, bool fork_allowed) {
  if (!fork_allowed) return f() == 0;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    int result = 1;
    alarm(30);
    try {
      result = f();
    } catch (const std::exception& e) {
      std::printf(" %s", e.what());
    }
    std::fflush(stdout);
    _exit(result);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) std::printf(" signal %d%s", WTERMSIG(status), WTERMSIG(status) == SIGALRM ? " (hung)" : "");
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// ---- random shapes ---------------------------------------------------------------------------------------------

GemmCase random_case(std::mt19937_64& r) {
  const auto pick = [&](std::initializer_list<int64_t> v) { return v.begin()[r() % v.size()]; };
  GemmCase c = {};
  c.tokens = pick({1, 7, 9, 16, 17, 33, 48, 64, 65, 100, 128, 129, 200, 256, 300}) + int64_t(r() % 3);
  c.k = r() % 4 ? 8 * (1 + r() % 160) : 1 + r() % 700;
  c.group = pick({32, 64, 128, 1 << 20, 96, 256});
  if (c.group > c.k) c.group = c.k;
  c.grid = r() % 2 ? Grid::kInt : Grid::kHalf;
  c.normalise = r() % 2, c.y_half = r() % 3 == 0;
  c.output = Q4GemmOutput(r() % 3);
  if (c.output == Q4GemmOutput::kStore) c.n = 1 + r() % 700, c.residual = r() % 2;
  if (c.output == Q4GemmOutput::kSwiglu) c.n = 2 * (1 + r() % 300);
  if (c.output == Q4GemmOutput::kRopeKv) {
    c.head_dim = pick({16, 32, 64, 80, 96, 128});
    c.kv_heads = 1 + r() % 2, c.heads = c.kv_heads * (1 + r() % 3);
    c.n = (c.heads + 2 * c.kv_heads) * c.head_dim;
  }
  return c;
}

bool random_shapes(int count, const std::vector<Q4GemmTile>& tiles, int sms, bool hopper) {
  std::mt19937_64 r(7);
  double worst = 0;
  int failed = 0, portable = 0, streamed = 0;
  const double start = seconds();
  for (int i = 0; i < count; ++i) {
    const GemmCase c = random_case(r);
    const Q4GemmShape s = shape_of(c, sms, hopper);
    Q4GemmConfig config = q4_gemm_config(s);
    // Every third the choice of the library, else any tile, or the portable kernel.
    if (config.hopper && i % 3) {
      const size_t t = r() % (tiles.size() + 1);
      config = t == tiles.size() ? q4_gemm_config_portable(s) : q4_gemm_config(s, tiles[t], r() % 2);
    }
    const bool known = !config.hopper || std::any_of(tiles.begin(), tiles.end(), [&](const Q4GemmTile& t) {
      return t.rows == config.rows && t.columns == config.columns && t.cluster == config.cluster;
    });
    if (!known) config = q4_gemm_config_portable(s);
    portable += !config.hopper, streamed += config.streamed > 0;
    const double e = run_case(c, config, 1000 + i, i % 2);
    worst = std::max(worst, e), failed += e > 1;
  }
  std::printf("random shapes: %d, %d failed, worst error/bound %.3f (%d portable, %d streamed, %.1f s)\n", count, failed,
              worst, portable, streamed, seconds() - start);
  return failed == 0;
}

// ---- times -------------------------------------------------------------------------------------------------------

struct Matrix {
  const char* name;
  int64_t n, k;
  Q4GemmOutput output;
};
// Llama-2-7B: the four matrices of a layer.
constexpr Matrix kLayer[] = {{"qkv", 12288, 4096, Q4GemmOutput::kRopeKv},
                             {"o", 4096, 4096, Q4GemmOutput::kStore},
                             {"gate_up", 22016, 4096, Q4GemmOutput::kSwiglu},
                             {"down", 4096, 11008, Q4GemmOutput::kStore}};
constexpr int kLayers = 4;  // rotated: 430 MB of weights, far beyond L2
constexpr int64_t kMaxTokens = 8192;

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
    return times[times.size() / 2];
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

// Weights and activations of kLayers layers, random.
class LayerBench {
 public:
  LayerBench(int sms) : sms_(sms), x_(kMaxTokens * 11008), y_(kMaxTokens * 22016), residual_(kMaxTokens * 4096),
                        workspace_(64 << 20), kv_(2 * kMaxTokens * 4096), table_(kMaxTokens * 128),
                        position_(kMaxTokens), sequence_(kMaxTokens) {
    std::mt19937_64 r(3);
    std::vector<uint16_t> x(x_.size());
    std::normal_distribution<float> normal;
    std::vector<uint16_t> pool(1 << 16);
    for (auto& v : pool) v = float_to_half(normal(r));
    for (auto& v : x) v = pool[r() & 0xffff];
    x_.write(x);
    residual_.fill_byte(0), table_.fill_byte(0), workspace_.fill_byte(0);
    std::vector<int32_t> position(kMaxTokens);
    for (size_t i = 0; i < position.size(); ++i) position[i] = int32_t(i);
    position_.write(position), sequence_.fill_byte(0);
    for (int l = 0; l < kLayers; ++l)
      for (int m = 0; m < 4; ++m) {
        const Q4Layout w = layout(m);
        codes_.emplace_back(w.code_bytes()), scales_.emplace_back(w.scale_bytes() / 2);
        if (l == 0) {
          std::vector<uint8_t> c(w.code_bytes());
          for (size_t i = 0; i + 8 <= c.size(); i += 8) {  // codes as a normal distribution spreads them
            uint64_t bits = 0;
            const uint64_t a = r(), b = r(), d = r();
            for (int j = 0; j < 64; j += 4)
              bits |= ((((a >> j) & 15) + ((b >> j) & 15) + ((d >> j) & 15)) / 3) << j;
            std::memcpy(&c[i], &bits, 8);
          }
          codes_.back().write(c);
          std::vector<uint16_t> s(w.scale_bytes() / 2);
          for (auto& v : s) v = float_to_half(0.004f + 0.000001f * float(r() % 1000));
          scales_.back().write(s);
        } else {
          cuda_check(cudaMemcpy(codes_.back().data(), codes_[m].data(), w.code_bytes(), cudaMemcpyDeviceToDevice), "copy");
          cuda_check(cudaMemcpy(scales_.back().data(), scales_[m].data(), w.scale_bytes(), cudaMemcpyDeviceToDevice), "copy");
        }
      }
  }
  static Q4Layout layout(int m) {
    Q4Layout w;
    w.n = kLayer[m].n, w.k = kLayer[m].k, w.group = 128;
    if (kLayer[m].output == Q4GemmOutput::kSwiglu) w.map = RowMap::kPairHalves;
    if (kLayer[m].output == Q4GemmOutput::kRopeKv) w.map = RowMap::kRope, w.head_dim = 128, w.rotated = 8192;
    return w;
  }
  Q4GemmShape shape(int m, int64_t tokens) const { return {tokens, layout(m), sms_, true}; }

  void product(int layer, int m, int64_t tokens, const Q4GemmConfig& c, bool pdl, cudaStream_t stream) {
    Q4GemmArgs a = {};
    a.x = x_.data(), a.w = layout(m), a.grid = Grid::kInt;
    a.codes = codes_[layer * 4 + m].data(), a.scales = scales_[layer * 4 + m].data();
    a.tokens = tokens, a.output = kLayer[m].output, a.y = y_.data();
    // As a fused prefill would: fp16 towards the next product or attention, f32 for the residual stream.
    a.y_half = a.output != Q4GemmOutput::kStore;
    a.y_pitch = a.output == Q4GemmOutput::kSwiglu ? 11008 : 4096;
    a.residual = a.output == Q4GemmOutput::kStore ? residual_.data() : nullptr;
    a.table = table_.data(), a.at = {position_.data(), sequence_.data()};
    a.kv = {kv_.data(), kv_.data() + kMaxTokens * 4096, KvType::kF16, kMaxTokens};
    a.heads = a.kv_heads = 32;
    a.workspace = workspace_.data(), a.pdl = pdl;
    if (c.workspace_bytes > workspace_.size()) throw std::runtime_error("workspace of the bench too small");
    q4_gemm_cuda(a, c, stream);
  }
  double one(int m, int64_t tokens, const Q4GemmConfig& c, int repeats) {
    return timer_.microseconds([&](cudaStream_t s) { for (int l = 0; l < kLayers; ++l) product(l, m, tokens, c, true, s); },
                               repeats) / kLayers;
  }
  double layer(int64_t tokens, const Q4GemmConfig (&c)[4], bool pdl, int repeats) {
    return timer_.microseconds(
               [&](cudaStream_t s) {
                 for (int l = 0; l < kLayers; ++l)
                   for (int m = 0; m < 4; ++m) product(l, m, tokens, c[m], pdl, s);
               },
               repeats) / kLayers;
  }
  Timer& timer() { return timer_; }
  const uint16_t* x() const { return x_.data(); }
  float* y() const { return y_.data(); }

 private:
  int sms_;
  Timer timer_;
  DeviceBuffer<uint16_t> x_;
  DeviceBuffer<float> y_, residual_;
  DeviceBuffer<std::byte> workspace_;
  DeviceBuffer<uint16_t> kv_;
  DeviceBuffer<float> table_;
  DeviceBuffer<int32_t> position_, sequence_;
  std::vector<DeviceBuffer<uint8_t>> codes_;
  std::vector<DeviceBuffer<uint16_t>> scales_;
};

// cuBLAS on dense weights of the same shapes: fp16 or bf16 in and out, fp32 sums.
class Dense {
 public:
  Dense(LayerBench& b) : b_(b), w_(size_t(2) * 22016 * 4096) {
    std::mt19937_64 r(5);
    std::normal_distribution<float> normal(0, 0.02f);
    std::vector<uint16_t> w(w_.size()), pool(1 << 16);
    for (auto& v : pool) v = float_to_half(normal(r));
    for (auto& v : w) v = pool[r() & 0xffff];
    w_.write(w);
    cublas_check(cublasCreate(&handle_), "create");
    workspace_ = DeviceBuffer<std::byte>(64 << 20);
    cublas_check(cublasSetStream(handle_, b.timer().stream()), "stream");
    cublas_check(cublasSetWorkspace(handle_, workspace_.data(), workspace_.size()), "workspace");
  }
  ~Dense() { cublasDestroy(handle_); }
  double one(int64_t n, int64_t k, int64_t tokens, cudaDataType type, int repeats) {
    const float one = 1, zero = 0;
    constexpr int kTimes = 4;
    return b_.timer().microseconds(
               [&](cudaStream_t) {
                 for (int i = 0; i < kTimes; ++i)
                   cublas_check(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, int(n), int(tokens), int(k), &one,
                                             w_.data() + i % 2 * (w_.size() / 2), type, int(k), b_.x(), type, int(k), &zero,
                                             b_.y(), type, int(n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                                "gemm");
               },
               repeats) / kTimes;
  }

 private:
  LayerBench& b_;
  DeviceBuffer<uint16_t> w_;
  DeviceBuffer<std::byte> workspace_;
  cublasHandle_t handle_;
};

double tflops(double n, double k, double tokens, double us) { return 2 * n * k * tokens / us * 1e-6; }

void times(const std::vector<Q4GemmTile>& tiles, int sms, bool sweep) {
  LayerBench bench(sms);
  Dense dense(bench);
  const int64_t tokens[] = {16, 32, 64, 128, 256, 512, 2048, 8192};
  std::printf("\ncuBLAS 8192^3: %.0f TFLOP/s fp16\n",
              tflops(8192, 8192, 8192, dense.one(8192, 8192, 8192, CUDA_R_16F, 3)));
  std::printf("us a matrix; 7B layer, g128, weights rotated over %d layers; PDL; sum in one graph\n", kLayers);
  for (int64_t t : tokens) {
    const int repeats = t >= 2048 ? 3 : 7;
    Q4GemmConfig chosen[4], best[4];
    double best_us[4], fp16[4], bf16 = 0, fp16_sum = 0, flops = 0;
    for (int m = 0; m < 4; ++m) {
      fp16[m] = dense.one(kLayer[m].n, kLayer[m].k, t, CUDA_R_16F, repeats);
      bf16 += dense.one(kLayer[m].n, kLayer[m].k, t, CUDA_R_16BF, repeats);
      fp16_sum += fp16[m];
      flops += 2.0 * kLayer[m].n * kLayer[m].k * t;
      chosen[m] = best[m] = q4_gemm_config(bench.shape(m, t));
      best_us[m] = bench.one(m, t, best[m], repeats);
      std::printf("M %5lld %-8s cuBLAS %8.1f  ours %8.1f  %s\n", (long long)t, kLayer[m].name, fp16[m], best_us[m],
                  best[m].print().c_str());
    }
    if (sweep)
      for (const Q4GemmTile& tile : tiles) {
        if (tile.columns > 2 * t || (tile.columns * 8 < t && tile.columns < 128)) continue;
        for (bool stream : {false, true}) {
          std::printf("  %-8s %-6s", tile_name(tile).c_str(), stream ? "stream" : "");
          for (int m = 0; m < 4; ++m) {
            const Q4GemmConfig c = q4_gemm_config(bench.shape(m, t), tile, stream);
            const double us = bench.one(m, t, c, std::min(repeats, 5));
            std::printf(" %8.1f", us);
            if (us < best_us[m]) best_us[m] = us, best[m] = c;
          }
          std::printf("\n");
        }
      }
    const double a = bench.layer(t, chosen, true, repeats), b = bench.layer(t, chosen, false, repeats),
                 c = bench.layer(t, best, true, repeats);
    std::printf("M %5lld layer: %8.1f us %4.0f TFLOP/s (no PDL %.1f, best of sweep %.1f) | cuBLAS fp16 %.1f bf16 %.1f | ratio %.3f\n",
                (long long)t, a, flops / a * 1e-6, b, c, fp16_sum, bf16, fp16_sum / a);
    std::fflush(stdout);
  }
}

int run(bool quick, bool sweep, bool fork_allowed) {
  // The device is asked in a child as well: a process that touched it cannot fork and use it.
  const auto device = [] {
    cudaDeviceProp p;
    cuda_check(cudaGetDeviceProperties(&p, 0), "device");
    return p;
  };
  int have = 0;
  if (!isolated([&] { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 ? 0 : 1; }, fork_allowed)) {
    std::printf("SKIPPED: no CUDA device\n");
    return 0;
  }
  (void)have;
  std::vector<Q4GemmTile> good;
  int bad = 0;
  for (const Q4GemmTile& t : kQ4GemmTiles) {
    std::printf("ladder %-8s error/bound:", tile_name(t).c_str());
    const bool ok = isolated(
        [&] {
          const cudaDeviceProp p = device();
          if (p.major != 9) return 2;
          return ladder([&](const GemmCase& c, bool stream) {
            return q4_gemm_config(shape_of(c, p.multiProcessorCount, true), t, stream);
          }, t.columns, quick);
        },
        fork_allowed);
    std::printf(ok ? "  ok\n" : "  FAILED\n");
    if (ok) good.push_back(t);
    bad += !ok;
  }
  std::printf("ladder mma.sync error/bound:");
  const bool portable = isolated(
      [&] {
        const cudaDeviceProp p = device();
        return ladder([&](const GemmCase& c, bool) { return q4_gemm_config_portable(shape_of(c, p.multiProcessorCount, false)); },
                      64, quick);
      },
      fork_allowed);
  std::printf(portable ? "  ok\n" : "  FAILED\n");
  bad += !portable;

  const cudaDeviceProp p = device();
  std::printf("%s, %d SMs, CUDA %d\n", p.name, p.multiProcessorCount, CUDART_VERSION);
  if (!random_shapes(quick ? 12 : 210, good, p.multiProcessorCount, p.major == 9)) ++bad;
  if (!quick && p.major == 9 && good.size() == std::size(kQ4GemmTiles)) times(good, p.multiProcessorCount, sweep);
  std::printf(bad ? "\nFAILED: %d\n" : "\nall correct\n", bad);
  return bad ? 1 : 0;
}

}  // namespace
}  // namespace q4s

int main(int argc, char** argv) {
  bool quick = false, sweep = false, fork_allowed = true;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--quick") quick = true;
    else if (a == "--sweep") sweep = true;
    else if (a == "--no-fork") fork_allowed = false;
    else return std::fprintf(stderr, "prefill_bench_cuda [--quick] [--sweep] [--no-fork]\n"), 2;
  }
  try {
    return q4s::run(quick, sweep, fork_allowed);
  } catch (const std::exception& e) {
    std::printf("\n%s\n", e.what());
    return 1;
  }
}
