#include "kernels/dense_cuda.h"

#include <cublas_v2.h>

#include "kernels/convert.h"
#include "kernels/cuda_check.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"

namespace q4s {
namespace {

constexpr size_t kWorkspace = 32 << 20;             // what the library recommends for this chip
constexpr int64_t kPanelBytes = int64_t(64) << 20;  // unpacked rows at a time

int64_t panel_rows(const WeightView& w) {
  return std::min(w.n, std::max<int64_t>(16, kPanelBytes / (2 * w.k) / 16 * 16));
}

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": cuBLAS: " + cublasGetStatusString(status));
}

size_t aligned(int64_t bytes) { return size_t(round_up(bytes, 256)); }

}  // namespace

struct DenseCuda::Library {
  cublasHandle_t handle = nullptr;
  ~Library() {
    if (handle) cublasDestroy(handle);
  }

  // y (T, n) of row stride ld: y (+)= x (T, k) w (n, k)^T, both of `type`. Row-major is the transpose of the
  // library's.
  void product(cudaDataType type, const void* x, const void* w, float* y, int64_t tokens, int64_t n,
               int64_t k, int64_t ld, bool add) {
    const float one = 1, beta = add ? 1 : 0;
    check(
        cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, int(n), int(tokens), int(k), &one, w, type, int(k), x,
                     type, int(k), &beta, y, CUDA_R_32F, int(ld), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "linear");
  }
};

DenseCuda::DenseCuda(cudaStream_t stream) : library_(std::make_unique<Library>()), stream_(stream) {
  check(cublasCreate(&library_->handle), "cublasCreate");
  check(cublasSetStream(library_->handle, stream), "cublasSetStream");
  check(cublasSetMathMode(library_->handle, cublasMath_t(CUBLAS_DEFAULT_MATH |
                                                         CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)),
        "cublasSetMathMode");
}

DenseCuda::~DenseCuda() = default;

size_t DenseCuda::scratch_bytes(const DeviceMatrix& m, int64_t tokens) {
  const WeightView& w = m.view;
  const int64_t operand = w.format == Format::kF32 ? 0 : tokens * w.k * 2,
                operands = w.format == Format::kBF16 ? 2 : 1;
  const int64_t panel = m.tiled ? panel_rows(w) * w.k * 2 : 0;
  return kWorkspace + operands * aligned(operand) + aligned(panel);
}

void DenseCuda::product_f16(const void* x, const DeviceMatrix& w, const float* residual, float* y,
                            int64_t tokens, std::byte* panel) {
  const int64_t n = w.view.n, k = w.view.k;
  if (residual && residual != y) copy_cuda(residual, y, tokens * n, stream_);
  const bool add = residual != nullptr;
  if (!w.tiled) return library_->product(CUDA_R_16F, x, w.view.data, y, tokens, n, k, n, add);
  for (int64_t i = 0; i < n; i += panel_rows(w.view)) {
    const int64_t rows = std::min(panel_rows(w.view), n - i);
    dequantize_rows_cuda(w, i, i + rows, panel, stream_);
    library_->product(CUDA_R_16F, x, panel, y + i, tokens, rows, k, n, add);
  }
}

void DenseCuda::norm_linear(const float* x, const float* gain, float eps, const DeviceMatrix& w,
                            const float* residual, float* y, int64_t tokens, std::byte* scratch) {
  if (tokens == 0) return;
  const int64_t k = w.view.k;
  check(cublasSetWorkspace(library_->handle, scratch, kWorkspace), "cublasSetWorkspace");
  std::byte* operand = scratch + kWorkspace;
  rms_norm_f16_cuda({x, gain, nullptr, tokens, k, eps}, operand, k, stream_);
  product_f16(operand, w, residual, y, tokens, operand + aligned(tokens * k * 2));
}

void DenseCuda::linear_f16(const void* x, const DeviceMatrix& w, const float* residual, float* y,
                           int64_t tokens, std::byte* scratch) {
  if (tokens == 0) return;
  check(cublasSetWorkspace(library_->handle, scratch, kWorkspace), "cublasSetWorkspace");
  product_f16(x, w, residual, y, tokens, scratch + kWorkspace + aligned(tokens * w.view.k * 2));
}

void DenseCuda::linear(const float* x, const DeviceMatrix& w, const float* residual, float* y, int64_t tokens,
                       std::byte* scratch) {
  if (tokens == 0) return;
  const int64_t n = w.view.n, k = w.view.k;
  check(cublasSetWorkspace(library_->handle, scratch, kWorkspace), "cublasSetWorkspace");
  std::byte* operand = scratch + kWorkspace;
  if (multiplies_f16(w)) {
    to_f16_cuda(x, tokens, k, operand, k, stream_);
    return product_f16(operand, w, residual, y, tokens, operand + aligned(tokens * k * 2));
  }
  if (residual && residual != y) copy_cuda(residual, y, tokens * n, stream_);
  const bool add = residual != nullptr;
  if (w.view.format == Format::kF32) {
    library_->product(CUDA_R_32F, x, w.view.data, y, tokens, n, k, n, add);
  } else {
    std::byte* low = operand + aligned(tokens * k * 2);
    to_bf16_pair_cuda(x, tokens, k, operand, low, stream_);
    library_->product(CUDA_R_16BF, operand, w.view.data, y, tokens, n, k, n, add);
    library_->product(CUDA_R_16BF, low, w.view.data, y, tokens, n, k, n, true);
  }
}

}  // namespace q4s
