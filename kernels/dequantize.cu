// Rows of a weight in tiles as fp16, for the library's products: the oracle of the int4 kernels, and their
// fallback. Rows in the file's order: a warp unpacks a tile as its lanes hold it and turns it in shared
// memory. Other orders: a thread makes 16 neighbouring columns of a row, what four lanes hold of one step of
// a tile.
#include <cuda_fp16.h>

#include "kernels/linear.h"
#include "kernels/pdl.cuh"
#include "kernels/weight_value.cuh"

namespace q4s {
namespace {

constexpr int kThreads = 128, kColumns = 16;

constexpr int kTileThreads = 256,
              kPitch = kQ4TileCols + 8;  // pitch: in halves, so that rows meet different banks

// Tile (blockIdx.y * warps + warp, first / 16 + blockIdx.x) of rows that are as in the file.
template <int kBits>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_tile_kernel(DeviceMatrix m, int64_t first, int64_t end, __half* out) {
  __shared__ __align__(16) __half turned[kTileThreads / 32][kQ4TileRows][kPitch];
  pdl_trigger();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const Q4Layout& l = m.tiles.layout;
  const int64_t row0 = first + int64_t(blockIdx.x) * kQ4TileRows,
                k_tile = int64_t(blockIdx.y) * (kTileThreads / 32) + warp;
  pdl_wait();
  if (k_tile >= l.k_tiles()) return;
  constexpr int kLoads = kBits / 4;
  const int64_t n_tile = row0 / kQ4TileRows, tile = n_tile * l.k_tiles() + k_tile;
  const uint4* codes = reinterpret_cast<const uint4*>(m.tiles.codes) + tile * kLoads * 32 + lane;
  __align__(16) uint4 v[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) v[i] = __ldcs(codes + i * 32);
  const float offset = m.tiles.grid == Grid::kInt ? 8.f : 7.5f;
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      float scale = 1;
      if (kBits != 16) {
        const int64_t group = min((k_tile * kQ4TileCols + 16 * step) / l.group, l.groups() - 1);
        scale = __half2float(
            __ushort_as_half(m.tiles.scales[(n_tile * l.groups() + group) * kQ4TileRows + g + 8 * high]));
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // columns 2t and 2t + 1, then those 8 further on
        __half2 value;
        if constexpr (kBits == 4) {
          const uint32_t word = reinterpret_cast<const uint32_t*>(v)[step] >> (high + pair * 2) * 4;
          value = __floats2half2_rn(scale * (float(word & 15) - offset),
                                    scale * (float(word >> 16 & 15) - offset));
        } else if constexpr (kBits == 8) {
          const uint32_t word = reinterpret_cast<const uint32_t*>(v)[step * 2 + high] >> pair * 16;
          value = __floats2half2_rn(scale * float(int8_t(word)), scale * float(int8_t(word >> 8)));
        } else {
          value = reinterpret_cast<const __half2*>(v)[step * 4 + pair * 2 + high];
        }
        *reinterpret_cast<__half2*>(&turned[warp][g + 8 * high][16 * step + 8 * pair + 2 * t]) = value;
      }
    }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kQ4TileRows * 8; i += 32) {
    const int r = i / 8, c = i % 8 * 8;
    const int64_t column = k_tile * kQ4TileCols + c;
    if (row0 + r >= end || column >= l.k) continue;
    __half* to = out + (row0 + r - first) * l.k + column;
    if (l.k % 8 == 0)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&turned[warp][r][c]);
    else
      for (int j = 0; j < 8 && column + j < l.k; ++j) to[j] = turned[warp][r][c + j];
  }
}

__global__ void dequantize_kernel(DeviceMatrix m, int64_t first, __half* out) {
  pdl_trigger();
  const int64_t j = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kColumns, n = first + blockIdx.x;
  const Q4Layout& l = m.tiles.layout;
  pdl_wait();
  if (j >= l.k) return;
  const int64_t p = q4_packed_row(l, n), tile = p / 16 * l.k_tiles() + j / 64;
  const int r = int(p % 16), high = r / 8, step = int(j % 64 / 16);
  float scale = 1;  // of all 16 columns: groups are multiples of 32
  if (l.bits != 16)
    scale = __half2float(__ushort_as_half(m.tiles.scales[(p / 16 * l.groups() + j / l.group) * 16 + r]));
  const float offset = m.tiles.grid == Grid::kInt ? 8.f : 7.5f;
  __align__(16) __half v[kColumns];
#pragma unroll
  for (int t = 0; t < 4; ++t) {  // columns 2t, 2t+1, 2t+8, 2t+9
    const int64_t lane = r % 8 * 4 + t;
    const uint8_t* codes = m.tiles.codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2 + i / 2 * 8;
      if (l.bits == 4) {
        const uint32_t word = reinterpret_cast<const uint32_t*>(codes)[(tile * 32 + lane) * 4 + step];
        v[column] =
            __float2half_rn(scale * (float(word >> (high + i / 2 * 2 + i % 2 * 4) * 4 & 15) - offset));
      } else if (l.bits == 8) {
        const int8_t code =
            int8_t(codes[((tile * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + high * 4 + i]);
        v[column] = __float2half_rn(scale * float(code));
      } else {
        v[column] = *reinterpret_cast<const __half*>(codes + ((tile * 4 + step) * 32 + lane) * 16 +
                                                     i / 2 * 8 + high * 4 + i % 2 * 2);
      }
    }
  }
  __half* to = out + blockIdx.x * l.k + j;
  if (l.k % 8 == 0 && j + kColumns <= l.k) {
    reinterpret_cast<uint4*>(to)[0] = reinterpret_cast<const uint4*>(v)[0];
    reinterpret_cast<uint4*>(to)[1] = reinterpret_cast<const uint4*>(v)[1];
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (j + i < l.k) to[i] = v[i];
  }
}

}  // namespace

void dequantize_rows_cuda(const DeviceMatrix& m, int64_t begin, int64_t end, void* out, cudaStream_t stream) {
  if (begin == end) return;
  const Q4Layout& l = m.tiles.layout;
  if (l.map == RowMap::kPlain && begin % kQ4TileRows == 0) {
    const auto kernel = l.bits == 4   ? dequantize_tile_kernel<4>
                        : l.bits == 8 ? dequantize_tile_kernel<8>
                                      : dequantize_tile_kernel<16>;
    const dim3 tiles(unsigned(ceil_div(end - begin, int64_t(kQ4TileRows))),
                     unsigned(ceil_div(l.k_tiles(), int64_t(kTileThreads / 32))));
    launch("dequantize", kernel, tiles, kTileThreads, 0, 1, true, stream, m, begin, end,
           static_cast<__half*>(out));
    return;
  }
  const dim3 grid(unsigned(end - begin), unsigned(ceil_div(m.view.k, kThreads * kColumns)));
  launch("dequantize", dequantize_kernel, grid, kThreads, 0, 1, true, stream, m, begin,
         static_cast<__half*>(out));
}

}  // namespace q4s
