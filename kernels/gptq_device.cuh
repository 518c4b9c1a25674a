// What the quantiser's kernels share: levels and rounding on the device, operation for operation as
// kernels/gptq.h has them (intrinsics, since a fused product and sum would round once where the CPU rounds
// twice).
#pragma once
#include <cuda_fp16.h>

#include "kernels/gptq.h"

namespace q4s {

__device__ __forceinline__ float scale_of(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t scale_bits(float s) { return __half_as_ushort(__float2half_rn(s)); }

__device__ __forceinline__ float level_of(int code, const Levels& l) {
  return __fadd_rn(float(code - l.offset), l.shift);
}
__device__ __forceinline__ float value_of(int code, float scale, const Levels& l) {
  return __fmul_rn(scale, level_of(code, l));
}

// a / b with inverse = 1 / b rounded: the remainder makes the quotient exact to the last bit, without a
// branch.
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
  const float q = __fmul_rn(a, inverse);
  return fmaf(fmaf(-q, b, a), inverse, q);
}

// nearest_code with inverse = 1 / scale, or 0 where the scale is.
__device__ __forceinline__ int code_of(float w, float scale, float inverse, const Levels& l) {
  const float t = scale == 0.0f ? 0.0f : __fsub_rn(quotient(w, scale, inverse), l.shift);
  return __float2int_rn(fminf(fmaxf(t, float(l.low)), float(l.high))) + l.offset;
}
__device__ __forceinline__ float inverse_of(float scale) { return scale == 0.0f ? 0.0f : __frcp_rn(scale); }

}  // namespace q4s
