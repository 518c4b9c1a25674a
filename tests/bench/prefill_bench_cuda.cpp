// Prefill kernels on the device: a bring-up ladder (kernels in processes of their own, so that a fault in one
// does not hide the others), random shapes against fp64, repeatability, and times beside cuBLAS of the same
// process.
//   prefill_bench_cuda [--check | --quick | --sweep | --few | --attention [SHAPE[:TOKENS]] | --profile N]
//                      [--no-fork] [--tokens N]...
// --check: few small shapes and no timing, for compute-sanitizer (with --no-fork). --quick: the goals' table
// alone behind fewer random shapes. --sweep: every tile and way of cutting too; --few: up to 32 tokens only.
// --attention: that alone, for one SHAPE times only. --tokens: products of so many tokens, no attention.
// --profile: the four products of a layer with N tokens and nothing else, for a profiler.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>

#include "prefill_attention.h"
#include "prefill_gemm_check.h"
#include "prefill_gemm_times.h"

namespace q4s {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Q4GemmShape shape_of(const GemmCase& c, int sms, bool hopper) { return {c.tokens, c.layout(), sms, hopper}; }

// Runs a case twice: error within the bound, guards intact, the same bits again. Returns error / bound.
double run_case(const GemmCase& c, const Q4GemmConfig& config, uint64_t seed, bool pdl = false) {
  GemmProblem problem(c, seed);
  const GemmResult first = problem.run(config, pdl);
  double worst = std::max(problem.check(first, c.print().c_str()), problem.activation_error());
  if (!first.guards_intact)
    std::printf("    guard words or flags damaged: %s\n", c.print().c_str()), worst = 1e9;
  const GemmResult second = problem.run(config, pdl);
  if (first.y != second.y || first.k != second.k || first.v != second.v)
    std::printf("    not repeatable: %s\n", c.print().c_str()), worst = 1e9;
  if (worst > 1)
    std::printf("    failed: %s | %s | error/bound %.3g\n", c.print().c_str(), config.print().c_str(), worst);
  return worst;
}

// From one tile and one stage to rings that wrap, many tiles, split tiles and every epilogue; at most `most`
// tokens.
int ladder(const std::function<Q4GemmConfig(const GemmCase&, bool)>& config, int columns, int64_t most,
           bool quick) {
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
  if (!quick)
    steps.push_back({{3 * m, 9000, 256, 64}, false}), steps.push_back({{2 * m, 9000, 320, 64}, true});
  int failed = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    steps[i].first.tokens = std::min(steps[i].first.tokens, most);
    const double worst = run_case(steps[i].first, config(steps[i].first, steps[i].second), 100 + i, i % 2);
    if (worst > 1) ++failed;
    std::printf(" %.2g", worst);
    std::fflush(stdout);
    if (failed >= 3) break;
  }
  return failed;
}

