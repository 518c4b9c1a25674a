// Device buffers for tests with canaries on both sides, checked when the buffer goes. And the line of a
// machine without a GPU.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <span>
#include <vector>

#include "doctest/doctest.h"
#include "kernels/cuda_check.h"
#include "tests/quick.h"

namespace q4s {

// Ends a test case where there is no device.
inline bool no_device() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return false;
  cudaGetLastError();
  static bool said = false;
  if (!said) std::puts("SKIPPED: CUDA kernel tests: no device");
  said = true;
  return true;
}

template <typename T>
class DeviceGuarded {
 public:
  explicit DeviceGuarded(int64_t n)
      : n_(n), bytes_(size_t(n) * sizeof(T)), tail_(kCanary + (256 - bytes_ % 256) % 256) {
    cuda_check(cudaMalloc(reinterpret_cast<void**>(&base_), kCanary + bytes_ + tail_), "cudaMalloc");
    cuda_check(cudaMemset(base_, 0xa5, kCanary + bytes_ + tail_), "cudaMemset");
  }
  explicit DeviceGuarded(std::span<const T> v) : DeviceGuarded(int64_t(v.size())) { put(v); }
  DeviceGuarded(const DeviceGuarded&) = delete;
  DeviceGuarded& operator=(const DeviceGuarded&) = delete;
  ~DeviceGuarded() {
    std::vector<unsigned char> all(kCanary + bytes_ + tail_);
    CHECK(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost) == cudaSuccess);
    bool intact = true;
    for (size_t i = 0; i < all.size(); ++i)
      if (i < kCanary || i >= kCanary + bytes_) intact &= all[i] == 0xa5;
    CHECK_MESSAGE(intact, "bytes around a device buffer were overwritten");
    cudaFree(base_);
  }
  T* data() { return reinterpret_cast<T*>(base_ + kCanary); }
  void put(std::span<const T> v) {
    cuda_check(cudaMemcpy(data(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "to the device");
  }
  std::vector<T> get() {
    std::vector<T> v(static_cast<size_t>(n_));
    cuda_check(cudaMemcpy(v.data(), data(), bytes_, cudaMemcpyDeviceToHost), "from the device");
    return v;
  }

 private:
  static constexpr size_t kCanary = 256;
  int64_t n_;
  size_t bytes_, tail_;
  unsigned char* base_ = nullptr;
};

}  // namespace q4s
