// The portable kernel of linear_q4_gemm.h (sm_80 and up; any group that is a multiple of 32 or a whole row;
// int4 and int8). mma.sync m16n8k16 with the weights as A; activations and weights through a ring of cp.async
// stages, weights copied by the lanes that use them. K may be split over blocks: the last to arrive at a tile
// sums the parts in the order of K.
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
constexpr int kStageBytes = kColumns * 128 + kRows* kQ4TileCols* kBits / 8;

template <int kColumns, int kBits>
__global__ void __launch_bounds__(kThreads) q4_gemm_mma_kernel(const __grid_constant__ Params p) {
  // A stage: (columns, 64) halves, 16-byte pieces swizzled by column % 8, then tiles of codes as they are in
  // memory.
  constexpr int kStage = kStageBytes<kColumns, kBits>, kParts = kBits / 4;  // of 512 bytes, of a tile
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

  const uint32_t codes =
      base + kColumns * 128 + (warp * kTilesPerWarp * kParts * 32 + lane) * 16;  // of this lane
  const auto fetch = [&](int kt) {  // one commit group, empty beyond the end
    const uint32_t stage = kt % kStages * kStage;
    if (kt < end) {
      for (int i = threadIdx.x; i < kColumns * 8; i += kThreads) {
        const int column = i / 8, piece = i % 8, token = token0 + column;
        const bool valid = token < p.sink.tokens;
        copy_or_zero(base + stage + column * 128 + (piece ^ column % 8) * 16,
                     p.x + (valid ? token : 0) * p.pitch + kt * kQ4TileCols + piece * 8, valid);
      }
#pragma unroll
      for (int i = 0; i < kTilesPerWarp * kParts; ++i) {
        const int tile = tile0 + i / kParts;
        const bool valid = tile < p.n_tiles;
        const int64_t at = (int64_t(valid ? tile : 0) * p.k_tiles + kt) * kParts + i % kParts;
        copy_or_zero(codes + stage + i * kQ4TileBytes, p.codes + at * kQ4TileBytes + lane * 16, valid);
      }
    }
    copy_commit();
  };

  // Of rows g and g + 8, for the two halves of a tile of K: a group may have 32 columns. A tile ahead.
  __half scales[kTilesPerWarp][2][2];
  const auto load_scales = [&](int kt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = min((kt * kQ4TileCols + half * 32) / p.group, p.groups - 1);
#pragma unroll
      for (int i = 0; i < kTilesPerWarp; ++i) {
        const __half* const from =
            p.scales + (int64_t(min(tile0 + i, p.n_tiles - 1)) * p.groups + group) * 16 + g;
        scales[i][half][0] = __ldg(from), scales[i][half][1] = __ldg(from + 8);
      }
    }
  };

  float acc[kTilesPerWarp][kColumns / 8][4] = {};
  load_scales(begin);
  for (int s = 0; s < kStages - 1; ++s) fetch(begin + s);
  for (int kt = begin; kt < end; ++kt) {
    copy_wait<kStages - 2>();
    __syncthreads();  // the stage is visible to all, and all are done with the one about to be overwritten
    fetch(kt + kStages - 1);
    const uint32_t stage = kt % kStages * kStage;
    std::conditional_t<kBits == 4, Q4Fragment, Q8Fragment> f[kTilesPerWarp][2];
#pragma unroll
    for (int i = 0; i < kTilesPerWarp * 2; ++i)
      f[i / 2][i % 2].set(scales[i / 2][i % 2][0], scales[i / 2][i % 2][1], p.half_grid);
    load_scales(kt + 1);
    uint4 v[kTilesPerWarp][kParts];
#pragma unroll
    for (int i = 0; i < kTilesPerWarp * kParts; ++i)
      v[i / kParts][i % kParts] = load_shared_16(codes + stage + i * kQ4TileBytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[kTilesPerWarp][4];
#pragma unroll
      for (int i = 0; i < kTilesPerWarp; ++i) {
        const uint4& w = v[i][j / 2 % kParts];
        if constexpr (kBits == 4)
          f[i][j / 2].unpack(j == 0 ? w.x : j == 1 ? w.y : j == 2 ? w.z : w.w, a[i]);
        else
          f[i][j / 2].unpack(j % 2 ? w.z : w.x, j % 2 ? w.w : w.y, a[i]);
      }
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        // Four 8x8 blocks: columns c.. and c+8.., each with k 0-7 and 8-15 of this step.
        const int column_in = c + lane / 16 * 8 + lane % 8, piece = 2 * j + lane / 8 % 2;
        uint32_t b[4];
        load_matrices<false>(b, base + stage + column_in * 128 + (piece ^ column_in % 8) * 16);
#pragma unroll
        for (int i = 0; i < kTilesPerWarp; ++i) {
          mma_16816(acc[i][c / 8], a[i], b[0], b[1]);
          mma_16816(acc[i][c / 8 + 1], a[i], b[2], b[3]);
        }
      }
    }
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

template <int kColumns, int kBits>
void start(const Params& p, const Q4GemmConfig& c, bool pdl, cudaStream_t stream) {
  const dim3 grid(unsigned(c.row_blocks), unsigned(c.column_blocks), unsigned(c.splits));
  launch("q4_gemm_mma", q4_gemm_mma_kernel<kColumns, kBits>, grid, kThreads,
         kStages * kStageBytes<kColumns, kBits>, 1, pdl, stream, p);
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
  const bool wide = c.columns != 16;
  if (a.w.bits == 4)
    wide ? start<64, 4>(p, c, a.pdl, stream) : start<16, 4>(p, c, a.pdl, stream);
  else
    wide ? start<64, 8>(p, c, a.pdl, stream) : start<16, 8>(p, c, a.pdl, stream);
}

}  // namespace q4s
