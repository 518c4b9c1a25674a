// One element of a weight in device memory as f32: the value that dequantize_rows() gives on the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/device_matrix.h"

namespace q4s {

// Where row n of the file is packed: the inverse of Q4Layout::file_row.
__device__ __forceinline__ int64_t q4_packed_row(const Q4Layout& l, int64_t n) {
  if (l.map == RowMap::kPairHalves) {
    const int64_t half = l.n / 2, i = n < half ? n : n - half;
    return i / 8 * 16 + i % 8 + (n < half ? 0 : 8);
  }
  if (l.map == RowMap::kRope && n < l.rotated) {
    const int64_t half = l.head_dim / 2, r = n % l.head_dim, i = r < half ? r : r - half;
    return n - r + i / 8 * 16 + i % 8 + (r < half ? 0 : 8);
  }
  return n;
}

// Element (n, j) of a weight in tiles.
__device__ __forceinline__ float tile_value(const TiledWeight& w, int64_t n, int64_t j) {
  const Q4Layout& l = w.layout;
  const int64_t p = q4_packed_row(l, n), tile = p / 16 * l.k_tiles() + j / 64;
  const int r = int(p % 16), high = r / 8, c = int(j % 16), lane = r % 8 * 4 + c % 8 / 2,
            step = int(j % 64 / 16);
  const int value = c / 8 * 2 + c % 2;  // which of the lane's columns 2t, 2t+1, 2t+8, 2t+9
  if (l.bits == 16)
    return __half2float(*reinterpret_cast<const __half*>(w.codes + ((tile * 4 + step) * 32 + lane) * 16 +
                                                         value / 2 * 8 + high * 4 + value % 2 * 2));
  const float scale = __half2float(__ushort_as_half(w.scales[(p / 16 * l.groups() + j / l.group) * 16 + r]));
  if (l.bits == 8)
    return scale *
           float(int8_t(w.codes[((tile * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + high * 4 + value]));
  const uint32_t word = reinterpret_cast<const uint32_t*>(w.codes)[(tile * 32 + lane) * 4 + step];
  const int nibble = high + c / 8 * 2 + c % 2 * 4;
  return scale * (float(word >> nibble * 4 & 15) - (w.grid == Grid::kInt ? 8.f : 7.5f));
}

__device__ __forceinline__ float weight_value(const DeviceMatrix& m, int64_t n, int64_t j) {
  if (m.tiled) return tile_value(m.tiles, n, j);
  const int64_t i = n * m.view.k + j;
  switch (m.view.format) {
    case Format::kF32: return reinterpret_cast<const float*>(m.view.data)[i];
    case Format::kF16: return __half2float(reinterpret_cast<const __half*>(m.view.data)[i]);
    default:  // kBF16
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(m.view.data)[i]);
  }
}

}  // namespace q4s
