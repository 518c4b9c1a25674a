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
  // The same of x normalised by its root mean square and times gain (K), for weights that are multiplied in
  // fp16.
  void norm_linear(const float* x, const float* gain, float eps, const DeviceMatrix& w, const float* residual,
                   float* y, int64_t tokens, std::byte* scratch);
  // The same of x that is fp16 already, for such weights.
  void linear_f16(const void* x, const DeviceMatrix& w, const float* residual, float* y, int64_t tokens,
                  std::byte* scratch);
  static bool multiplies_f16(const DeviceMatrix& w) { return w.tiled || w.view.format == Format::kF16; }

 private:
  void product_f16(const void* x, const DeviceMatrix& w, const float* residual, float* y, int64_t tokens,
                   std::byte* panel);

  struct Library;
  std::unique_ptr<Library> library_;
  cudaStream_t stream_;
};

}  // namespace q4s
