// Time of every CPU kernel by shape, instruction set and number of threads, beside the read bandwidth
// measured in the same run. Weights rotate through more copies than the caches hold.
//   cpu_bench [FILTER [THREADS]]      the lines whose name contains FILTER; default: every one, 1 thread and
//   all
// Median and best time; the rates are those of the median.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu_features.h"
#include "kernels/half.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "kernels/rope_kv.h"
#include "kernels/rotate.h"
#include "kernels/swiglu.h"
#include "runtime/thread_pool.h"

using namespace q4s;

namespace {

struct Bench {
  std::string filter;
  ThreadPool* pool = nullptr;
  double read_gb_per_s = 0;

  // Median time of fn(i) over at least 5 runs and 0.3 s. bytes and flops are those of one run.
  void line(const std::string& name, double bytes, double flops, const std::function<void(int)>& fn) const {
    const std::string full =
        name + (cpu_level() == best_cpu_level() ? "" : std::string(" ") + cpu_level_name(cpu_level()));
    if (full.find(filter) == std::string::npos) return;
    using Clock = std::chrono::steady_clock;
    std::vector<double> times;
    fn(0);
    const auto start = Clock::now();
    for (int i = 1; times.size() < 5 || Clock::now() - start < std::chrono::milliseconds(300); ++i) {
      const auto begin = Clock::now();
      fn(i);
      times.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    const double s = times[times.size() / 2];
    std::printf("%-36s %d thr %9.1f us (best %9.1f) %6.2f GB/s %4.0f %% %7.1f GFLOP/s\n", full.c_str(),
                pool->threads(), s * 1e6, times[0] * 1e6, bytes / s / 1e9,
                100 * bytes / s / 1e9 / read_gb_per_s, flops / s / 1e9);
    std::fflush(stdout);
  }

  template <typename Fn, typename Args>
  void op(const std::string& name, double bytes, double flops, Fn fn, const Args& a) const {
    line(name, bytes, flops, [&](int) { pool->run([&](Part p) { fn(a, p); }); });
  }
};

std::vector<float> randoms(int64_t n) {
  std::vector<float> v(static_cast<size_t>(n));
  std::mt19937 rng(1);
  for (float& x : v) x = float(int32_t(rng())) * 0x1p-31f;
  return v;
}

// Enough copies of one matrix that none is still cached when its turn comes again.
struct Matrix {
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;
  std::vector<WeightView> copies;
  Matrix(Format f, int64_t n, int64_t k, int64_t group, bool rotate) {
    const int64_t bytes = n * row_bytes(f, k),
                  count = rotate ? std::max<int64_t>(2, (int64_t(256) << 20) / bytes) : 1;
    data.resize(size_t(bytes * count));
    uint64_t state = 1;
    for (size_t i = 0; i + 8 <= data.size(); i += 8) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const uint64_t v =
          f == Format::kQ4 || f == Format::kQ8 ? state : state & 0x3fff3fff3fff3fff;  // finite floats
      std::memcpy(&data[i], &v, 8);
    }
    const bool ours = f == Format::kQ4 || f == Format::kQ8;
    if (ours) scales.assign(size_t(n * ceil_div(k, group) * count), float_to_half(0.01f));
    for (int64_t c = 0; c < count; ++c)
      copies.push_back({.format = f,
                        .n = n,
                        .k = k,
                        .group = group,
                        .data = data.data() + c * bytes,
                        .scales = ours ? scales.data() + c * n * ceil_div(k, group) : nullptr});
  }
  double bytes() const {
    const WeightView& w = copies[0];
    return double(w.n) * double(row_bytes(w.format, w.k)) +
           (w.scales ? 2. * double(w.n) * double(w.groups()) : 0);
  }
};

void bench_linear(const Bench& b, const std::string& model, Format f, const char* format, int64_t n,
                  int64_t k, int64_t tokens) {
  const std::string name = model + " " + format + " " + std::to_string(n) + "x" + std::to_string(k) + " T" +
                           std::to_string(tokens);
  if (name.find(b.filter.substr(0, b.filter.find(' '))) == std::string::npos) return;
  const Matrix m(f, n, k, f == Format::kQ8 ? 64 : 128, tokens < 16);
  const std::vector<float> x = randoms(tokens * k);
  std::vector<float> y(size_t(tokens * n));
  for (CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (level > best_cpu_level()) continue;
    set_cpu_level(level);
    std::vector<std::byte> scratch(linear_scratch_bytes(m.copies[0], tokens, b.pool->threads()) + 64);
    auto* aligned =
        reinterpret_cast<std::byte*>(round_up(int64_t(reinterpret_cast<intptr_t>(scratch.data())), 64));
    b.line(name, m.bytes(), 2. * double(n * k * tokens), [&](int i) {
      const LinearArgs a{x.data(), m.copies[size_t(i) % m.copies.size()], nullptr, y.data(), tokens, aligned};
      b.pool->run([&](Part p) {
        linear_prepare(a, p);
        b.pool->barrier();
        linear(a, p);
      });
    });
  }
}

void bench_attention(const Bench& b, const std::string& model, int64_t heads, int64_t kv_heads, int64_t hd,
                     int64_t tokens, int64_t depth, int64_t layers) {
  const int64_t ctx = depth + tokens, width = kv_heads * hd;
  std::vector<uint16_t> cache(size_t(2 * ctx * width * layers), float_to_half(0.1f));
  const std::vector<float> q = randoms(tokens * heads * hd);
  std::vector<float> y(q.size());
  std::vector<int32_t> position, sequence(size_t(tokens), 0);
  for (int64_t t = 0; t < tokens; ++t) position.push_back(int32_t(depth + t));
  const double seen = double(depth) + double(tokens + 1) / 2;
  for (CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (level > best_cpu_level()) continue;
    set_cpu_level(level);
    std::vector<std::byte> scratch(attention_scratch_bytes(ctx, hd, b.pool->threads()));
    b.line(model + " attention T" + std::to_string(tokens) + " @" + std::to_string(depth),
           double(4 * ctx * width), 4 * double(tokens * heads * hd) * seen, [&](int i) {
             uint16_t* k = cache.data() + i % layers * 2 * ctx * width;
             const AttentionArgs a{q.data(),
                                   {position.data(), sequence.data()},
                                   {k, k + ctx * width, KvType::kF16, ctx},
                                   y.data(),
                                   tokens,
                                   heads,
                                   kv_heads,
                                   hd,
                                   scratch.data()};
             b.pool->run([&](Part p) { attention(a, p); });
           });
  }
}

void bench_small(const Bench& b, const std::string& model, int64_t dim, int64_t hidden, int64_t heads,
                 int64_t hd, int64_t tokens) {
  const std::vector<float> x = randoms(tokens * std::max(2 * hidden, 3 * dim)), table = randoms(4096 * hd);
  std::vector<float> y(size_t(tokens * std::max(dim, hidden)));
  std::vector<int32_t> position, sequence(size_t(tokens), 0);
  for (int64_t t = 0; t < tokens; ++t) position.push_back(int32_t(t));
  std::vector<uint16_t> k(size_t(4096 * dim)), v(size_t(4096 * dim));
  const std::string t = " T" + std::to_string(tokens);
  for (CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (level > best_cpu_level()) continue;
    set_cpu_level(level);
    const double d = double(dim * tokens), h = double(hidden * tokens);
    b.op(model + " rms_norm" + t, 8 * d, 4 * d, rms_norm,
         RmsNormArgs{x.data(), x.data(), y.data(), tokens, dim, 1e-5f});
    b.op(model + " swiglu" + t, 12 * h, 0, swiglu, SwigluArgs{x.data(), y.data(), tokens, hidden});
    b.op(model + " rope_kv" + t, 20 * d, 0, rope_kv,
         RopeKvArgs{x.data(),
                    table.data(),
                    {position.data(), sequence.data()},
                    {k.data(), v.data(), KvType::kF16, 4096},
                    y.data(),
                    tokens,
                    heads,
                    heads,
                    hd});
    const int64_t m = dim % 9 ? 1 : 9;
    b.op(model + " rotate" + t, 8 * d, 0, rotate,
         RotateArgs{x.data(), x.data(), x.data(), y.data(), tokens, dim, m, false});
  }
}

double read_bandwidth(ThreadPool& pool) {
  const std::vector<uint64_t> data(size_t(64) << 20, 1);  // 512 MiB
  double best = 0;
  std::vector<uint64_t> sums(size_t(pool.threads()) * 8);
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](Part p) {
      const auto [begin, end] = p.of(int64_t(data.size()), 64);
      uint64_t s[8] = {};
      for (int64_t i = begin; i < end; i += 8)
        for (int j = 0; j < 8; ++j) s[j] += data[size_t(i + j)];
      for (uint64_t v : s) sums[size_t(p.index) * 8] += v;
    });
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, double(data.size()) * 8 / s / 1e9);
  }
  return sums[0] ? best : 0;
}

}  // namespace