// In a process of its own: a trap or a fault ends only that. True where it returned 0.
bool isolated(const std::function<int()>& f, bool fork_allowed, unsigned limit = 40) {
  if (!fork_allowed) return f() == 0;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    int result = 1;
    alarm(limit);
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
  if (WIFSIGNALED(status))
    std::printf(" signal %d%s", WTERMSIG(status), WTERMSIG(status) == SIGALRM ? " (hung)" : "");
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// ---- random shapes
// ---------------------------------------------------------------------------------------------

GemmCase random_case(std::mt19937_64& r) {
  const auto pick = [&](std::initializer_list<int64_t> v) { return v.begin()[r() % v.size()]; };
  GemmCase c = {};
  c.tokens = pick({1, 7, 9, 16, 17, 33, 48, 64, 65, 100, 128, 129, 200, 256, 300}) + int64_t(r() % 3);
  c.k = r() % 4 ? 8 * (1 + r() % 160) : 1 + r() % 700;
  c.group = pick({32, 64, 128, 1 << 20, 96, 256});
  if (c.group > c.k) c.group = c.k;
  c.grid = r() % 2 ? Grid::kInt : Grid::kHalf;
  if (r() % 8 == 0) c.bits = 8;
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

bool random_shapes(int count, int sms, bool hopper) {
  std::mt19937_64 r(7);
  double worst = 0;
  int failed = 0, of_kernel[4] = {}, streamed = 0;
  const double start = seconds();
  for (int i = 0; i < count; ++i) {
    GemmCase c = random_case(r);
    if (i % 8 == 5) c.tokens = 1 + c.tokens % kQ4GemmFewTokens;
    const Q4GemmShape s = shape_of(c, sms, hopper);
    Q4GemmConfig config = q4_gemm_config(s);
    // Every fourth the choice of the library, else any tile of any kernel.
    if (config.kernel != Q4GemmKernel::kPortable) {  // which is all there is for int8
      const size_t t = r();
      if (i % 8 == 1) config = q4_gemm_config_portable(s);
      if (i % 8 == 5) config = q4_gemm_config_few(s);
      if (i % 4 == 2)
        config = q4_gemm_config_stream(s, kQ4GemmStreamTiles[t % std::size(kQ4GemmStreamTiles)], r() % 2);
      if (i % 4 == 3)
        config = q4_gemm_config_split(s, kQ4GemmSplitTiles[t % std::size(kQ4GemmSplitTiles)],
                                      1 + int(r() % kQ4GemmMostSplits));
    }
    ++of_kernel[int(config.kernel)], streamed += config.streamed > 0;
    const double e = run_case(c, config, 1000 + i, i % 2);
    worst = std::max(worst, e), failed += !(e <= 1);
  }
  std::printf(
      "random shapes: %d, %d failed, worst error/bound %.3f (stream %d of which %d in parts, split %d, "
      "few %d, mma.sync %d; %.1f s)\n",
      count, failed, worst, of_kernel[0], streamed, of_kernel[1], of_kernel[2], of_kernel[3],
      seconds() - start);
  return failed == 0;
}

// What a kind of kernel makes of the ladder with each of its tiles.
struct Rung {
  std::string name;
  int columns;
  int64_t most;  // tokens
  std::function<Q4GemmConfig(const GemmCase&, bool)> config;
};

std::vector<Rung> rungs(int sms) {
  std::vector<Rung> all;
  const auto name = [](const char* kind, const Q4GemmTile& t) {
    return std::string(kind) + ' ' + std::to_string(t.rows) + 'x' + std::to_string(t.columns) + 'c' +
           std::to_string(t.cluster);
  };
  for (int share : {5, 19}) {
    all.push_back({"few /" + std::to_string(share), kQ4GemmFewTokens, kQ4GemmFewTokens,
                   [=](const GemmCase& c, bool more) {
                     Q4GemmConfig config = q4_gemm_config_few(shape_of(c, sms, true));
                     // Row tiles of a cluster: in turns, in one band, in several.
                     if (more) config.clusters = std::max(1, config.row_blocks / share);
                     return config;
                   }});
  }
  // Few rows in a block, and as many as a tile may have.
  for (const Q4GemmTile& t : kQ4GemmSplitTiles)
    for (int splits : {3, 5})
      all.push_back({name("split", t) + '/' + std::to_string(splits), t.columns, kMaxTokens,
                     [=](const GemmCase& c, bool more) {
                       Q4GemmShape s = shape_of(c, sms, true);
                       if (more) s.multiprocessors = 8;
                       return q4_gemm_config_split(s, t, more ? splits : splits / 2);
                     }});
  for (const Q4GemmTile& t : kQ4GemmStreamTiles)
    all.push_back({name("stream", t), t.columns, kMaxTokens, [=](const GemmCase& c, bool stream) {
                     return q4_gemm_config_stream(shape_of(c, sms, true), t, stream);
                   }});
  all.push_back({"mma.sync", 64, kMaxTokens,
                 [=](const GemmCase& c, bool) { return q4_gemm_config_portable(shape_of(c, sms, false)); }});
  return all;
}

enum class Mode { kCheck, kQuick, kPlain, kSweep, kFew };

int run_attention(bool check, const std::string& only) {
  const int failed = only.empty() ? check_attentions(check) : 0;
  if (check) return failed ? 1 : 0;
  Timer timer;
  DeviceBuffer<uint16_t> x(normal_halves(8192 * 8192, 1, 3));
  DeviceBuffer<float> y(8192 * 8192);
  Dense dense(timer, x.data(), y.data(), 8192 * 8192);
  time_attention(tflops(8192, 8192, 8192, dense.microseconds(8192, 8192, 8192, CUDA_R_16F, 5)), false, only);
  return failed ? 1 : 0;
}

int run(Mode mode, bool fork_allowed, std::vector<int64_t> counts) {
  // The device is asked in a child as well: a process that touched it cannot fork and use it.
  const auto device = [] {
    cudaDeviceProp p;
    cuda_check(cudaGetDeviceProperties(&p, 0), "device");
    return p;
  };
  const auto present = [] {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 ? 0 : 1;
  };
  if (!isolated(present, fork_allowed)) {
    std::printf("SKIPPED: no CUDA device\n");
    return 0;
  }
  const bool attention = counts.empty();
  const bool few = mode == Mode::kCheck || mode == Mode::kQuick;
  int bad = 0;
  const auto climb = [&](const Rung& rung) {
    std::printf("ladder %-18s error/bound:", rung.name.c_str());
    const bool ok = ladder(rung.config, rung.columns, rung.most, few) == 0;
    std::printf(ok ? "  ok\n" : "  FAILED\n");
    return ok;
  };
  // All in one process; each in its own only when that fails.
  const auto all = [&] {
    const cudaDeviceProp p = device();
    for (const Rung& rung : rungs(p.multiProcessorCount))
      if ((p.major == 9 || rung.name == "mma.sync") && !climb(rung)) return 1;
    return 0;
  };
  if (!isolated(all, fork_allowed)) {
    ++bad;
    std::printf("\nthe ladder failed; each kernel in a process of its own\n");
    for (const Rung& rung : rungs(132)) isolated([&] { return climb(rung) ? 0 : 1; }, fork_allowed, 10);
  }
  if (attention && !isolated([&] { return check_attentions(few); }, fork_allowed))
    ++bad, std::printf("  attention FAILED\n");
  if (bad && fork_allowed) std::printf("FAILED: %d; times all the same\n", bad);

  const cudaDeviceProp p = device();
  std::printf("%s, %d SMs, CUDA %d\n", p.name, p.multiProcessorCount, CUDART_VERSION);
  const int count = mode == Mode::kCheck ? 12 : mode == Mode::kQuick ? 40 : 220;
  if (bad == 0 && !random_shapes(count, p.multiProcessorCount, p.major == 9)) ++bad;
  if (mode != Mode::kCheck && p.major == 9) {
    if (counts.empty() && mode == Mode::kFew) counts = {8, 16, 32};
    if (counts.empty()) counts = {8, 16, 32, 64, 128, 256, 512, 2048, 8192};
    const bool sweep = mode == Mode::kSweep || mode == Mode::kFew;
    const double peak = time_gemm(p.multiProcessorCount, sweep, counts);
    if (attention && mode != Mode::kFew) time_attention(peak, sweep);
  }
  std::printf(bad ? "\nFAILED: %d\n" : "\nall correct\n", bad);
  return bad ? 1 : 0;
}

}  // namespace
}  // namespace q4s

