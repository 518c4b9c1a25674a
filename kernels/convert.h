// f32 activations as operands of half-precision products, on the GPU. Device pointers.
#pragma once
#include <cstdint>

#include "kernels/cuda_stream.h"

namespace q4s {

// y (T, ld) fp16 = x (T, K), columns [K, ld) zero.
void to_f16_cuda(const float* x, int64_t tokens, int64_t k, void* y, int64_t ld, cudaStream_t);

// high + low (both (T, K) bf16) = x up to 2^-16 of it: bf16 alone keeps too few bits of an activation.
void to_bf16_pair_cuda(const float* x, int64_t tokens, int64_t k, void* high, void* low, cudaStream_t);

// A kernel, not a copy of the runtime's: it keeps its place in a chain of dependent launches.
void copy_cuda(const float* x, float* y, int64_t count, cudaStream_t);

// Whether this program holds code for the current device: cudaErrorNoKernelImageForDevice and the like.
int probe_kernel_image();  // a cudaError_t

}  // namespace q4s
