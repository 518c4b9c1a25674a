// Per-row sums and small systems in f64: the refit of scales and the losses of the report.
// kernels/gptq_steps.h.
#include <limits>

#include "kernels/block_reduce.cuh"
#include "kernels/gptq_device.cuh"
#include "kernels/gptq_steps.h"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 128;
constexpr int kSumThreads = 256;
constexpr size_t kMostShared = 150 * 1024;

// A warp a (row, group).
__global__ void __launch_bounds__(kWarps * 32)
    group_dots_kernel(const float* a, const __half2* levels, const float* over, double* out, int64_t n,
                      int64_t k, int64_t group, int64_t first, int64_t groups, int64_t stride) {
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, count = groups - first;
  if (index >= n * count) return;
  const int64_t row = index / count, g = first + index % count, begin = g * group,
                end = min(k, begin + group);
  double sum = 0;
#pragma unroll 4
  for (int64_t j = begin + threadIdx.x % 32; j < end; j += 32) {
    const float v = over ? a[row * k + j] / over[j] : a[row * k + j];
    sum += double(v) * double(__low2float(levels[row * k + j]));
  }
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) out[row * stride + g] = sum;
}

// s^T M s - 2 b^T s of the block's row; m[j * g + i], i >= j, is the lower triangle.
__device__ double quadratic(const double* m, const double* b, const double* s, int g, double* shared) {
  double sum = 0;
  for (int i = threadIdx.x; i < g; i += kThreads) {
    double row = 0.5 * m[int64_t(i) * g + i] * s[i] - b[i];
    for (int l = 0; l < i; ++l) row += m[int64_t(l) * g + i] * s[l];
    sum += 2.0 * s[i] * row;
  }
  return block_reduce<kThreads>(sum, shared, 0.0, [](double x, double y) { return x + y; });
}

// A block a row. The factorisation works on a copy in shared memory, packed column by column, or in place
// where that would not fit (then both quadratics come first).
__global__ void __launch_bounds__(kThreads)
    refit_kernel(double* matrices, double* vectors, uint16_t* scales, int g, bool packed) {
  extern __shared__ double work[];  // old (g), next (g), rounded (g), then the packed triangle
  __shared__ double reduce[32];
  double* m = matrices + int64_t(blockIdx.x) * g * g;
  double* b = vectors + int64_t(blockIdx.x) * g;
  uint16_t* scale = scales + int64_t(blockIdx.x) * g;
  double *old = work, *next = work + g, *spare = work + 2 * g, *triangle = work + 3 * g;

  for (int i = threadIdx.x; i < g; i += kThreads) {
    old[i] = scale_of(scale[i]);
    if (!(m[int64_t(i) * g + i] > 0.0)) {  // no non-zero level: the old scale stays
      m[int64_t(i) * g + i] = 1.0;
      b[i] = old[i];
    }
    next[i] = b[i];
  }
  __syncthreads();
  const double before = quadratic(m, b, old, g, reduce);

  // Column j of the triangle, from the diagonal down.
  const auto column = [&](int j) -> double* {
    return packed ? triangle + (int64_t(j) * g - int64_t(j) * (j - 1) / 2 - j) : m + int64_t(j) * g;
  };
  // In place, M is needed again below: its strict upper half takes the factor, mirrored.
  if (packed) {
    for (int j = 0; j < g; ++j)
      for (int i = j + threadIdx.x; i < g; i += kThreads) column(j)[i] = m[int64_t(j) * g + i];
  }
  double* diagonal = spare;
  const auto at = [&](int i, int j) -> double& {  // factor, i > j
    return packed ? column(j)[i] : m[int64_t(i) * g + j];
  };
  __syncthreads();
  bool definite = true;
  for (int j = 0; j < g; ++j) {
    for (int i = j + threadIdx.x; i < g; i += kThreads) {
      double s = packed ? column(j)[i] : m[int64_t(j) * g + i];
      for (int l = 0; l < j; ++l) s -= at(i, l) * at(j, l);
      if (i == j)
        diagonal[j] = s;
      else
        at(i, j) = s;
    }
    __syncthreads();
    const double d = diagonal[j];
    definite = definite && d > 0.0;
    const double root = sqrt(d);
    for (int i = j + 1 + threadIdx.x; i < g; i += kThreads) at(i, j) /= root;
    __syncthreads();
    if (threadIdx.x == 0) diagonal[j] = root;
  }
  __syncthreads();
  if (!definite) return;
  for (int i = 0; i < g; ++i) {  // L y = b, then L^T s = y
    if (threadIdx.x == 0) next[i] /= diagonal[i];
    __syncthreads();
    for (int l = i + 1 + threadIdx.x; l < g; l += kThreads) next[l] -= at(l, i) * next[i];
    __syncthreads();
  }
  for (int i = g - 1; i >= 0; --i) {
    if (threadIdx.x == 0) next[i] /= diagonal[i];
    __syncthreads();
    for (int l = threadIdx.x; l < i; l += kThreads) next[l] -= at(i, l) * next[i];
    __syncthreads();
  }
  for (int i = threadIdx.x; i < g; i += kThreads) next[i] = scale_of(scale_bits(float(next[i])));
  __syncthreads();
  if (!(quadratic(m, b, next, g, reduce) < before)) return;
  for (int i = threadIdx.x; i < g; i += kThreads) scale[i] = scale_bits(float(next[i]));
}

