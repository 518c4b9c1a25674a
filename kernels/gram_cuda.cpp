#include "kernels/gram_cuda.h"

#include <cublas_v2.h>

#include "kernels/cuda_check.h"

namespace q4s {
namespace {

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": cuBLAS: " + cublasGetStatusString(status));
}

}  // namespace

struct GramCuda::Library {
  cudaStream_t stream = nullptr;
  cublasHandle_t handle = nullptr;
  ~Library() {
    if (handle) cublasDestroy(handle);
    if (stream) (void)cudaStreamDestroy(stream);
  }
};

GramCuda::GramCuda() : library_(std::make_unique<Library>()) {
  cuda_check(cudaStreamCreateWithFlags(&library_->stream, cudaStreamNonBlocking), "stream");
  check(cublasCreate(&library_->handle), "cublasCreate");
  check(cublasSetStream(library_->handle, library_->stream), "cublasSetStream");
  check(cublasSetMathMode(library_->handle, CUBLAS_PEDANTIC_MATH), "cublasSetMathMode");
}

GramCuda::~GramCuda() = default;

void GramCuda::difference(const float* a, const float* b, float* out, int64_t count) {
  const float one = 1, minus = -1;
  check(cublasSgeam(library_->handle, CUBLAS_OP_N, CUBLAS_OP_N, int(count), 1, &one, a, int(count), &minus, b,
                    int(count), out, int(count)),
        "difference");
  cuda_check(cudaStreamSynchronize(library_->stream), "difference");
}

// Row-major is the transpose of the library's: c^T (K, M) += factor * b^T (K, T) a (T, M).
void GramCuda::add(const GptqGramArgs& g) {
  const float one = 1;
  check(cublasSgemm(library_->handle, CUBLAS_OP_N, CUBLAS_OP_T, int(g.k), int(g.m), int(g.tokens), &g.factor, g.b,
                    int(g.k), g.a, int(g.m), &one, g.c, int(g.k)),
        "sum over tokens");
  cuda_check(cudaStreamSynchronize(library_->stream), "sum over tokens");
}

}  // namespace q4s
