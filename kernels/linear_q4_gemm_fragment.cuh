// From a word of Q4 tiles to the A operand of a tensor core instruction. Shared by linear_q4_gemm*.cu only.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

namespace q4s {

// Weights of one lane: a word of Q4 tiles -> the A fragment of 16 rows x 16 columns, fp16(scale * (q -
// zero)). `scale` and `half` are {row g, row g+8}: the scale twice, and scale/2 (grid kHalf) or 0 twice.
struct Q4Fragment {
  __half2 scale[2], half[2];

  __device__ void set(const __half* row, bool half_grid) {  // row g of a 16-row column of scales
    set(row[0], row[8], half_grid);
  }
  __device__ void set(__half low, __half high, bool half_grid) {  // of rows g and g+8
    scale[0] = __half2half2(low);
    scale[1] = __half2half2(high);
    const __half2 h = __float2half2_rn(half_grid ? 0.5f : 0.f);
    half[0] = __hmul2(scale[0], h);
    half[1] = __hmul2(scale[1], h);
  }
  __device__ void unpack(uint32_t word, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool high = i % 2;  // the nibble's place; also the row: g or g + 8
      // 1024 + q in the low place; 64 + q in the high one, whose unit is 1/16 there.
      const uint32_t base = high ? 0x54005400u : 0x64006400u, offset = high ? 0x54805480u : 0x64086408u;
      uint32_t bits;  // (word & mask) | base in one instruction
      asm("lop3.b32 %0, %1, %2, %3, 0xea;"
          : "=r"(bits)
          : "r"(i < 2 ? word : word >> 8), "r"(high ? 0x00f000f0u : 0x000f000fu), "r"(base));
      const __half2 q =
          __hsub2(reinterpret_cast<const __half2&>(bits), reinterpret_cast<const __half2&>(offset));
      const __half2 w = __hfma2(q, scale[high], half[high]);
      a[i] = reinterpret_cast<const uint32_t&>(w);
    }
  }
};

// The same of int8: the four codes of row g and of row g+8.
struct Q8Fragment {
  __half2 scale[2];

  __device__ void set(__half low, __half high, bool) {
    scale[0] = __half2half2(low), scale[1] = __half2half2(high);
  }
  __device__ void unpack(uint32_t low, uint32_t high, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // 1024 + 128 + q, less 1152.
      const uint32_t bits =
          __byte_perm((i % 2 ? high : low) ^ 0x80808080u, 0x64646464u, i < 2 ? 0x4140 : 0x4342);
      const uint32_t offset = 0x64806480u;
      const __half2 q =
          __hsub2(reinterpret_cast<const __half2&>(bits), reinterpret_cast<const __half2&>(offset));
      const __half2 w = __hmul2(q, scale[i % 2]);
      a[i] = reinterpret_cast<const uint32_t&>(w);
    }
  }
};

// Codes of int4 without scales: q - zero in units of 1 / kUnit. A code as it lies in a word is an fp16 value
// below the normal range, in units of 2^-24 in the low nibble of a byte, of 2^-20 in the high one.
struct Q4Codes {
  static constexpr float kUnit = 0x1p10f;
  __half2 unit[2], offset;

  __device__ explicit Q4Codes(bool half_grid)
      : unit{__float2half2_rn(0x1p24f / kUnit), __float2half2_rn(0x1p20f / kUnit)},
        offset(__float2half2_rn((half_grid ? -7.5f : -8.f) / kUnit)) {}
  __device__ void unpack(uint32_t word, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = (i < 2 ? word : word >> 8) & (i % 2 ? 0x00f000f0u : 0x000f000fu);
      const __half2 w = __hfma2(reinterpret_cast<const __half2&>(bits), unit[i % 2], offset);
      a[i] = reinterpret_cast<const uint32_t&>(w);
    }
  }
};

}  // namespace q4s
