// Launchers of linear_q4_gemm.h: activations to fp16 (with RMSNorm where asked), and the choice of the
// kernel.
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_mma.cuh"
#include "kernels/linear_q4_gemm_sm90_loop.cuh"
#include "kernels/pdl.cuh"
#include "kernels/tensor_map.h"

namespace q4s {
namespace {

constexpr int kRowThreads = 256;

// One block a row. The sum of squares is taken in an order that depends on K alone.
__global__ void __launch_bounds__(kRowThreads)
    q4_gemm_activations_kernel(Q4GemmActivationsArgs a, int64_t pitch) {
  pdl_trigger();
  pdl_wait();
  const float* x = a.x + int64_t(blockIdx.x) * a.k;
  __half* y = reinterpret_cast<__half*>(a.y) + int64_t(blockIdx.x) * pitch;
  float scale = 1.f;
  if (a.gain) {
    __shared__ float sums[kRowThreads / 32];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < a.k; i += kRowThreads) sum += x[i] * x[i];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < kRowThreads / 32; ++i) sum += sums[i];
    scale = 1.f / sqrtf(sum / float(a.k) + a.eps);
  }
  for (int64_t i = 2 * threadIdx.x; i < pitch; i += 2 * kRowThreads) {
    float v[2] = {};
    for (int e = 0; e < 2; ++e)
      if (i + e < a.k) v[e] = a.gain ? a.gain[i + e] * (x[i + e] * scale) : x[i + e];
    *reinterpret_cast<__half2*>(y + i) = __halves2half2(saturated_half(v[0]), saturated_half(v[1]));
  }
}

}  // namespace

void q4_gemm_activations_cuda(const Q4GemmActivationsArgs& a, cudaStream_t stream) {
  launch("q4_gemm_activations", q4_gemm_activations_kernel, dim3(unsigned(a.tokens)), kRowThreads, 0, 1,
         a.pdl, stream, a, q4_gemm_pitch(a.k));
}

Q4Maps q4_gemm_maps(const Q4GemmArgs& a, int rows, int x_columns, int stage_tiles, Q4Operands& operands) {
  const int64_t groups = a.w.groups(), pitch = q4_gemm_pitch(a.w.k), n_tiles = a.w.n_tiles();
  const int64_t row_words = a.w.k_tiles() * (kQ4TileBytes / 4);
  operands.half_grid = a.grid == Grid::kHalf;
  // Tiles of K a group, or one group for all. Exact: k_tiles() < 2^16 (checked), and the error of a
  // reciprocal < 2^-32.
  const int64_t tiles = groups == 1 ? 1 << 16 : a.w.group / kQ4TileCols;
  if (a.w.k_tiles() >= 1 << 16) throw std::runtime_error("q4_gemm: rows longer than 4 million columns");
  operands.tile_groups = tiles > 1 ? uint32_t((int64_t(1) << 32) / tiles + 1) : 0;
  operands.fine = tiles > 1 ? 0 : tiles == 1 ? 1 : 2;
  operands.box_groups = std::max(1, operands.fine * stage_tiles);
  Q4Maps m;
  m.x = tensor_map({CU_TENSOR_MAP_DATA_TYPE_FLOAT16, a.x, pitch, a.tokens, pitch * 2, kQ4TileCols, x_columns,
                    CU_TENSOR_MAP_SWIZZLE_128B});
  m.w = tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT32, a.codes, row_words, n_tiles, row_words * 4,
                    stage_tiles * kQ4TileBytes / 4, rows / 16, CU_TENSOR_MAP_SWIZZLE_NONE});
  m.s = tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT16, a.scales, groups * 16, n_tiles, groups * 32,
                    operands.box_groups * 16, rows / 16, CU_TENSOR_MAP_SWIZZLE_NONE});
  return m;
}

void q4_gemm_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  switch (c.kernel) {
    case Q4GemmKernel::kStream: return q4_gemm_stream_cuda(a, c, stream);
    case Q4GemmKernel::kSplit: return q4_gemm_split_cuda(a, c, stream);
    case Q4GemmKernel::kFew: return q4_gemm_few_cuda(a, c, stream);
    case Q4GemmKernel::kPortable: return q4_gemm_mma_cuda(a, c, stream);
  }
}

}  // namespace q4s