int main(int argc, char** argv) {
  q4s::Mode mode = q4s::Mode::kPlain;
  bool fork_allowed = true, attention = false;
  std::string only;
  std::vector<int64_t> counts;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--check")
      mode = q4s::Mode::kCheck;
    else if (a == "--quick")
      mode = q4s::Mode::kQuick;
    else if (a == "--sweep")
      mode = q4s::Mode::kSweep;
    else if (a == "--few")
      mode = q4s::Mode::kFew;
    else if (a == "--no-fork")
      fork_allowed = false;
    else if (a == "--tokens" && i + 1 < argc)
      counts.push_back(std::clamp<int64_t>(std::atoll(argv[++i]), 1, q4s::kMaxTokens));
    else if (a == "--attention")
      attention = true, only = i + 1 < argc && argv[i + 1][0] != '-' ? argv[++i] : "";
    else if (a == "--profile" && i + 1 < argc)
      return q4s::profile_gemm(132, std::atoll(argv[i + 1])), 0;
    else
      return std::fprintf(
                 stderr,
                 "prefill_bench_cuda [--check | --quick | --sweep | --few | --attention [SHAPE[:TOKENS]] | "
                 "--profile N] [--no-fork] [--tokens N]...\n"),
             2;
  }
  try {
    if (attention) return q4s::run_attention(mode == q4s::Mode::kCheck, only);
    return q4s::run(mode, fork_allowed, counts);
  } catch (const std::exception& e) {
    std::printf("\n%s\n", e.what());
    return 1;
  }
}
