// Launchers of linear_q4_gemm.h: activations to fp16 (with RMSNorm where asked), and the choice of the
// kernel.
#include "kernels/block_reduce.cuh"
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_mma.cuh"
#include "kernels/linear_q4_gemm_sm90_loop.cuh"
#include "kernels/pdl.cuh"
#include "kernels/tensor_map.h"

namespace q4s {
namespace {

constexpr int kRowThreads = 256, kHeld = 4;  // columns by fours of a thread that stay in registers

// Four columns, zero from k on.
__device__ float4 four(const float* x, int64_t i, int64_t k, bool aligned) {
  if (aligned && i < k) return *reinterpret_cast<const float4*>(x + i);
  const auto at = [&](int64_t j) { return j < k ? x[j] : 0.f; };
  return make_float4(at(i), at(i + 1), at(i + 2), at(i + 3));
}

// One block a row. The sum of squares is taken in an order that depends on K alone. The gain, which no kernel
// before this one writes, is there when x comes.
__global__ void __launch_bounds__(kRowThreads)
    q4_gemm_activations_kernel(Q4GemmActivationsArgs a, int64_t pitch) {
  __shared__ float shared[32];
  pdl_trigger();
  const float* x = a.x + int64_t(blockIdx.x) * a.k;
  __half* y = reinterpret_cast<__half*>(a.y) + int64_t(blockIdx.x) * pitch;
  const bool aligned = a.k % 4 == 0;
  const int64_t first = 4 * threadIdx.x;
  constexpr int64_t kStep = 4 * kRowThreads;
  float4 v[kHeld], gain[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
    gain[j] = a.gain ? four(a.gain, first + j * kStep, a.k, aligned) : make_float4(1, 1, 1, 1);
  pdl_wait();
#pragma unroll
  for (int j = 0; j < kHeld; ++j) v[j] = four(x, first + j * kStep, a.k, aligned);
  float scale = 1.f;
  if (a.gain) {
    const auto squares = [](const float4& u) { return (u.x * u.x + u.y * u.y) + (u.z * u.z + u.w * u.w); };
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) sum += squares(v[j]);
    for (int64_t i = first + kHeld * kStep; i < a.k; i += kStep) sum += squares(four(x, i, a.k, aligned));
    scale = 1.f / sqrtf(block_sum<kRowThreads>(sum, shared) / float(a.k) + a.eps);
    if (a.guess && threadIdx.x == 0) a.guess[blockIdx.x] = scale * kQ4GemmHeadroom;
  }
  const auto store = [&](int64_t i, const float4& u, const float4& w) {
    if (i >= pitch) return;
    __half2* const to = reinterpret_cast<__half2*>(y + i);
    to[0] = __halves2half2(saturated_half(w.x * (u.x * scale)), saturated_half(w.y * (u.y * scale)));
    to[1] = __halves2half2(saturated_half(w.z * (u.z * scale)), saturated_half(w.w * (u.w * scale)));
  };
#pragma unroll
  for (int j = 0; j < kHeld; ++j) store(first + j * kStep, v[j], gain[j]);
  for (int64_t i = first + kHeld * kStep; i < pitch; i += kStep)
    store(i, four(x, i, a.k, aligned), a.gain ? four(a.gain, i, a.k, aligned) : make_float4(1, 1, 1, 1));
}

}  // namespace

void q4_gemm_activations_cuda(const Q4GemmActivationsArgs& a, cudaStream_t stream) {
  launch("q4_gemm_activations", q4_gemm_activations_kernel, dim3(unsigned(a.tokens)), kRowThreads, 0, 1,
         a.pdl, stream, a, q4_gemm_pitch(a.k));
}

void q4_gemm_weight_maps(const Q4GemmArgs& a, int rows, int stage_tiles, Q4Operands& operands, CUtensorMap& w,
                         CUtensorMap& s) {
  const int64_t groups = a.w.groups(), n_tiles = a.w.n_tiles();
  const int64_t row_words = a.w.k_tiles() * (kQ4TileBytes / 4);
  operands.half_grid = a.grid == Grid::kHalf;
  // Tiles of K a group, or one group for all. Exact: k_tiles() < 2^16 (checked), and the error of a
  // reciprocal < 2^-32.
  const int64_t tiles = groups == 1 ? 1 << 16 : a.w.group / kQ4TileCols;
  if (a.w.k_tiles() >= 1 << 16) throw std::runtime_error("q4_gemm: rows longer than 4 million columns");
  operands.tile_groups = tiles > 1 ? uint32_t((int64_t(1) << 32) / tiles + 1) : 0;
  operands.fine = tiles > 1 ? 0 : tiles == 1 ? 1 : 2;
  operands.box_groups = std::max(1, operands.fine * stage_tiles);
  operands.row_tiles = rows / kQ4TileRows;
  w = tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT32, a.codes, row_words, n_tiles, row_words * 4,
                  stage_tiles * kQ4TileBytes / 4, rows / 16, CU_TENSOR_MAP_SWIZZLE_NONE});
  s = tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT16, a.scales, groups * 16, n_tiles, groups * 32,
                  operands.box_groups * 16, rows / 16, CU_TENSOR_MAP_SWIZZLE_NONE});
}

Q4Maps q4_gemm_maps(const Q4GemmArgs& a, int rows, int x_columns, int stage_tiles, Q4Operands& operands) {
  const int64_t pitch = q4_gemm_pitch(a.w.k);
  Q4Maps m;
  m.x = tensor_map({CU_TENSOR_MAP_DATA_TYPE_FLOAT16, a.x, pitch, a.tokens, pitch * 2, kQ4TileCols, x_columns,
                    CU_TENSOR_MAP_SWIZZLE_128B});
  q4_gemm_weight_maps(a, rows, stage_tiles, operands, m.w, m.s);
  return m;
}

void q4_gemm_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  if (!a.x) throw std::logic_error("q4_gemm: a product without activations");
  switch (c.kernel) {
    case Q4GemmKernel::kStream: return q4_gemm_stream_cuda(a, c, stream);
    case Q4GemmKernel::kSplit: return q4_gemm_split_cuda(a, c, stream);
    case Q4GemmKernel::kFew: return q4_gemm_few_cuda(a, c, stream);
    case Q4GemmKernel::kPortable: return q4_gemm_mma_cuda(a, c, stream);
  }
}

}  // namespace q4s
