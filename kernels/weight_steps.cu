// weight_steps.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gptq_device.cuh"
#include "kernels/pdl.cuh"
#include "kernels/weight_steps.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;

dim3 grid_of(int64_t n, int64_t k) {  // rows over blockIdx.y in strides
  return dim3(unsigned(ceil_div(k, kThreads)), unsigned(std::max<int64_t>(1, std::min<int64_t>(n, 8192))));
}

struct alignas(8) FourHalves {
  uint16_t bits[4];
};

// Four at a time; what is left over one by one.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    widen_kernel(const T* from, float* to, int64_t count, int64_t fours) {
  const int64_t stride = int64_t(gridDim.x) * kThreads, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < fours; i += stride) {
    const FourHalves f = reinterpret_cast<const FourHalves*>(from)[i];
    const T* v = reinterpret_cast<const T*>(f.bits);
    reinterpret_cast<float4*>(to)[i] = make_float4(float(v[0]), float(v[1]), float(v[2]), float(v[3]));
  }
  for (int64_t i = 4 * fours + first; i < count; i += stride) to[i] = float(from[i]);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(float* w, const float* gain, int64_t n, int64_t k) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) w[i * k + j] *= gain[j];
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const float* w, double* sums, int64_t n, int64_t k) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  double sum = 0;
#pragma unroll 16
  for (int64_t i = 0; i < n; ++i) {
    const double v = w[i * k + j];
    sum += v * v;
  }
  sums[j] = sum;
}

__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const float* in, const int32_t* index, float* out, int64_t n, int64_t k) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) out[i * k + j] = in[index[i] * k + j];
}

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const float* in, float* out, int64_t n, int64_t k) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t x = int64_t(blockIdx.x) * kTile, y = int64_t(blockIdx.y) * kTile;
  const int c = threadIdx.x % kTile;
  for (int r = threadIdx.x / kTile; r < kTile; r += kThreads / kTile)
    if (y + r < n && x + c < k) tile[r][c] = in[(y + r) * k + x + c];
  __syncthreads();
  for (int r = threadIdx.x / kTile; r < kTile; r += kThreads / kTile)
    if (x + r < k && y + c < n) out[(x + r) * n + y + c] = tile[c][r];
}

__global__ void __launch_bounds__(kThreads) values_kernel(GptqRoundArgs a, float* out) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.k) return;
  const int64_t groups = (a.k + a.group - 1) / a.group, g = j / a.group;
  for (int64_t i = blockIdx.y; i < a.n; i += gridDim.y)
    out[i * a.k + j] = value_of(a.codes[i * a.k + j], scale_of(a.scales[i * groups + g]), a.levels);
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* codes, uint8_t* out, int64_t n, int64_t k, int bits) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = bits == 4 ? (k + 1) / 2 : k;
  if (j >= stride) return;
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) {
    const uint8_t* row = codes + i * k;
    out[i * stride + j] =
        bits == 4 ? uint8_t(row[2 * j] | (2 * j + 1 < k ? row[2 * j + 1] << 4 : 0)) : uint8_t(row[j] - 128);
  }
}

