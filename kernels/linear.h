// y = x * W^T (+ residual). W in any Format.
//
// Reference: f32 activations, double accumulator. Fast CPU paths, by format and number of tokens only:
//   unquantised, up to 4 tokens     dot products, each row read once
//   unquantised, more               panels of rows unpacked to f32, then a dense product
//   kQ4, kQ8                        activations rounded to int8 per block of 32 columns, exact
//                                   integer dot products, the grid's offset folded in through activation
//                                   sums. Groups of 32, 64, a multiple of 128 or the whole row; others as
//                                   unquantised
// The fast paths run in two steps with a barrier between: linear_prepare on all threads (lays out the
// activations in the scratch), then linear.
#pragma once
#include <cstddef>

#include "kernels/device_matrix.h"

namespace q4s {

struct LinearArgs {
  const float* x;         // (T, K)
  WeightView w;           // (N, K)
  const float* residual;  // (T, N) or null; may be y
  float* y;               // (T, N)
  int64_t tokens;
  std::byte* scratch;  // linear_scratch_bytes(w, T, threads), 64-aligned; unused by the reference
};

void linear_cpu(const LinearArgs&, Part = {});  // the definition

// Whether kQ4 and kQ8 keep f32 activations too, as the unquantised formats do: slower, and as exact as the
// GPU's products. For a whole process, set before anything is computed; off at first.
void set_exact_activations(bool);

size_t linear_scratch_bytes(const WeightView&, int64_t tokens, int threads);  // also enough for fewer tokens
void linear_prepare(const LinearArgs&, Part = {});  // no-op where linear() reads x itself
void linear(const LinearArgs&, Part = {});

// Rows [begin, end) of w as f32: out (end-begin, k). The exact values every path computes with.
void dequantize_rows(const WeightView&, int64_t begin, int64_t end, float* out);
// The same rounded to fp16, out (end-begin, k) fp16; all pointers in device memory. Weights in tiles.
void dequantize_rows_cuda(const DeviceMatrix&, int64_t begin, int64_t end, void* out, cudaStream_t);

}  // namespace q4s
