// Time of the quantiser's steps on the GPU at the shapes of a 7B (or `small`: SmolLM2-135M; `70b`):
// gptq_bench_cuda [7b|small|70b] [tokens of a chunk, 4096]. Products count 2 n k^2 operations where the
// result is whole; "product" is the library's own f32 product of that size, "f16" its fp16 one, for
// comparison.
#include <cublas_v2.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>

#include "kernels/device_array.h"
#include "kernels/gptq_cuda.h"
#include "kernels/gptq_steps.h"
#include "quant/grid.h"

using namespace q4s;

namespace {

cudaStream_t stream;

// Milliseconds of fn, the median of a few runs after one to warm up.
double time_of(const std::function<void()>& fn, int runs = 3) {
  fn();
  cudaEvent_t a, b;
  cuda_check(cudaEventCreate(&a), "event");
  cuda_check(cudaEventCreate(&b), "event");
  std::vector<float> ms(runs);
  for (float& m : ms) {
    cuda_check(cudaEventRecord(a, stream), "event");
    fn();
    cuda_check(cudaEventRecord(b, stream), "event");
    cuda_check(cudaEventSynchronize(b), "event");
    cuda_check(cudaEventElapsedTime(&m, a, b), "event");
  }
  std::sort(ms.begin(), ms.end());
  return ms[runs / 2];
}

void fill(DeviceArray<float>& to, int64_t count, float sd, uint32_t seed) {
  std::vector<float> v(std::min<int64_t>(count, 1 << 22));
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, sd);
  for (float& x : v) x = normal(rng);
  float* p = to.take(count);
  for (int64_t i = 0; i < count; i += int64_t(v.size()))
    cuda_check(cudaMemcpy(p + i, v.data(), size_t(std::min<int64_t>(count - i, int64_t(v.size()))) * 4,
                          cudaMemcpyHostToDevice),
               "fill");
}

