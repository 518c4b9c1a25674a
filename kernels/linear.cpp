// The definition of linear.h, and its fast path: panels of kPanel rows unpacked to f32, each a dense product.
// Threads take whole panels, so that no sum depends on their number.
#include "kernels/linear.h"

#include <cstring>
#include <vector>

#include "kernels/cpu_kernels.h"

#if Q4S_BLAS
#include <cblas.h>
#endif

namespace q4s {
namespace {

constexpr int64_t kPanel = 64;  // rows

// y (T, n) of row stride ld: y (+)= x (T, K) * w (n, K)^T.
void dense(const float* x, const float* w, float* y, int64_t tokens, int64_t n, int64_t k, int64_t ld,
           bool add) {
#if Q4S_BLAS
  // Our pool brings the threads; OpenBLAS (pthread build: safe to call from many) must not bring its own.
  static const bool single = (openblas_set_num_threads(1), true);
  (void)single;
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(tokens), int(n), int(k), 1.f, x, int(k), w, int(k),
              add ? 1.f : 0.f, y, int(ld));
#else
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < n; ++i) {
      constexpr int kLanes = 16;  // independent sums, which the compiler turns into vectors
      float lane[kLanes] = {};
      const float *a = x + t * k, *b = w + i * k;
      int64_t j = 0;
      for (; j + kLanes <= k; j += kLanes)
        for (int l = 0; l < kLanes; ++l) lane[l] += a[j + l] * b[j + l];
      float sum = 0;
      for (; j < k; ++j) sum += a[j] * b[j];
      for (float v : lane) sum += v;
      y[t * ld + i] = add ? y[t * ld + i] + sum : sum;
    }
#endif
}

int64_t panel_bytes(const WeightView& w) { return round_up(kPanel * w.k * 4, 64); }

enum class Path { kDot, kVector, kMatrix, kPanel };

// By shape only, never by the number of threads.
Path path_of(const WeightView& w, int64_t tokens) {
  constexpr int64_t kFewDots = 4, kFewVectors = 4;
  if (w.format == Format::kF32 || w.format == Format::kF16 || w.format == Format::kBF16)
    return tokens <= kFewDots ? Path::kDot : Path::kPanel;
  const bool ours = w.format == Format::kQ4 || w.format == Format::kQ8;
  const bool groups = w.group == 32 || w.group == 64 || w.group % 128 == 0 || w.group >= w.k;
  if (!ours || !groups) return Path::kPanel;
  return tokens <= kFewVectors ? Path::kVector : Path::kMatrix;
}

}  // namespace

void linear_cpu(const LinearArgs& a, Part part) {
  const int64_t n = a.w.n, k = a.w.k;
  std::vector<float> row(k);
  const auto [begin, end] = part.of(n);
  for (int64_t i = begin; i < end; ++i) {
    dequantize_rows(a.w, i, i + 1, row.data());
    for (int64_t t = 0; t < a.tokens; ++t) {
      double sum = a.residual ? a.residual[t * n + i] : 0;
      for (int64_t j = 0; j < k; ++j) sum += double(row[j]) * a.x[t * k + j];
      a.y[t * n + i] = float(sum);
    }
  }
}

size_t linear_scratch_bytes(const WeightView& w, int64_t tokens, int threads) {
  const CpuKernels& kernels = cpu_kernels();
  switch (path_of(w, tokens)) {
    case Path::kDot:
      return 0;
    case Path::kVector:
      return size_t(kernels.token_bytes(w.k) * tokens);
    case Path::kMatrix:
      return size_t(kernels.tile_bytes(w.k) * ceil_div(tokens, kernels.tile) +
                    kernels.panel_bytes(w) * threads);
    case Path::kPanel:
      return size_t(panel_bytes(w)) * size_t(threads);
  }
  return 0;
}

void linear_quantize(const LinearArgs& a, Part part) {
  const CpuKernels& kernels = cpu_kernels();
  const Path path = path_of(a.w, a.tokens);
  if (path == Path::kVector) {
    const auto [begin, end] = part.of(a.tokens);
    kernels.quantize(a, begin, end);
  }
  if (path == Path::kMatrix) {
    const auto [begin, end] = part.of(ceil_div(a.tokens, kernels.tile));
    kernels.quantize_tiles(a, begin, end);
  }
}

void linear(const LinearArgs& a, Part part) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t n = a.w.n;
  switch (path_of(a.w, a.tokens)) {
    case Path::kDot: {
      const auto [begin, end] = part.of(n, 16);
      return kernels.dot_rows(a, begin, end);
    }
    case Path::kVector: {
      const auto [begin, end] = part.of(n, 16);
      return kernels.gemv(a, begin, end);
    }
    case Path::kMatrix: {
      const auto [begin, end] = part.of(n, 16);
      std::byte* panel = a.scratch + kernels.tile_bytes(a.w.k) * ceil_div(a.tokens, kernels.tile);
      return kernels.gemm(a, begin, end, panel + kernels.panel_bytes(a.w) * part.index);
    }
    case Path::kPanel:
      break;
  }
  const auto [begin, end] = part.of(n, kPanel);
  float* panel = reinterpret_cast<float*>(a.scratch + panel_bytes(a.w) * part.index);
  for (int64_t i = begin; i < end; i += kPanel) {
    const int64_t rows = std::min(kPanel, end - i);
    dequantize_rows(a.w, i, i + rows, panel);
    if (a.residual && a.residual != a.y)
      for (int64_t t = 0; t < a.tokens; ++t)
        std::memcpy(a.y + t * n + i, a.residual + t * n + i, size_t(rows) * 4);
    dense(a.x, panel, a.y + i, a.tokens, rows, a.w.k, n, a.residual != nullptr);
  }
}

}  // namespace q4s
