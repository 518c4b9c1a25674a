// Activations of all tokens, (T, cols), in backend memory: f32, or fp16 where the backend prefers that at
// rest. They are worked on in f32, a chunk at a time.
#pragma once
#include "quant/buffer.h"
#include "quant/weight_work.h"

namespace q4s {

class Activations {
 public:
  Activations() = default;
  // `work` must outlive it. chunk: the most tokens of a call.
  Activations(Backend& b, WeightWork& work, int64_t tokens, int64_t cols, int64_t chunk, const char* purpose)
      : work_(&work), cols_(cols), own_(Buffer::of_bytes(b, size_t(bytes(work, tokens, cols)), purpose)) {
    if (work.halves()) own_chunk_ = Buffer(b, chunk * cols, purpose);
    rest_ = own_.bytes(), chunk_ = own_chunk_.get();
  }
  // In memory of the caller: bytes() of it at rest, and (chunk, cols) f32 to work in.
  Activations(WeightWork& work, int64_t cols, std::byte* rest, float* chunk)
      : work_(&work), cols_(cols), rest_(rest), chunk_(chunk) {}
  static int64_t bytes(const WeightWork& work, int64_t tokens, int64_t cols) {
    return tokens * cols * (work.halves() ? 2 : 4);
  }

  // Rows [t, t + n): what stands there, or memory for what will. Valid until the next of these calls.
  float* open(int64_t t, int64_t n) {
    float* x = blank(t);
    if (work_->halves()) work_->take(rest_ + 2 * t * cols_, x, n * cols_);
    return x;
  }
  float* blank(int64_t t) { return work_->halves() ? chunk_ : reinterpret_cast<float*>(rest_) + t * cols_; }
  // Keeps what was written to them.
  void close(int64_t t, int64_t n) {
    if (work_->halves()) work_->put(chunk_, rest_ + 2 * t * cols_, n * cols_);
  }

 private:
  WeightWork* work_ = nullptr;
  int64_t cols_ = 0;
  Buffer own_, own_chunk_;
  std::byte* rest_ = nullptr;
  float* chunk_ = nullptr;
};

}  // namespace q4s
