// cuBLAS on dense weights, for comparison. For prefill_bench_cuda only.
#pragma once
#include <cublas_v2.h>

#include <random>
#include <stdexcept>
#include <string>

#include "device_buffer.h"
#include "graph_timer.h"
#include "kernels/half.h"

namespace q4s {

// fp16 of a normal distribution.
inline std::vector<uint16_t> normal_halves(size_t count, float deviation, uint64_t seed) {
  std::mt19937_64 r(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<uint16_t> values(count), pool(1 << 16);
  for (auto& v : pool) v = float_to_half(normal(r));
  for (auto& v : values) v = pool[r() & 0xffff];
  return values;
}

// cuBLAS on dense weights of the same shapes: fp16 or bf16 in and out, fp32 sums. `elements` of weights are
// read in turn, so that a product finds none of them in L2 that a product shortly before left there.
class Dense {
 public:
  Dense(Timer& timer, const uint16_t* x, void* y, size_t elements)
      : timer_(timer), x_(x), y_(y), w_(elements), workspace_(64 << 20) {
    const std::vector<uint16_t> some = normal_halves(size_t(1) << 26, 0.02f, 5);
    for (size_t at = 0; at < elements; at += some.size())
      cuda_check(cudaMemcpy(w_.data() + at, some.data(), 2 * std::min(some.size(), elements - at),
                            cudaMemcpyHostToDevice),
                 "weights");
    check(cublasCreate(&handle_), "create");
    check(cublasSetStream(handle_, timer.stream()), "stream");
    check(cublasSetWorkspace(handle_, workspace_.data(), workspace_.size()), "workspace");
  }
  ~Dense() { cublasDestroy(handle_); }
  void product(int64_t n, int64_t k, int64_t tokens, cudaDataType type) {
    const float one = 1, zero = 0;
    if (at_ + size_t(n * k) > w_.size()) at_ = 0;
    check(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, int(n), int(tokens), int(k), &one, w_.data() + at_,
                       type, int(k), x_, type, int(k), &zero, y_, type, int(n), CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT),
          "gemm");
    at_ += size_t(n * k);
  }
  double microseconds(int64_t n, int64_t k, int64_t tokens, cudaDataType type, int repeats) {
    constexpr int kTimes = 4;
    const auto products = [&](cudaStream_t) {
      for (int i = 0; i < kTimes; ++i) product(n, k, tokens, type);
    };
    return timer_.microseconds(products, repeats) / kTimes;
  }

 private:
  static void check(cublasStatus_t s, const char* what) {
    if (s != CUBLAS_STATUS_SUCCESS)
      throw std::runtime_error(std::string(what) + ": cuBLAS status " + std::to_string(int(s)));
  }
  Timer& timer_;
  const uint16_t* x_;
  void* y_;
  DeviceBuffer<uint16_t> w_;
  size_t at_ = 0;
  DeviceBuffer<std::byte> workspace_;
  cublasHandle_t handle_;
};

}  // namespace q4s