void bench(cublasHandle_t blas, int64_t n, int64_t k, int64_t tokens) {
  GptqCuda gptq(stream);
  DeviceArray<float> w, work, x, x_full, r, r_full, h, d, e, u, diagonal, target;
  DeviceArray<int32_t> order;
  DeviceArray<uint16_t> scales;
  DeviceArray<uint8_t> codes;
  DeviceArray<RowSums> sums;
  const int64_t group = 128, groups = ceil_div(k, group);
  fill(w, n * k, 0.02f, 1);
  fill(x, tokens * k, 1, 2);
  fill(x_full, tokens * k, 1, 3);
  fill(r, tokens * n, 1, 4);
  fill(r_full, tokens * n, 1, 5);
  h.clear(k * k, stream), d.clear(k * k, stream), e.clear(n * k, stream);
  work.take(n * k), u.take(k * k), scales.take(n * groups), codes.take(n * k), sums.take(n);
  std::vector<int32_t> identity(k);
  for (int64_t i = 0; i < k; ++i) identity[i] = int32_t(i);
  order.upload(identity.data(), k, stream);
  const auto copy = [&] {
    cuda_check(cudaMemcpyAsync(work.get(), w.get(), size_t(n * k) * 4, cudaMemcpyDeviceToDevice, stream),
               "copy");
  };
  const Levels levels = grid_levels(GridKind::kSigned);
  const double nkk = 2e-9 * double(n) * double(k) * double(k),
               tkk = 2e-9 * double(tokens) * double(k) * double(k);
  const auto show = [&](const char* step, double ms, double gflop) {
    std::printf("| %6lld | %6lld | %-10s | %9.3f | %7.1f |\n", (long long)n, (long long)k, step, ms,
                gflop / ms);
  };
  const float factor = 1e-4f;
  show("H", time_of([&] {
         gptq.statistics(
             {x.get(), nullptr, nullptr, nullptr, h.get(), d.get(), e.get(), tokens, k, n, factor}),
             gptq.finish_statistics();
       }),
       tkk / 2);
  show("H, D", time_of([&] {
         gptq.statistics(
             {x.get(), x_full.get(), nullptr, nullptr, h.get(), d.get(), e.get(), tokens, k, n, factor}),
             gptq.finish_statistics();
       }),
       1.5 * tkk);
  show("H, D, E", time_of([&] {
         gptq.statistics(
             {x.get(), x_full.get(), r.get(), r_full.get(), h.get(), d.get(), e.get(), tokens, k, n, factor}),
             gptq.finish_statistics();
       }),
       1.5 * tkk + 2e-9 * double(tokens) * double(n) * double(k));
  gptq_mirror_cuda(h.get(), k, stream);
  std::vector<float> host(k);
  gptq_diagonal_cuda(h.get(), diagonal.take(k), k, false, stream);
  diagonal.download(host.data(), k, stream);
  for (float& v : host) v *= 1.05f;
  diagonal.upload(host.data(), k, stream);
  gptq_diagonal_cuda(h.get(), diagonal.get(), k, true, stream);
  d.clear(k * k, stream), e.clear(n * k, stream);
  bool ok = true;
  show("factor", time_of([&] { ok &= gptq.factor(h.get(), order.get(), u.get(), k); }),
       1e-9 * double(k) * double(k) * double(k) * 4 / 3);
  if (!ok) std::printf("the factorisation failed\n");
  copy();
  show("correct", time_of([&] {
         gptq.correct({work.get(), d.get(), e.get(), u.get(), order.get(), order.get(), n, k, 0.5f, 0.5f});
       }),
       3 * nkk);
  show("scales", time_of([&] {
         gptq_scales_cuda({w.get(), diagonal.get(), scales.get(), n, k, group, levels, true}, stream);
       }),
       1e-9 * 160 * 12 * double(n) * double(k));
  show("solve", time_of([&] {
         copy(),
             gptq.solve({work.get(), u.get(), order.get(), scales.get(), codes.get(), n, k, group, levels});
       }),
       nkk / 2);
  const GptqPanelArgs panel{work.get(),  u.get(), order.get(), scales.get(),
                            codes.get(), e.get(), kGptqBlock,  n,
                            k,           group,   0,           std::min<int64_t>(k, kGptqBlock),
                            levels};
  show("a panel", time_of([&] { gptq_solve_panel_cuda(panel, stream); }), 1e-9 * double(n) * 128 * 128);
  const GptqRefineArgs refine{w.get(), h.get(), scales.get(), codes.get(), n, k, group, levels};
  show("sweep", time_of([&] { gptq.sweep(refine); }), 1.5 * nkk);
  show("refit", time_of([&] { gptq.refit(refine); }), 1.5 * nkk);
  show("losses", time_of([&] { gptq.losses(refine, sums.get(), true); }), 2 * nkk);
  const float one = 1, zero = 0;
  show("product", time_of([&] {
         cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, int(k), int(n), int(k), &one, h.get(), int(k), w.get(),
                     int(k), &zero, work.get(), int(k));
       }),
       nkk);
  show("f16", time_of([&] {
         cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_T, int(k), int(k), int(tokens), &one, x.get(), CUDA_R_16F,
                      int(k), x_full.get(), CUDA_R_16F, int(k), &zero, u.get(), CUDA_R_32F, int(k),
                      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
       }),
       tkk);
  std::printf("|        |        | memory     | %9.1f | MiB |\n", double(gptq.bytes()) / (1 << 20));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "7b";
  const int64_t tokens = argc > 2 ? std::atoll(argv[2]) : 4096;
  cuda_check(cudaStreamCreate(&stream), "stream");
  cublasHandle_t blas;
  if (cublasCreate(&blas) != CUBLAS_STATUS_SUCCESS) return 1;
  cublasSetStream(blas, stream);
  std::printf("| N      | K      | step       | ms        | TFLOP/s | chunks of %lld tokens\n",
              (long long)tokens);
  const std::vector<std::pair<int64_t, int64_t>> shapes =
      which == "small"
          ? std::vector<std::pair<int64_t, int64_t>>{{960, 576}, {576, 576}, {3072, 576}, {576, 1536}}
      : which == "70b" ? std::vector<std::pair<int64_t, int64_t>>{{10240, 8192}, {57344, 8192}, {8192, 28672}}
                       : std::vector<std::pair<int64_t, int64_t>>{
                             {12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
  for (const auto& [n, k] : shapes) bench(blas, n, k, tokens);
}
