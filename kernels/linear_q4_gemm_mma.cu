// The portable kernel of linear_q4_gemm.h (sm_80 and up; any group that is a multiple of 32 or a whole row;
// int4 and int8). mma.sync m16n8k16 with the weights as A, straight from global memory into registers one
// k-tile ahead; activations through a ring of cp.async stages. K may be split over blocks: the last to arrive
// at a tile sums the parts in the order of K.
#include <type_traits>

#include "kernels/cuda_check.h"
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_fragment.cuh"
#include "kernels/linear_q4_gemm_mma.cuh"
#include "kernels/pdl.cuh"
#include "kernels/shared_halves.cuh"

namespace q4s {
namespace {

constexpr int kRows = 128, kWarps = 4, kThreads = kWarps * 32;
constexpr int kTilesPerWarp = kRows / 16 / kWarps;
constexpr int kStages = 4;
constexpr int kCounterBytes = 4096;

struct Params {
  Q4GemmSink sink;
  const uint8_t* codes;
  const __half* scales;
  const __half* x;
  int64_t pitch;
  int k_tiles, n_tiles, groups, splits, group;
  bool half_grid;
  float* partial;  // (tiles, splits, kTilesPerWarp, regs, kThreads)
  int* arrived;    // (tiles), zero before and after
};

template <int kColumns, int kBits>
__global__ void __launch_bounds__(kThreads) q4_gemm_mma_kernel(const __grid_constant__ Params p) {
  constexpr int kStageBytes = kColumns * 128;  // (columns, 64) halves, 16-byte pieces swizzled by column % 8
  constexpr int kRegs = kColumns / 2;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  pdl_trigger();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int token0 = blockIdx.y * kColumns, split = blockIdx.z;
  const int tile0 = blockIdx.x * (kRows / 16) + warp * kTilesPerWarp;
  const int begin = int(int64_t(p.k_tiles) * split / p.splits);
  const int end = int(int64_t(p.k_tiles) * (split + 1) / p.splits);
  pdl_wait();

  const auto fetch = [&](int kt) {  // one commit group, empty beyond the end
    if (kt < end)
      for (int i = threadIdx.x; i < kColumns * 8; i += kThreads) {
        const int column = i / 8, piece = i % 8, token = token0 + column;
        const bool valid = token < p.sink.tokens;
        copy_or_zero(base + kt % kStages * kStageBytes + column * 128 + (piece ^ column % 8) * 16,
                     p.x + (valid ? token : 0) * p.pitch + kt * kQ4TileCols + piece * 8, valid);
      }
    copy_commit();
  };
  constexpr int kParts = kBits / 4;  // of 512 bytes, of a tile
  const auto load_codes = [&](int kt, uint4(&w)[kTilesPerWarp][kParts]) {
    for (int i = 0; i < kTilesPerWarp; ++i) {
      const bool valid = kt < end && tile0 + i < p.n_tiles;
      const uint8_t* from =
          p.codes + (int64_t(tile0 + i) * p.k_tiles + kt) * (kQ4TileBytes * kParts) + lane * 16;
      for (int part = 0; part < kParts; ++part)
        w[i][part] = valid ? __ldg(reinterpret_cast<const uint4*>(from + part * kQ4TileBytes))
                           : make_uint4(0, 0, 0, 0);
    }
  };

  float acc[kTilesPerWarp][kColumns / 8][4] = {};
  uint4 codes[kTilesPerWarp][kParts], next[kTilesPerWarp][kParts];
  load_codes(begin, codes);
  for (int s = 0; s < kStages - 1; ++s) fetch(begin + s);
  for (int kt = begin; kt < end; ++kt) {
    copy_wait<kStages - 2>();
    __syncthreads();  // the stage is visible to all, and all are done with the one about to be overwritten
    fetch(kt + kStages - 1);
    load_codes(kt + 1, next);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[kTilesPerWarp][4];
      const int column = kt * kQ4TileCols + j * 16, group = min(column / p.group, p.groups - 1);
#pragma unroll
      for (int i = 0; i < kTilesPerWarp; ++i) {
        std::conditional_t<kBits == 4, Q4Fragment, Q8Fragment> f;
        const int n_tile = min(tile0 + i, p.n_tiles - 1);
        f.set(p.scales + (int64_t(n_tile) * p.groups + group) * 16 + g, p.half_grid);
        const uint4& v = codes[i][j / 2 % kParts];
        if constexpr (kBits == 4)
          f.unpack(j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w, a[i]);
        else
          f.unpack(j % 2 ? v.z : v.x, j % 2 ? v.w : v.y, a[i]);
      }
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        // Four 8x8 blocks: columns c.. and c+8.., each with k 0-7 and 8-15 of this step.
        const int column_in = c + lane / 16 * 8 + lane % 8, piece = 2 * j + lane / 8 % 2;
        uint32_t b[4];
        load_matrices<false>(
            b, base + kt % kStages * kStageBytes + column_in * 128 + (piece ^ column_in % 8) * 16);
#pragma unroll
        for (int i = 0; i < kTilesPerWarp; ++i) {
          mma_16816(acc[i][c / 8], a[i], b[0], b[1]);
          mma_16816(acc[i][c / 8 + 1], a[i], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTilesPerWarp; ++i)
#pragma unroll
      for (int part = 0; part < kParts; ++part) codes[i][part] = next[i][part];
  }

  if (p.splits > 1) {
    const int tile = blockIdx.y * gridDim.x + blockIdx.x;
    constexpr int kPart = kTilesPerWarp * kRegs * kThreads;
    float* parts = p.partial + int64_t(tile) * p.splits * kPart + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTilesPerWarp * kRegs; ++i)
      __stcg(parts + int64_t(split) * kPart + i * kThreads, acc[i / kRegs][i % kRegs / 4][i % 4]);
    __threadfence();
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(p.arrived + tile, 1) == p.splits - 1;
      if (last) p.arrived[tile] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!last) return;
#pragma unroll
    for (int i = 0; i < kTilesPerWarp * kRegs; ++i) {
      float sum = 0;
      for (int s = 0; s < p.splits; ++s) sum += __ldcg(parts + int64_t(s) * kPart + i * kThreads);
      acc[i / kRegs][i % kRegs / 4][i % 4] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < kTilesPerWarp; ++i) {
    float flat[kRegs];
#pragma unroll
    for (int r = 0; r < kRegs; ++r) flat[r] = acc[i][r / 4][r % 4];
    sink_tile(p.sink, tile0 + i, token0, lane, flat);
  }
}

template <int kColumns>
void start(const Params& p, const Q4GemmConfig& c, const Q4GemmArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned(c.row_blocks), unsigned(c.column_blocks), unsigned(c.splits));
  launch("q4_gemm_mma", a.w.bits == 4 ? q4_gemm_mma_kernel<kColumns, 4> : q4_gemm_mma_kernel<kColumns, 8>,
         grid, kThreads, kStages * kColumns * 128, 1, a.pdl, stream, p);
}

}  // namespace

void q4_gemm_mma_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  Params p = {};
  p.sink = q4_gemm_sink(a);
  p.codes = a.codes;
  p.scales = reinterpret_cast<const __half*>(a.scales);
  p.x = reinterpret_cast<const __half*>(a.x);
  p.pitch = q4_gemm_pitch(a.w.k);
  p.k_tiles = int(a.w.k_tiles()), p.n_tiles = int(a.w.n_tiles()), p.groups = int(a.w.groups());
  p.splits = c.splits;
  p.group = int(p.groups == 1 ? p.pitch : a.w.group);
  p.half_grid = a.grid == Grid::kHalf;
  p.arrived = reinterpret_cast<int*>(a.workspace);
  p.partial = reinterpret_cast<float*>(a.workspace + kCounterBytes);
  if (c.columns == 16)
    start<16>(p, c, a, stream);
  else
    start<64>(p, c, a, stream);
}

}  // namespace q4s
