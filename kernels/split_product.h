// Products of f32 matrices on the fp16 units, to nearly f32's precision: every operand is the sum of two fp16
// numbers times a power of two, and three products of fp16 with f32 sums make one (Ootomo and Yokota,
// "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance", 2022). A row of the left operand and a column of the right one have a power of two each: a
// value v in a row whose largest is m keeps all but max(2^-22 |v|, 2^-35 m). What is not finite stays so.
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/types.h"

namespace q4s {

// v = (high + low / kSplitLow) / scale, scale by row or by column.
struct SplitMatrix {
  uint16_t* high;  // (R, ld)
  uint16_t* low;
  float* scale;  // (R) or (C)
  int64_t rows, cols;
  bool by_column;
  int64_t stride = 0;  // of rows in a part of a larger matrix; 0: its own
  int64_t ld() const { return stride ? stride : round_up(cols, 8); }
  // Rows and columns [row, row + count), [col, C); col is a multiple of 8.
  SplitMatrix part(int64_t row, int64_t count, int64_t col) const {
    const int64_t at = row * ld() + col;
    return {high + at, low + at, scale + (by_column ? col : row), count, cols - col, by_column, ld()};
  }
};
constexpr float kSplitLow = 2048;

// x (R, C) into s, whose pointers and shape are set.
void split_cuda(const float* x, const SplitMatrix& s, cudaStream_t);

// y (M, N) = alpha y / (row[i] column[j]) + beta add; add may be null.
void unsplit_cuda(float* y, const float* row, const float* column, int64_t m, int64_t n, float alpha,
                  const float* add, float beta, cudaStream_t);
// to (M, N), its rows so many values apart, += alpha y / (row[i] column[j]).
void unsplit_add_cuda(const float* y, const float* row, const float* column, int64_t m, int64_t n,
                      float alpha, float* to, int64_t stride, cudaStream_t);

}  // namespace q4s
