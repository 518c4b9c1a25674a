// The order of an int4 weight in device memory, read alike by the decode and GEMM kernels.
//
// Tile: 16 rows x 64 columns, 512 bytes; [n_tile][k_tile][lane 0..31][4 words]. Lane l: g = l/4, t = l%4.
// Word j covers columns 64*k_tile + 16*j .. +15; its nibbles, lowest first:
//   0 (g, 2t)   1 (g+8, 2t)   2 (g, 2t+8)   3 (g+8, 2t+8)   4..7 the same at the next column
// so that w & 0x000f000f, w & 0x00f000f0, (w >> 8) & 0x000f000f, (w >> 8) & 0x00f000f0 are the pairs a0a1,
// a2a3, a4a5, a6a7 of a lane's A fragment of mma.m16n8k16, and of a warp's 16 rows of a register-A wgmma.
// Scales: fp16, [n_tile][group][16 rows]. Columns beyond k have code 8 (their activation must be 0), rows
// beyond n code 8 and scale 0.
//
// Packed rows may be permuted, so that values that meet in an epilogue (gate and up; the two of a rotation)
// are rows r and r+8 of one tile: they end in the same thread of the mma's accumulator.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/types.h"

#ifdef __CUDACC__
#define Q4S_HOST_DEVICE __host__ __device__
#else
#define Q4S_HOST_DEVICE
#endif

namespace q4s {

constexpr int kQ4TileRows = 16, kQ4TileCols = 64, kQ4TileBytes = 512;

enum class RowMap : uint8_t {
  kPlain,
  kPairHalves,  // n = 2F: tile j holds gate rows 8j.. and, below them, up rows F+8j..; ceil(F/8) tiles
  kRope,        // within each q or k head tile j holds rows 8j.. and hd/2+8j..; v heads plain; hd % 16 == 0
};

// Shape of one packed matrix. `rotated` is the count of leading rows in rotated heads, (H + Hkv) * head_dim.
struct Q4Layout {
  int64_t n = 0, k = 0;
  int64_t group = 0;  // columns sharing a scale: a multiple of 32, or >= k; the last may be short
  RowMap map = RowMap::kPlain;
  int64_t head_dim = 0, rotated = 0;  // kRope
  int bits = 4;                       // 4, 8 or 16 (no scales)

  Q4S_HOST_DEVICE int64_t n_tiles() const {
    return map == RowMap::kPairHalves ? (n / 2 + 7) / 8 : (n + 15) / 16;
  }
  Q4S_HOST_DEVICE int64_t k_tiles() const { return (k + kQ4TileCols - 1) / kQ4TileCols; }
  Q4S_HOST_DEVICE int64_t groups() const { return bits == 16 ? 0 : (k + group - 1) / group; }
  Q4S_HOST_DEVICE int64_t code_bytes() const { return n_tiles() * k_tiles() * kQ4TileBytes * (bits / 4); }
  Q4S_HOST_DEVICE int64_t scale_bytes() const { return n_tiles() * groups() * kQ4TileRows * 2; }

  // Row of the file at packed row p; -1: padding.
  Q4S_HOST_DEVICE int64_t file_row(int64_t p) const {
    if (map == RowMap::kPairHalves) {
      const int64_t i = p / 16 * 8 + p % 8;
      return i >= n / 2 ? -1 : p % 16 < 8 ? i : n / 2 + i;
    }
    if (map == RowMap::kRope && p < rotated) {
      const int64_t head = p / head_dim, in_head = p % head_dim;
      return head * head_dim + (in_head % 16 < 8 ? 0 : head_dim / 2) + in_head / 16 * 8 + in_head % 8;
    }
    return p < n ? p : -1;
  }
};

// A matrix in the file's canonical order: what is packed.
struct Q4Source {
  const uint8_t* codes;  // (n, (k+1)/2) two codes a byte, even column in the low nibble; (n, k) int8 or fp16
  const uint16_t* scales;  // (n, ceil(k/group)) fp16 bits; unused for fp16
};

// codes: code_bytes(), 16-aligned. scales: scale_bytes(), 16-aligned.
void q4_pack_cpu(const Q4Layout&, const Q4Source&, uint8_t* codes, uint16_t* scales);
// The same with every pointer in device memory. Throws CudaError.
void q4_pack_cuda(const Q4Layout&, const Q4Source&, uint8_t* codes, uint16_t* scales, cudaStream_t);

}  // namespace q4s
