// Prefill attention: against fp64 with a bound, and times. For prefill_bench_cuda only.
#pragma once
#include <cmath>
#include <cstdio>
#include <numeric>
#include <thread>

#include "kernels/attention_prefill.h"
#include "prefill_dense.h"

namespace q4s {

struct AttentionCase {
  int64_t tokens, heads, kv_heads, head_dim, start;
  int sequences = 1;
  bool mixed = false;  // tokens of a sequence in any order, sequences in turns
  bool y_half = false, q_half = false;
  bool rising = false;  // keys grow with the position, and scores with them
};

// Largest error / bound; `portable` asks for that kernel.
inline double check_attention(const AttentionCase& c, bool portable, uint64_t seed) {
  std::mt19937_64 r(seed);
  const int64_t each = ceil_div(c.tokens, c.sequences), ctx = c.start + each + 5, hd = c.head_dim;
  const int64_t width = c.kv_heads * hd, q_width = c.heads * hd;
  std::vector<int32_t> position(c.tokens), sequence(c.tokens), order(each);
  std::iota(order.begin(), order.end(), 0);
  if (c.mixed) std::shuffle(order.begin(), order.end(), r);
  for (int64_t t = 0; t < c.tokens; ++t) {
    sequence[t] = int32_t(c.mixed ? t % c.sequences : t / each);
    position[t] = int32_t(c.start + order[c.mixed ? t / c.sequences : t % each]);
  }
  std::vector<int64_t> used(c.sequences);
  for (int64_t t = 0; t < c.tokens; ++t)
    used[sequence[t]] = std::max<int64_t>(used[sequence[t]], position[t] + 1);
  std::vector<uint16_t> k = normal_halves(c.sequences * ctx * width, 1, seed + 1),
                        v = normal_halves(k.size(), 1, seed + 2);
  if (c.rising)
    for (size_t i = 0; i < k.size(); ++i)
      k[i] = float_to_half(half_to_float(k[i]) * (1 + 12 * float(int64_t(i) / width % ctx) / float(ctx)));
  for (int s = 0; s < c.sequences; ++s)  // what no token wrote is not a number
    for (int64_t i = (s * ctx + used[s]) * width; i < (s + 1) * ctx * width; ++i) k[i] = v[i] = 0xffff;
  std::normal_distribution<float> normal;
  std::vector<float> q(c.tokens * q_width);
  for (float& x : q) x = normal(r) * 2;

  DeviceBuffer<uint16_t> dk(k), dv(v);
  std::vector<uint16_t> q16(q.size());
  for (size_t i = 0; i < q.size(); ++i) q16[i] = float_to_half(q[i]);
  DeviceBuffer<float> dq(q);
  DeviceBuffer<uint16_t> dq16(q16);
  DeviceBuffer<int32_t> dp(position), ds(sequence);
  constexpr size_t kGuard = 64;
  const auto run = [&] {
    DeviceBuffer<float> y(q.size() + 2 * kGuard);
    y.fill_byte(0xcd);
    const AttentionPrefillArgs a{c.q_half ? static_cast<void*>(dq16.data()) : dq.data(),
                                 c.q_half,
                                 {dp.data(), ds.data()},
                                 {dk.data(), dv.data(), KvType::kF16, ctx},
                                 y.data() + kGuard,
                                 c.y_half,
                                 c.tokens,
                                 c.heads,
                                 c.kv_heads,
                                 hd};
    portable ? attention_prefill_portable_cuda(a, nullptr) : attention_prefill_cuda(a, nullptr);
    cuda_check(cudaDeviceSynchronize(), "attention_prefill");
    return y.read();
  };
  const std::vector<float> raw = run();
  double worst = raw == run() ? 0 : 1e9;
  if (worst > 0) std::printf("    not repeatable\n");
  const auto* bytes = reinterpret_cast<const unsigned char*>(raw.data());
  const size_t used_bytes = kGuard * 4 + q.size() * (c.y_half ? 2 : 4);
  for (size_t i = 0; i < raw.size() * 4; ++i)
    if ((i < kGuard * 4 || i >= used_bytes) && bytes[i] != 0xcd) worst = 1e9;

  const float scale = 1.4426950408889634f / std::sqrt(float(hd));
  std::vector<double> of_thread(std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 16));
  const auto heads = [&](size_t thread) {
    std::vector<double> p, sum(hd), magnitude(hd);
    for (int64_t i = int64_t(thread); i < c.tokens * c.heads; i += int64_t(of_thread.size())) {
      const int64_t t = i / c.heads, h = i % c.heads, n = position[t] + 1;
      const int64_t at = sequence[t] * ctx * width + h / (c.heads / c.kv_heads) * hd;
      p.assign(n, 0), sum.assign(hd, 0), magnitude.assign(hd, 0);
      double top = -1e300, largest = 0, total = 0, all = 0;
      for (int64_t j = 0; j < n; ++j) {
        double m = 0;
        for (int64_t d = 0; d < hd; ++d) {
          const double x = double(scale) * half_to_float(q16[t * q_width + h * hd + d]) *
                           half_to_float(k[at + j * width + d]);
          p[j] += x, m += std::abs(x);
        }
        top = std::max(top, p[j]), largest = std::max(largest, m);
      }
      for (int64_t j = 0; j < n; ++j) total += p[j] = std::exp2(p[j] - top);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t d = 0; d < hd; ++d) {
          const double x = half_to_float(v[at + j * width + d]);
          sum[d] += p[j] * x, magnitude[d] += p[j] * std::abs(x), all = std::max(all, std::abs(x));
        }
      // A score: f32 sums of hd products, truncated within 2^-22 of the magnitudes in each of hd/16 steps; so
      // much its weight is off, relatively, and 2^-21 by exp2 and the subtraction. Weights are rounded to
      // fp16: 2^-11, and 2^-25 below its normal range. Sums over n.
      const double score = largest * (double(hd) / 16 + 2) * 0x1p-22;
      const double weight = score + 0x1p-21 + double(n) * 0x1p-22;
      for (int64_t d = 0; d < hd; ++d) {
        const double want = sum[d] / total, m = magnitude[d] / total;
        double bound = m * (0x1p-11 + 2 * weight) + double(n) * all * 0x1p-25 / total + 1e-30;
        bound += c.y_half ? std::abs(want) * 0x1p-11 + 0x1p-25 : 0;
        const size_t e = size_t(t * q_width + h * hd + d);
        const double got = c.y_half ? half_to_float(reinterpret_cast<const uint16_t*>(raw.data() + kGuard)[e])
                                    : raw[kGuard + e];
        const double ratio = std::isfinite(got) ? std::abs(got - want) / bound : 1e30;
        if (ratio > 1 && of_thread[thread] <= 1)
          std::printf("    token %lld head %lld column %lld: got %.6g want %.6g bound %.3g\n", (long long)t,
                      (long long)h, (long long)d, got, want, bound);
        of_thread[thread] = std::max(of_thread[thread], ratio);
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < of_thread.size(); ++i) threads.emplace_back(heads, i);
  for (std::thread& thread : threads) thread.join();
  return std::max(worst, *std::max_element(of_thread.begin(), of_thread.end()));
}

// Both kernels over odd shapes. Returns how many failed.
inline int check_attentions(bool few) {
  std::vector<AttentionCase> cases;
  for (int64_t hd : {64, 128}) {
    // For a sanitizer: more tiles than multiprocessors, tiles of three warpgroups, several sequences and
    // positions of a tile far apart, heads that share a tile, queries in fp16 and not.
    const std::vector<AttentionCase> small = {{65, 2, 1, 0, 0},
                                              {130, 66, 33, 0, 50, 1, false, true, true},
                                              {140, 8, 1, 0, 30, 2, true, true, true},
                                              {70, 96, 96, 0, 0, 2, true, false, true},
                                              {300, 2, 1, 0, 500, 1, false, true, true, true},
                                              {1540, 2, 1, 0, 0, 1, false, true, true},
                                              {1540, 8, 1, 0, 0, 3, true, false, false, true}};
    const std::vector<AttentionCase> all = {{65, 2, 1, 0, 0},
                                            {1000, 36, 9, 0, 50, 3, false, true},
                                            {1700, 1, 1, 0, 0, 1, false, true, true},
                                            {128, 1, 1, 0, 0},
                                            {200, 4, 2, 0, 77, 1, false, true, true},
                                            {300, 3, 3, 0, 1000},
                                            {257, 2, 1, 0, 3, 3},
                                            {190, 4, 4, 0, 130, 2, true, true, true},
                                            {1100, 36, 18, 0, 0, 1, false, true, true},
                                            {900, 39, 39, 0, 0, 2, true, false, true},
                                            {2100, 2, 1, 0, 33, 4, true, true},
                                            {2300, 14, 7, 0, 0, 1, false, true, true},
                                            {300, 48, 2, 0, 20, 2, false, true, true},
                                            {1601, 16, 1, 0, 100, 3, true, false, true},
                                            {700, 4, 2, 0, 900, 2, true, false, true, true},
                                            {1900, 4, 1, 0, 0, 1, false, true, true, true},
                                            {1700, 32, 4, 0, 0, 1, false, true, true}};
    for (const AttentionCase& c : few ? small : all) cases.push_back(c), cases.back().head_dim = hd;
  }
  for (int64_t hd : {80, 96, 40}) cases.push_back({few ? 70 : 210, 4, 2, hd, 50, 2, false, false, hd != 96});
  int failed = 0;
  for (bool portable : {false, true}) {
    std::printf("attention%s error/bound:", portable ? " mma.sync" : "");
    for (size_t i = 0; i < cases.size(); ++i) {
      const double e = check_attention(cases[i], portable, 300 + i);
      std::printf(" %.2g", e);
      if (!(e <= 1)) {
        ++failed;
        std::printf("[tokens %lld hd %lld]", (long long)cases[i].tokens, (long long)cases[i].head_dim);
      }
      std::fflush(stdout);
    }
    std::printf("\n");
  }
  return failed;
}

// TFLOP/s of causal attention (half of the square), as part of what cuBLAS makes of 8192^3: alone, then in
// graphs of many in a row. `only` names a shape and, after a colon, a number of tokens; empty for all.
inline void time_attention(double peak, bool sweep, const std::string& only = "") {
  struct Shape {
    const char* name;
    int64_t heads, kv_heads, head_dim;
  };
  Timer timer;
  const std::vector<uint16_t> values = normal_halves(1 << 22, 1, 2);
  const auto fill = [&](DeviceBuffer<uint16_t>& to) {
    for (size_t at = 0; at < to.size(); at += values.size())
      cuda_check(cudaMemcpy(to.data() + at, values.data(), std::min(values.size(), to.size() - at) * 2,
                            cudaMemcpyHostToDevice),
                 "values");
  };
  std::printf(
      "\nattention: us a layer, TFLOP/s causal, part of cuBLAS's peak; in a row; least and most alone\n");
  for (const Shape& s : {Shape{"7B", 32, 32, 128}, Shape{"8B", 32, 8, 128}, Shape{"tinyllama", 32, 4, 64}})
    for (const auto& [tokens, start] : std::initializer_list<std::pair<int64_t, int64_t>>{
             {512, 0}, {512, 4096}, {2048, 0}, {8192, 0}, {32768, 0}}) {
      if (!only.empty() && only != s.name && only != std::string(s.name) + ':' + std::to_string(tokens))
        continue;
      const int64_t ctx = start + tokens;
      DeviceBuffer<uint16_t> k(ctx * s.kv_heads * s.head_dim), v(k.size());
      const int64_t size = tokens * s.heads * s.head_dim;
      DeviceBuffer<uint16_t> q(size), y(size);
      fill(k), fill(v), fill(q);
      std::vector<int32_t> position(tokens);
      std::iota(position.begin(), position.end(), int32_t(start));
      DeviceBuffer<int32_t> p(position), sequence(tokens);
      sequence.fill_byte(0);
      const AttentionPrefillArgs a{q.data(),
                                   true,
                                   {p.data(), sequence.data()},
                                   {k.data(), v.data(), KvType::kF16, ctx},
                                   y.data(),
                                   true,
                                   tokens,
                                   s.heads,
                                   s.kv_heads,
                                   s.head_dim};
      const std::vector<double> alone = timer.times([&](cudaStream_t t) { attention_prefill_cuda(a, t); }, 9);
      const double us = alone[alone.size() / 2];
      const int many = std::max(1, int(2000 / us));
      const double in_a_row = timer.microseconds(
                                  [&](cudaStream_t t) {
                                    for (int i = 0; i < many; ++i) attention_prefill_cuda(a, t);
                                  },
                                  9) /
                              many;
      const double flops =
          4.0 * double(tokens) * (double(start) + double(tokens) / 2) * double(s.heads * s.head_dim);
      std::printf("%-9s %5lld tokens at %4lld: %9.1f us %4.0f TFLOP/s %.2f; %9.1f us %.2f; %.1f %.1f", s.name,
                  (long long)tokens, (long long)start, us, flops / us * 1e-6, flops / us * 1e-6 / peak,
                  in_a_row, flops / in_a_row * 1e-6 / peak, alone.front(), alone.back());
      if (sweep && tokens <= 8192) {
        const double old =
            timer.microseconds([&](cudaStream_t t) { attention_prefill_portable_cuda(a, t); }, 3);
        std::printf("   mma.sync %9.1f us %4.0f TFLOP/s", old, flops / old * 1e-6);
      }
      std::printf("\n");
      std::fflush(stdout);
    }
}

}  // namespace q4s
