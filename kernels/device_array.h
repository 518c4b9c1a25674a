// Device memory that grows: working arrays whose size changes from one linear to the next are taken once at
// the largest size so far. For *_cuda.cpp files; contents are lost when it grows.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda_check.h"

namespace q4s {

template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  ~DeviceArray() { (void)cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  // At least `count` values. Growing waits for the device.
  T* take(int64_t count) {
    if (count > count_) {
      cuda_check(cudaFree(std::exchange(data_, nullptr)), "quantiser memory");
      count_ = 0;
      cuda_check(cudaMalloc(reinterpret_cast<void**>(&data_), size_t(count) * sizeof(T)), "quantiser memory");
      count_ = count;
    }
    return data_;
  }
  T* get() const { return data_; }
  size_t bytes() const { return size_t(count_) * sizeof(T); }

  void upload(const T* from, int64_t count, cudaStream_t stream) {
    cuda_check(cudaMemcpyAsync(take(count), from, size_t(count) * sizeof(T), cudaMemcpyHostToDevice, stream),
               "upload");
  }
  void clear(int64_t count, cudaStream_t stream) {
    cuda_check(cudaMemsetAsync(take(count), 0, size_t(count) * sizeof(T), stream), "clearing memory");
  }
  // Waits.
  void download(T* to, int64_t count, cudaStream_t stream) const {
    cuda_check(cudaMemcpyAsync(to, data_, size_t(count) * sizeof(T), cudaMemcpyDeviceToHost, stream),
               "download");
    cuda_check(cudaStreamSynchronize(stream), "running the quantiser");
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace q4s
