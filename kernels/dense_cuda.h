// Products with the vendor's library: unquantised linears, and int4 or int8 ones unpacked to fp16 panel by
// panel (the oracle of the hand-written kernels and their fallback). fp16 x fp16 or bf16 x bf16 with f32
// sums, or f32.
#pragma once
#include <cstddef>
#include <memory>

#include "kernels/device_matrix.h"

namespace q4s {

class DenseCuda {
 public:
  explicit DenseCuda(cudaStream_t);  // throws CudaError, std::runtime_error
  ~DenseCuda();
  DenseCuda(const DenseCuda&) = delete;
  DenseCuda& operator=(const DenseCuda&) = delete;

  // Working memory of linear(); 256-aligned.
  static size_t scratch_bytes(const DeviceMatrix&, int64_t tokens);

  // y (T, N) = x (T, K) W^T (+ residual (T, N), which may be y). The same bits every run.
  void linear(const float* x, const DeviceMatrix& w, const float* residual, float* y, int64_t tokens,
              std::byte* scratch);

 private:
  struct Library;
  std::unique_ptr<Library> library_;
  cudaStream_t stream_;
};

}  // namespace q4s