int main(int argc, char** argv) {
  Bench b;
  if (argc > 1) b.filter = argv[1];
  std::vector<int> counts{1};
  if (usable_cores() > 1) counts.push_back(usable_cores());
  if (argc > 2) counts = {std::atoi(argv[2])};
  for (int threads : counts) {
    ThreadPool pool(threads);
    b.pool = &pool;
    b.read_gb_per_s = read_bandwidth(pool);
    std::printf("read bandwidth, %d threads: %.1f GB/s; best level: %s\n", threads, b.read_gb_per_s,
                cpu_level_name(best_cpu_level()));
    for (int64_t tokens : {1, 4, 16, 512}) {
      for (auto [n, k] : {std::pair<int64_t, int64_t>{960, 576}, {576, 576}, {3072, 576}, {576, 1536}})
        bench_linear(b, "smollm2", Format::kQ4, "q4", n, k, tokens);
      bench_linear(b, "smollm2", Format::kQ8, "q8", 49152, 576, tokens > 16 ? 64 : tokens);
      bench_linear(b, "smollm2", Format::kF16, "f16", 3072, 576, tokens);
      for (auto [n, k] : {std::pair<int64_t, int64_t>{2560, 2048}, {11264, 2048}, {2048, 5632}})
        bench_linear(b, "1.1b", Format::kQ4, "q4", n, k, tokens);
      for (auto [n, k] : {std::pair<int64_t, int64_t>{12288, 4096}, {22016, 4096}, {4096, 11008}})
        bench_linear(b, "7b", Format::kQ4, "q4", n, k, tokens > 16 ? 128 : tokens);
    }
    bench_attention(b, "smollm2", 9, 3, 64, 1, 512, 30);
    bench_attention(b, "smollm2", 9, 3, 64, 512, 0, 1);
    bench_attention(b, "7b", 32, 32, 128, 1, 2048, 8);
    bench_attention(b, "7b", 32, 32, 128, 128, 0, 1);
    for (int64_t tokens : {1, 512}) {
      bench_small(b, "smollm2", 576, 1536, 9, 64, tokens);
      bench_small(b, "7b", 4096, 11008, 32, 128, tokens);
    }
    set_cpu_level(best_cpu_level());
  }
  return 0;
}
