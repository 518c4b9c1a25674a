// An f32 array in a backend's memory.
#pragma once
#include <utility>

#include "runtime/backend.h"

namespace q4s {

class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend& b, int64_t count, const char* purpose)
      : backend_(&b), data_(b.allocate(size_t(count) * sizeof(float), purpose)) {}
  static Buffer of_bytes(Backend& b, size_t bytes, const char* purpose) {
    Buffer r;
    r.backend_ = &b;
    r.data_ = b.allocate(bytes, purpose);
    return r;
  }
  ~Buffer() {
    if (data_) backend_->release(data_);
  }
  Buffer(Buffer&& o) noexcept : backend_(o.backend_), data_(std::exchange(o.data_, nullptr)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(backend_, o.backend_);
    std::swap(data_, o.data_);
    return *this;
  }
  std::byte* bytes() const { return data_; }
  float* get() const { return reinterpret_cast<float*>(data_); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  Backend* backend_ = nullptr;
  std::byte* data_ = nullptr;
};

}  // namespace q4s
