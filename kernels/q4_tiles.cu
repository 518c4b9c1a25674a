// Device packing into the tiles of q4_tiles.h, from the file's order. One thread makes the 16 bytes of one
// lane, or one scale. Runs once per weight at load: the four lanes of a row read neighbouring bytes, the
// cache does the rest.
#include <cuda_runtime.h>

#include "kernels/cuda_check.h"
#include "kernels/q4_tiles.h"

namespace q4s {
namespace {

constexpr int kThreads = 256;

// Two codes of one byte of the file -> the nibbles 0 and 4 of a word.
__device__ uint32_t spread(uint32_t byte) { return (byte & 15u) | (byte & 0xf0u) << 12; }

__global__ void pack_codes_kernel(Q4Layout l, const uint8_t* from, uint4* to, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t stride = (l.k + 1) / 2, tile = i / 32, k_tiles = l.k_tiles();
  const int lane = int(i % 32);
  const int64_t packed = tile / k_tiles * 16 + lane / 4, column = tile % k_tiles * 64 + lane % 4 * 2;
  const int64_t low = l.file_row(packed), high = l.file_row(packed + 8);
  const auto byte = [&](int64_t row, int64_t c) -> uint32_t {
    if (row < 0 || c >= l.k) return 0x88u;
    const uint32_t b = from[row * stride + c / 2];
    return c + 1 < l.k ? b : (b & 15u) | 0x80u;
  };
  uint32_t word[4];
  for (int j = 0; j < 4; ++j) {
    const int64_t c = column + 16 * j;
    word[j] = spread(byte(low, c)) | spread(byte(high, c)) << 4 | spread(byte(low, c + 8)) << 8 |
              spread(byte(high, c + 8)) << 12;
  }
  to[i] = make_uint4(word[0], word[1], word[2], word[3]);
}

// int8 and fp16: 16 bytes of one lane's piece, gathered in pairs of neighbouring columns.
template <typename Value>
__global__ void pack_wide_kernel(Q4Layout l, const Value* from, Value* to, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  constexpr int kPieces = sizeof(Value) == 1 ? 2 : 4, kValues = 16 / int(sizeof(Value));
  const int64_t tile = i / 32 / kPieces, k_tiles = l.k_tiles();
  const int lane = int(i % 32), piece = int(i / 32 % kPieces);
  for (int v = 0; v < kValues; ++v) {
    const int step = piece * kValues / 8 + v / 8;
    const bool high = sizeof(Value) == 1 ? v & 4 : v & 2, next = sizeof(Value) == 1 ? v & 2 : v & 4;
    const int64_t row = l.file_row(tile / k_tiles * 16 + lane / 4 + (high ? 8 : 0));
    const int64_t c = tile % k_tiles * 64 + step * 16 + lane % 4 * 2 + (next ? 8 : 0) + v % 2;
    to[i * kValues + v] = row < 0 || c >= l.k ? Value(0) : from[row * l.k + c];
  }
}

__global__ void pack_scales_kernel(Q4Layout l, const uint16_t* from, uint16_t* to, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t groups = l.groups(), tile = i / 16 / groups, group = i / 16 % groups;
  const int64_t row = l.file_row(tile * 16 + i % 16);
  to[i] = row < 0 ? uint16_t(0) : from[row * groups + group];
}

unsigned blocks(int64_t count) { return unsigned((count + kThreads - 1) / kThreads); }

}  // namespace

void q4_pack_cuda(const Q4Layout& l, const Q4Source& from, uint8_t* codes, uint16_t* scales,
                  cudaStream_t stream) {
  const int64_t lanes = l.code_bytes() / 16, values = l.scale_bytes() / 2;
  if (l.bits == 4)
    pack_codes_kernel<<<blocks(lanes), kThreads, 0, stream>>>(l, from.codes, reinterpret_cast<uint4*>(codes),
                                                              lanes);
  else if (l.bits == 8)
    pack_wide_kernel<<<blocks(lanes), kThreads, 0, stream>>>(l, from.codes, codes, lanes);
  else
    pack_wide_kernel<<<blocks(lanes), kThreads, 0, stream>>>(l, reinterpret_cast<const uint16_t*>(from.codes),
                                                             reinterpret_cast<uint16_t*>(codes), lanes);
  if (values > 0) pack_scales_kernel<<<blocks(values), kThreads, 0, stream>>>(l, from.scales, scales, values);
  cuda_check(cudaGetLastError(), "q4_pack");
}

}  // namespace q4s
