// split_product.h: the passes around the library's products.
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/block_reduce.cuh"
#include "kernels/pdl.cuh"
#include "kernels/split_product.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;
constexpr int kMostExponent = 100;  // beyond it a row is as good as zero, or overflows in f32 as well
constexpr int64_t kBand = 128;      // rows whose largest of a column one thread looks for

// Bits of |v|: ordered as the values are, what is not a number last.
__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// The power of two that brings values up to `largest` below 1.
__device__ __forceinline__ float scale_for(unsigned largest) {
  if (largest == 0 || largest >= 0x7f800000u) return 1.0f;
  const int exponent = int(largest >> 23) - 126;
  return ldexpf(1.0f, min(max(-exponent, -kMostExponent), kMostExponent));
}

__global__ void __launch_bounds__(kThreads) row_scale_kernel(const float* x, float* scale, int64_t cols) {
  __shared__ unsigned shared[32];
  const float* row = x + blockIdx.x * cols;
  unsigned largest = 0;
  for (int64_t j = threadIdx.x; j < cols; j += kThreads) largest = max(largest, magnitude(row[j]));
  largest = block_max<kThreads>(largest, shared, 0u);
  if (threadIdx.x == 0) scale[blockIdx.x] = scale_for(largest);
}

// The largest of a column in a band of rows, as bits in `scale`, which was zero; a maximum needs no order.
__global__ void __launch_bounds__(kThreads)
    column_largest_kernel(const float* x, float* scale, int64_t rows, int64_t cols) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= cols) return;
  unsigned largest = 0;
  const int64_t begin = int64_t(blockIdx.y) * kBand, end = min(rows, begin + kBand);
  for (int64_t i = begin; i < end; ++i) largest = max(largest, magnitude(x[i * cols + j]));
  atomicMax(reinterpret_cast<unsigned*>(scale) + j, largest);
}
__global__ void __launch_bounds__(kThreads) column_scale_kernel(float* scale, int64_t cols) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j < cols) scale[j] = scale_for(__float_as_uint(scale[j]));
}

// Four columns a thread; what lies past the last one is zero.
__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* x, SplitMatrix s, int64_t padded, int64_t ld) {
  const int64_t j = 4 * (int64_t(blockIdx.x) * kThreads + threadIdx.x);
  if (j >= padded) return;
  const bool whole = s.cols % 4 == 0;  // rows of x are aligned, and end with a four
  float column[4];
  for (int q = 0; q < 4; ++q) column[q] = s.by_column && j + q < s.cols ? s.scale[j + q] : 1.0f;
  for (int64_t i = blockIdx.y; i < s.rows; i += gridDim.y) {
    const float row = s.by_column ? 1.0f : s.scale[i];
    float v[4] = {};
    if (whole && j < s.cols) {
      const float4 f = *reinterpret_cast<const float4*>(x + i * s.cols + j);
      v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
    } else {
      for (int q = 0; q < 4; ++q) v[q] = j + q < s.cols ? x[i * s.cols + j + q] : 0.0f;
    }
    __align__(8) __half high[4], low[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      v[q] *= column[q] * row;
      high[q] = __float2half_rn(v[q]);
      low[q] = __float2half_rn((v[q] - __half2float(high[q])) * kSplitLow);
    }
    *reinterpret_cast<uint2*>(s.high + i * ld + j) = *reinterpret_cast<const uint2*>(high);
    *reinterpret_cast<uint2*>(s.low + i * ld + j) = *reinterpret_cast<const uint2*>(low);
  }
}

__global__ void __launch_bounds__(kThreads)
    unsplit_kernel(float* y, const float* row, const float* column, int64_t m, int64_t n, float alpha,
                   const float* add, float beta) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= n) return;
  const float by = alpha / column[j];
  for (int64_t i = blockIdx.y; i < m; i += gridDim.y) {
    const float v = y[i * n + j] / row[i] * by;
    y[i * n + j] = add ? fmaf(beta, add[i * n + j], v) : v;
  }
}

__global__ void __launch_bounds__(kThreads)
    unsplit_add_kernel(const float* y, const float* row, const float* column, int64_t m, int64_t n,
                       float alpha, float* to, int64_t stride) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= n) return;
  const float by = alpha / column[j];
  for (int64_t i = blockIdx.y; i < m; i += gridDim.y) to[i * stride + j] += y[i * n + j] / row[i] * by;
}

unsigned blocks_of(int64_t columns) { return unsigned(ceil_div(columns, kThreads)); }
unsigned strides_of(int64_t rows) { return unsigned(std::clamp<int64_t>(rows, 1, 8192)); }

}  // namespace

void split_cuda(const float* x, const SplitMatrix& s, cudaStream_t stream) {
  if (s.rows == 0 || s.cols == 0) return;
  if (s.by_column) {
    cuda_check(cudaMemsetAsync(s.scale, 0, size_t(s.cols) * sizeof(float), stream), "split");
    launch("split", column_largest_kernel, dim3(blocks_of(s.cols), unsigned(ceil_div(s.rows, kBand))),
           kThreads, 0, 1, false, stream, x, s.scale, s.rows, s.cols);
    launch("split", column_scale_kernel, blocks_of(s.cols), kThreads, 0, 1, false, stream, s.scale, s.cols);
  } else {
    launch("split", row_scale_kernel, unsigned(s.rows), kThreads, 0, 1, false, stream, x, s.scale, s.cols);
  }
  const int64_t padded = round_up(s.cols, 8);
  launch("split", split_kernel, dim3(blocks_of(ceil_div(padded, 4)), strides_of(s.rows)), kThreads, 0, 1,
         false, stream, x, s, padded, s.ld());
}

void unsplit_cuda(float* y, const float* row, const float* column, int64_t m, int64_t n, float alpha,
                  const float* add, float beta, cudaStream_t stream) {
  if (m == 0 || n == 0) return;
  launch("unsplit", unsplit_kernel, dim3(blocks_of(n), strides_of(m)), kThreads, 0, 1, false, stream, y, row,
         column, m, n, alpha, add, beta);
}

void unsplit_add_cuda(const float* y, const float* row, const float* column, int64_t m, int64_t n,
                      float alpha, float* to, int64_t stride, cudaStream_t stream) {
  if (m == 0 || n == 0) return;
  launch("unsplit", unsplit_add_kernel, dim3(blocks_of(n), strides_of(m)), kThreads, 0, 1, false, stream, y,
         row, column, m, n, alpha, to, stride);
}

}  // namespace q4s
