// Time of the quantiser's steps at the shapes of SmolLM2-135M on the CPU: gptq_bench [threads] [tokens]
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernels/gptq.h"
#include "quant/solver.h"
#include "runtime/thread_pool.h"

using namespace q4s;

int main(int argc, char** argv) {
  ThreadPool pool(argc > 1 ? std::atoi(argv[1]) : 0);
  const int64_t tokens = argc > 2 ? std::atoi(argv[2]) : 4096;
  const Team team = [&](const std::function<void(Part)>& fn) { pool.run(fn); };
  const auto clock = [last = std::chrono::steady_clock::now()]() mutable {
    const auto now = std::chrono::steady_clock::now();
    const double s = std::chrono::duration<double>(now - last).count();
    last = now;
    return s;
  };
  auto lap = clock;
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  std::printf("| N | K | H | D | E | factor | solve | relative loss | ms, %d threads, %lld tokens\n",
              pool.threads(), (long long)tokens);
  const int64_t shapes[][2] = {{960, 576}, {576, 576}, {3072, 576}, {576, 1536}};
  for (const auto& [n, k] : shapes) {
    std::vector<float> x(tokens * k), dx(tokens * k), dr(tokens * n), w(n * k);
    std::vector<float> h(k * k), d(k * k), e(n * k);
    for (float& v : x) v = normal(rng);
    for (int64_t i = 1; i < tokens * k; ++i) x[i] = 0.7f * x[i - 1] + 0.7f * x[i];
    for (float& v : dx) v = 0.05f * normal(rng);
    for (float& v : dr) v = 0.05f * normal(rng);
    for (float& v : w) v = 0.1f * normal(rng);
    const float f = 2.0f / 8;
    lap();
    pool.run([&](Part p) { gptq_gram_cpu({x.data(), x.data(), h.data(), tokens, k, k, f, true}, p); });
    const double th = lap();
    pool.run([&](Part p) { gptq_gram_cpu({dx.data(), x.data(), d.data(), tokens, k, k, f, false}, p); });
    const double td = lap();
    pool.run([&](Part p) { gptq_gram_cpu({dr.data(), x.data(), e.data(), tokens, n, k, f, false}, p); });
    const double te = lap();
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < i; ++j) h[i * k + j] = h[j * k + i];
    lap();
    const HessianFactor factor = factor_hessian(h, k, 0.05, true, team);
    const double tf = lap();
    const QuantizedLinear q = solve({w.data(), d.data(), e.data(), n, k}, factor, SolveOptions{}, team);
    const double ts = lap();
    std::printf("| %lld | %lld | %.1f | %.1f | %.1f | %.1f | %.1f | %.5f |\n", (long long)n, (long long)k,
                1e3 * th, 1e3 * td, 1e3 * te, 1e3 * tf, 1e3 * ts, summarize(q.rows, k, 0, n).relative);
  }
}