__global__ void __launch_bounds__(kSumThreads)
    row_sums_kernel(const float* e, const float* eh, const float* w, const float* wh, RowSums* sums,
                    int64_t k) {
  __shared__ double shared[32];
  const auto add = [](double x, double y) { return x + y; };
  const int64_t row = blockIdx.x * k;
  RowSums s{};
  for (int64_t j = threadIdx.x; j < k; j += kSumThreads) {
    const double v = e[row + j];
    s.error_h += v * eh[row + j];
    s.error_2 += v * v;
    s.error_abs += fabs(v);
    s.error_max = fmaxf(s.error_max, fabsf(e[row + j]));
    if (!w) continue;
    s.weight_h += double(w[row + j]) * wh[row + j];
    s.weight_2 += double(w[row + j]) * w[row + j];
  }
  s.error_h = block_reduce<kSumThreads>(s.error_h, shared, 0.0, add);
  s.error_2 = block_reduce<kSumThreads>(s.error_2, shared, 0.0, add);
  s.error_abs = block_reduce<kSumThreads>(s.error_abs, shared, 0.0, add);
  s.weight_h = block_reduce<kSumThreads>(s.weight_h, shared, 0.0, add);
  s.weight_2 = block_reduce<kSumThreads>(s.weight_2, shared, 0.0, add);
  s.error_max = float(block_max<kSumThreads>(double(s.error_max), shared, 0.0));
  if (threadIdx.x == 0) sums[blockIdx.x] = s;
}

__global__ void __launch_bounds__(kSumThreads)
    distance_kernel(const float* x, const float* x_full, double* sums, int64_t count, int64_t piece) {
  __shared__ double shared[32];
  const auto add = [](double a, double b) { return a + b; };
  const int64_t begin = blockIdx.x * piece, end = min(count, begin + piece);
  double difference = 0, full = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) {
    const double e = double(x_full[i]) - x[i];
    difference += e * e;
    full += double(x_full[i]) * x_full[i];
  }
  difference = block_reduce<kSumThreads>(difference, shared, 0.0, add);
  full = block_reduce<kSumThreads>(full, shared, 0.0, add);
  if (threadIdx.x == 0) sums[2 * blockIdx.x] = difference, sums[2 * blockIdx.x + 1] = full;
}

}  // namespace

void gptq_distance_cuda(const float* x, const float* x_full, double* sums, int64_t count, int64_t piece,
                        cudaStream_t stream) {
  launch("distance", distance_kernel, unsigned(ceil_div(count, piece)), kSumThreads, 0, 1, false, stream, x,
         x_full, sums, count, piece);
}

void gptq_group_dots_cuda(const float* a, const uint16_t* levels, const float* over, double* out, int64_t n,
                          int64_t k, int64_t group, int64_t first, int64_t stride, cudaStream_t stream) {
  const int64_t groups = ceil_div(k, group);
  launch("refit", group_dots_kernel, unsigned(ceil_div(n * (groups - first), kWarps)), kWarps * 32, 0, 1,
         false, stream, a, reinterpret_cast<const __half2*>(levels), over, out, n, k, group, first, groups,
         stride);
}

void gptq_refit_rows_cuda(double* m, double* b, uint16_t* scales, int64_t n, int64_t groups,
                          cudaStream_t stream) {
  const size_t vectors = size_t(3 * groups) * sizeof(double),
               all = vectors + size_t(groups * (groups + 1) / 2) * 8;
  const bool packed = all <= kMostShared;
  launch("refit", refit_kernel, unsigned(n), kThreads, packed ? all : vectors, 1, false, stream, m, b, scales,
         int(groups), packed);
}

void gptq_row_sums_cuda(const float* e, const float* eh, const float* w, const float* wh, RowSums* sums,
                        int64_t n, int64_t k, cudaStream_t stream) {
  launch("losses", row_sums_kernel, unsigned(n), kSumThreads, 0, 1, false, stream, e, eh, w, wh, sums, k);
}

}  // namespace q4s
