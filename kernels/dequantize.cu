// Rows of a weight in tiles as fp16, for the library's products: the oracle of the int4 kernels, and their
// fallback. A thread makes 16 neighbouring columns of a row: what four lanes hold of one step of a tile.
#include <cuda_fp16.h>

#include "kernels/linear.h"
#include "kernels/pdl.cuh"
#include "kernels/weight_value.cuh"

namespace q4s {
namespace {

constexpr int kThreads = 128, kColumns = 16;

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
        v[column] = __float2half_rn(scale * (float(word >> (high + i / 2 * 2 + i % 2 * 4) * 4 & 15) - offset));
      } else if (l.bits == 8) {
        const int8_t code = int8_t(codes[((tile * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + high * 4 + i]);
        v[column] = __float2half_rn(scale * float(code));
      } else {
        v[column] = *reinterpret_cast<const __half*>(codes + ((tile * 4 + step) * 32 + lane) * 16 + i / 2 * 8 +
                                                     high * 4 + i % 2 * 2);
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
  const dim3 grid(unsigned(end - begin), unsigned(ceil_div(m.view.k, kThreads * kColumns)));
  launch("dequantize", dequantize_kernel, grid, kThreads, 0, 1, true, stream, m, begin,
         static_cast<__half*>(out));
}

}  // namespace q4s
