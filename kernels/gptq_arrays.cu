// Whole-array passes of the quantiser on the GPU: conversions, column orders, the frame of a factorisation.
// kernels/gptq_steps.h.
#include <algorithm>

#include "kernels/gptq_device.cuh"
#include "kernels/gptq_steps.h"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;
constexpr float kMostHalf = 65504.0f;

// Rows over blockIdx.y in strides, columns over blockIdx.x.
dim3 grid_of(int64_t n, int64_t k) {
  return dim3(unsigned(ceil_div(k, kThreads)), unsigned(std::max<int64_t>(1, std::min<int64_t>(n, 8192))));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const float* h, const int32_t* order, T* a, T* b, int64_t k) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    a[i * k + j] = T(h[int64_t(order[k - 1 - i]) * k + order[k - 1 - j]]);
    b[i * k + j] = T(i == j);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) end_kernel(const T* b, float* u, int* bad, int64_t k) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    const float v = j < i ? 0.0f : float(b[(k - 1 - i) * k + (k - 1 - j)]);
    u[i * k + j] = v;
    if (!isfinite(v)) *bad = 1;
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const float* in, const int32_t* index, float* out, int64_t n, int64_t k, bool add) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  const int64_t from = index[j];
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y)
    out[i * k + j] = add ? out[i * k + j] + in[i * k + from] : in[i * k + from];
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const uint8_t* from, const int32_t* index, uint8_t* to, int64_t n, int64_t bytes) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= bytes) return;
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) to[index[i] * bytes + j] = from[i * bytes + j];
}

__global__ void __launch_bounds__(kThreads)
    clear_kernel(float* w, const uint8_t* dead, int64_t n, int64_t k) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k || !dead[j]) return;
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) w[i * k + j] = 0.0f;
}

__global__ void __launch_bounds__(kThreads) mirror_kernel(float* h, int64_t k) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t x = int64_t(blockIdx.x) * kTile, y = int64_t(blockIdx.y) * kTile;  // of the upper source
  if (x < y) return;
  const int c = threadIdx.x % kTile;
  for (int r = threadIdx.x / kTile; r < kTile; r += kThreads / kTile)
    if (y + r < k && x + c < k) tile[r][c] = h[(y + r) * k + x + c];
  __syncthreads();
  for (int r = threadIdx.x / kTile; r < kTile;
       r += kThreads / kTile)  // row x + r, column y + c of the lower half
    if (x + r < k && y + c < k && x + r > y + c) h[(x + r) * k + y + c] = tile[c][r];
}

__global__ void __launch_bounds__(kThreads) diagonal_kernel(float* h, float* diagonal, int64_t k, bool set) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  if (set)
    h[j * (k + 1)] = diagonal[j];
  else
    diagonal[j] = h[j * (k + 1)];
}

__global__ void __launch_bounds__(kThreads)
    finite_kernel(const float* v, int64_t count, float limit, int* bad) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads)
    if (!(fabsf(v[i]) <= limit)) *bad = 1;
}

__device__ __forceinline__ __half clamped(float v) {
  return __float2half_rn(v != v ? v : fminf(fmaxf(v, -kMostHalf), kMostHalf));  // NaN is to be seen
}

__global__ void __launch_bounds__(kThreads) half_kernel(const float* x, const float* minus, float scale,
                                                        int64_t tokens, int64_t k, __half* y, int64_t ld) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= ld) return;
  for (int64_t t = blockIdx.y; t < tokens; t += gridDim.y) {
    float v = 0;
    if (j < k) v = scale * (minus ? x[t * k + j] - minus[t * k + j] : x[t * k + j]);
    y[t * ld + j] = clamped(v);
  }
}

// The same where rows follow each other without a gap, `count` a multiple of 4 in all.
template <bool kMinus>
__global__ void __launch_bounds__(kThreads)
    half_flat_kernel(const float* x, const float* minus, float scale, int64_t count, __half* y) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count / 4; i += stride) {
    float4 v = reinterpret_cast<const float4*>(x)[i];
    if (kMinus) {
      const float4 m = reinterpret_cast<const float4*>(minus)[i];
      v = make_float4(v.x - m.x, v.y - m.y, v.z - m.z, v.w - m.w);
    }
    __half2 h[2] = {{clamped(scale * v.x), clamped(scale * v.y)},
                    {clamped(scale * v.z), clamped(scale * v.w)}};
    reinterpret_cast<uint2*>(y)[i] = *reinterpret_cast<uint2*>(h);
  }
}

}  // namespace

