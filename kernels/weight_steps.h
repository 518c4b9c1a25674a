// What the quantiser does on the GPU with the weights of a linear before and after it is solved. Device
// pointers; matrices are row-major f32 (N, K) unless said otherwise; nothing here allocates.
#pragma once
#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/gptq.h"

namespace q4s {

// to = from (count), fp16 or bf16 by `format`.
void widen_cuda(const void* from, Format format, float* to, int64_t count, cudaStream_t);
// Column j times gain[j] (K).
void scale_columns_cuda(float* w, const float* gain, int64_t n, int64_t k, cudaStream_t);
// Row i of out (N, K) = row index[i] of in.
void gather_rows_cuda(const float* in, const int32_t* index, float* out, int64_t n, int64_t k, cudaStream_t);
// Sums of squares of every column (K), rows ascending, in f64, where the products are exact.
void column_squares_cuda(const float* w, double* sums, int64_t n, int64_t k, cudaStream_t);
// out (K, N) = in (N, K) transposed.
void transpose_cuda(const float* in, float* out, int64_t n, int64_t k, cudaStream_t);

// out (N, K) = the values that the packed kernels compute with.
void gptq_values_cuda(const GptqRoundArgs&, float* out, cudaStream_t);
// Codes as a .q4s file has them: 4 bits, two a byte, even column low, rows begin on a byte; or 8 bits, less
// 128.
void gptq_pack_cuda(const uint8_t* codes, uint8_t* out, int64_t n, int64_t k, int bits, cudaStream_t);

// Sums over one piece of kShapePiece weights, for the moments and the histogram of all. Which are filled
// depends on the pass, the others are 0: 0 low, high, m1; 1 m2, m3, m4 of x - mean; 2 bins of (x - mean) / sd
// over -4..4.
constexpr int64_t kShapePiece = 1 << 16;
constexpr int kShapeBins = 64;
struct ShapeSums {
  double low, high, m1, m2, m3, m4;
  int32_t bins[kShapeBins];
};
void shape_cuda(const float* w, int64_t count, int pass, double mean, double sd, ShapeSums* pieces,
                cudaStream_t);

}  // namespace q4s
