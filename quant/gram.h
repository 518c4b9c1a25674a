// Sums over tokens where the activations are: H, D and E of a linear on the CPU or the GPU.
#pragma once
#include <memory>
#include <utility>

#include "kernels/gptq.h"
#include "runtime/backend.h"

namespace q4s {

// f32 array in backend memory.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend& b, int64_t count, const char* purpose)
      : backend_(&b), data_(b.allocate(size_t(count) * sizeof(float), purpose)) {}
  ~Buffer() {
    if (data_) backend_->release(data_);
  }
  Buffer(Buffer&& o) noexcept : backend_(o.backend_), data_(std::exchange(o.data_, nullptr)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(backend_, o.backend_);
    std::swap(data_, o.data_);
    return *this;
  }
  float* get() const { return reinterpret_cast<float*>(data_); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  Backend* backend_ = nullptr;
  std::byte* data_ = nullptr;
};

// All pointers are backend memory.
class Gram {
 public:
  virtual ~Gram() = default;
  virtual void difference(const float* a, const float* b, float* out, int64_t count) = 0;  // out = a - b
  virtual void add(const GptqGramArgs&) = 0;
};
std::unique_ptr<Gram> make_gram(Backend&);  // by the backend's name
std::unique_ptr<Gram> make_cuda_gram(Backend&);

}  // namespace q4s