void gptq_factor_begin_cuda(const float* h, const int32_t* order, float* a, float* b, int64_t k,
                            cudaStream_t stream) {
  launch("factor", begin_kernel<float>, grid_of(k, k), kThreads, 0, 1, false, stream, h, order, a, b, k);
}
void gptq_factor_begin_cuda(const float* h, const int32_t* order, double* a, double* b, int64_t k,
                            cudaStream_t stream) {
  launch("factor", begin_kernel<double>, grid_of(k, k), kThreads, 0, 1, false, stream, h, order, a, b, k);
}
void gptq_factor_end_cuda(const float* b, float* u, int* bad, int64_t k, cudaStream_t stream) {
  launch("factor", end_kernel<float>, grid_of(k, k), kThreads, 0, 1, false, stream, b, u, bad, k);
}
void gptq_factor_end_cuda(const double* b, float* u, int* bad, int64_t k, cudaStream_t stream) {
  launch("factor", end_kernel<double>, grid_of(k, k), kThreads, 0, 1, false, stream, b, u, bad, k);
}
void gptq_gather_columns_cuda(const float* in, const int32_t* index, float* out, int64_t n, int64_t k,
                              bool add, cudaStream_t stream) {
  launch("columns", gather_kernel, grid_of(n, k), kThreads, 0, 1, false, stream, in, index, out, n, k, add);
}
void gptq_scatter_rows_cuda(const void* from, const int32_t* index, void* to, int64_t n, int64_t bytes,
                            cudaStream_t stream) {
  launch("rows", scatter_kernel, grid_of(n, bytes), kThreads, 0, 1, false, stream,
         static_cast<const uint8_t*>(from), index, static_cast<uint8_t*>(to), n, bytes);
}
void gptq_clear_columns_cuda(float* w, const uint8_t* dead, int64_t n, int64_t k, cudaStream_t stream) {
  launch("columns", clear_kernel, grid_of(n, k), kThreads, 0, 1, false, stream, w, dead, n, k);
}
void gptq_mirror_cuda(float* h, int64_t k, cudaStream_t stream) {
  const unsigned tiles = unsigned(ceil_div(k, kTile));
  launch("mirror", mirror_kernel, dim3(tiles, tiles), kThreads, 0, 1, false, stream, h, k);
}
void gptq_diagonal_cuda(float* h, float* diagonal, int64_t k, bool set, cudaStream_t stream) {
  launch("diagonal", diagonal_kernel, unsigned(ceil_div(k, kThreads)), kThreads, 0, 1, false, stream, h,
         diagonal, k, set);
}
void gptq_finite_cuda(const float* v, int64_t count, float limit, int* bad, cudaStream_t stream) {
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(count, kThreads), 2048));
  launch("finite", finite_kernel, blocks, kThreads, 0, 1, false, stream, v, count, limit, bad);
}
void gptq_to_half_cuda(const float* x, const float* minus, float scale, int64_t tokens, int64_t k, void* y,
                       int64_t ld, cudaStream_t stream) {
  __half* to = static_cast<__half*>(y);
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(minus)) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(y) % 8 == 0;
  if (k == ld && tokens * k % 4 == 0 && aligned) {
    const int64_t count = tokens * k;
    const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(count, 4 * kThreads), 1 << 16));
    if (blocks == 0) return;
    launch("to_half", minus ? half_flat_kernel<true> : half_flat_kernel<false>, blocks, kThreads, 0, 1, false,
           stream, x, minus, scale, count, to);
    return;
  }
  launch("to_half", half_kernel, grid_of(tokens, ld), kThreads, 0, 1, false, stream, x, minus, scale, tokens,
         k, to, ld);
}

}  // namespace q4s