// In a fixed order: lanes of a warp by halves, then the warps.
template <typename Fn>
__device__ double reduce(double v, double* shared, Fn fn) {
  for (int d = 16; d > 0; d /= 2) v = fn(v, __shfl_xor_sync(~0u, v, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (int i = 1; i < kThreads / 32; ++i) v = fn(v, shared[i]);
  return v;
}

__global__ void __launch_bounds__(kThreads)
    shape_kernel(const float* w, int64_t count, int pass, double mean, double sd, ShapeSums* pieces) {
  __shared__ double shared[kThreads / 32];
  __shared__ int bins[kShapeBins];
  const int64_t begin = blockIdx.x * kShapePiece, size = min(kShapePiece, count - begin);
  const float* x = w + begin;
  ShapeSums& p = pieces[blockIdx.x];
  const auto add = [](double a, double b) { return a + b; };
  if (pass == 2) {
    for (int i = threadIdx.x; i < kShapeBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const double bin = ((x[i] - mean) / sd + 4.0) * kShapeBins / 8.0;
      atomicAdd(&bins[int(fmin(fmax(bin, 0.0), kShapeBins - 1.0))], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kShapeBins; i += kThreads) p.bins[i] = bins[i];
    return;
  }
  double low = x[0], high = x[0], m1 = 0, m2 = 0, m3 = 0, m4 = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    if (pass == 0) {
      low = fmin(low, double(x[i]));
      high = fmax(high, double(x[i]));
      m1 += x[i];
    } else {
      const double d = x[i] - mean, d2 = d * d;
      m2 += d2;
      m3 += d2 * d;
      m4 += d2 * d2;
    }
  }
  if (pass == 0) {
    low = reduce(low, shared, [](double a, double b) { return fmin(a, b); });
    high = reduce(high, shared, [](double a, double b) { return fmax(a, b); });
    m1 = reduce(m1, shared, add);
    if (threadIdx.x == 0) p.low = low, p.high = high, p.m1 = m1;
  } else {
    m2 = reduce(m2, shared, add);
    m3 = reduce(m3, shared, add);
    m4 = reduce(m4, shared, add);
    if (threadIdx.x == 0) p.m2 = m2, p.m3 = m3, p.m4 = m4;
  }
}

}  // namespace

void widen_cuda(const void* from, Format format, float* to, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  const bool aligned =
      reinterpret_cast<uintptr_t>(from) % 8 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  const int64_t fours = aligned ? count / 4 : 0;
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(count, (aligned ? 4 : 1) * kThreads), 1 << 16));
  if (format == Format::kF16)
    launch("widen", widen_kernel<__half>, blocks, kThreads, 0, 1, false, stream,
           static_cast<const __half*>(from), to, count, fours);
  else
    launch("widen", widen_kernel<__nv_bfloat16>, blocks, kThreads, 0, 1, false, stream,
           static_cast<const __nv_bfloat16*>(from), to, count, fours);
}
void scale_columns_cuda(float* w, const float* gain, int64_t n, int64_t k, cudaStream_t stream) {
  launch("scale", scale_kernel, grid_of(n, k), kThreads, 0, 1, false, stream, w, gain, n, k);
}
void column_squares_cuda(const float* w, double* sums, int64_t n, int64_t k, cudaStream_t stream) {
  launch("squares", squares_kernel, unsigned(ceil_div(k, kThreads)), kThreads, 0, 1, false, stream, w, sums,
         n, k);
}
void gather_rows_cuda(const float* in, const int32_t* index, float* out, int64_t n, int64_t k,
                      cudaStream_t stream) {
  launch("gather_rows", gather_rows_kernel, grid_of(n, k), kThreads, 0, 1, false, stream, in, index, out, n,
         k);
}
void transpose_cuda(const float* in, float* out, int64_t n, int64_t k, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(k, kTile)), unsigned(ceil_div(n, kTile)));
  launch("transpose", transpose_kernel, grid, kThreads, 0, 1, false, stream, in, out, n, k);
}
void gptq_values_cuda(const GptqRoundArgs& a, float* out, cudaStream_t stream) {
  launch("values", values_kernel, grid_of(a.n, a.k), kThreads, 0, 1, false, stream, a, out);
}
void gptq_pack_cuda(const uint8_t* codes, uint8_t* out, int64_t n, int64_t k, int bits, cudaStream_t stream) {
  launch("pack", pack_kernel, grid_of(n, k), kThreads, 0, 1, false, stream, codes, out, n, k, bits);
}
void shape_cuda(const float* w, int64_t count, int pass, double mean, double sd, ShapeSums* pieces,
                cudaStream_t stream) {
  if (count == 0) return;
  const unsigned blocks = unsigned(ceil_div(count, kShapePiece));
  cuda_check(cudaMemsetAsync(pieces, 0, blocks * sizeof *pieces, stream), "shape");
  launch("shape", shape_kernel, blocks, kThreads, 0, 1, false, stream, w, count, pass, mean, sd, pieces);
}

}  // namespace q4s
