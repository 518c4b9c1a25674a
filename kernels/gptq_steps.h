// The parts of the quantiser's steps that are kernels of ours; products and factorisations around them are in
// kernels/gptq_cuda.h. Device pointers throughout, shapes as in kernels/gptq.h; nothing here allocates.
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/gptq.h"

namespace q4s {

// The same bits as on the CPU.
void gptq_scales_cuda(const GptqScalesArgs&, cudaStream_t);
void gptq_round_cuda(const GptqRoundArgs&, cudaStream_t);

// One block of columns for all rows. Each row is walked column by column: a code is chosen, and `moved` takes
// what the later columns of the row have to hear of, x[j] -= moved[i] * m[i, j]: inside the block here,
// beyond it by a product of the caller.
//  solve  x is w in the order of the factor, m is U;     moved = (x_i - value_i) / u_ii
//  sweep  x is e H, m is H, the order that of the file;  moved = new value - old value
struct GptqPanelArgs {
  const float* x;          // (N, K)
  const float* m;          // (K, K) at least upper
  const int32_t* order;    // (K) file's column of each step; null: as they are
  const uint16_t* scales;  // (N, G)
  uint8_t* codes;          // (N, K) in the file's order; sweep reads them too
  float* moved;            // (N, kGptqBlock), rows so many values apart (a multiple of 4)
  int64_t moved_stride;
  int64_t n, k, group;
  int64_t begin, size;  // columns; size <= kGptqBlock
  Levels levels;
  float dither = 0;  // of a sweep
  uint32_t pass = 0;
};
void gptq_solve_panel_cuda(const GptqPanelArgs&, cudaStream_t);
void gptq_sweep_panel_cuda(const GptqPanelArgs&, cudaStream_t);

// out (N, K) = w - value(code).
void gptq_error_cuda(const GptqRoundArgs&, float* out, cudaStream_t);
// out (N, K, 2) fp16: level and `part` of it in turn, `part` a power of two with which they are exact.
void gptq_levels_cuda(const GptqRoundArgs&, uint16_t* out, float part, cudaStream_t);

// out[i * stride + g], g in [first, G): sum over group g of a * level in f64, for each of n rows; levels as
// above. a (N, K) is first divided by over (K), powers of two, where that is not null.
void gptq_group_dots_cuda(const float* a, const uint16_t* levels, const float* over, double* out, int64_t n,
                          int64_t k, int64_t group, int64_t first, int64_t stride, cudaStream_t);
// The refit's small systems: m (N, G, G) lower triangle column by column, b (N, G), both overwritten; scales
// (N, G).
void gptq_refit_rows_cuda(double* m, double* b, uint16_t* scales, int64_t n, int64_t groups, cudaStream_t);

// sums (N) of e and eh = e H, and, where given, of w and wh = w H.
void gptq_row_sums_cuda(const float* e, const float* eh, const float* w, const float* wh, RowSums* sums,
                        int64_t n, int64_t k, cudaStream_t);

// sums (ceil(count / piece), 2): of every piece of two arrays, sum of (x_full - x)^2 and of x_full^2.
void gptq_distance_cuda(const float* x, const float* x_full, double* sums, int64_t count, int64_t piece,
                        cudaStream_t);

// Factorisation, in f32 or f64: a (K, K) = h with rows and columns in reversed `order`, b (K, K) the
// identity; later u[i, j] = b[K-1-i, K-1-j] of a row-major lower b. *bad becomes 1 where u is not finite.
void gptq_factor_begin_cuda(const float* h, const int32_t* order, float* a, float* b, int64_t k,
                            cudaStream_t);
void gptq_factor_begin_cuda(const float* h, const int32_t* order, double* a, double* b, int64_t k,
                            cudaStream_t);
void gptq_factor_end_cuda(const float* b, float* u, int* bad, int64_t k, cudaStream_t);
void gptq_factor_end_cuda(const double* b, float* u, int* bad, int64_t k, cudaStream_t);

// out (N, K): out[i, j] = in[i, index[j]], or += it.
void gptq_gather_columns_cuda(const float* in, const int32_t* index, float* out, int64_t n, int64_t k,
                              bool add, cudaStream_t);
// to[index[i], :] = from[i, :], rows of so many bytes.
void gptq_scatter_rows_cuda(const void* from, const int32_t* index, void* to, int64_t n, int64_t bytes,
                            cudaStream_t);
void gptq_clear_columns_cuda(float* w, const uint8_t* dead, int64_t n, int64_t k,
                             cudaStream_t);                // w = 0 where dead
void gptq_mirror_cuda(float* h, int64_t k, cudaStream_t);  // lower = upper
void gptq_diagonal_cuda(float* h, float* diagonal, int64_t k, bool set,
                        cudaStream_t);  // reads it or writes it
// *bad = 1 where one is not a number or beyond `limit`.
void gptq_finite_cuda(const float* v, int64_t count, float limit, int* bad, cudaStream_t);

// y (T, ld) fp16 = scale * (x - minus), beyond fp16 its largest; minus may be null, columns [K, ld) are zero.
void gptq_to_half_cuda(const float* x, const float* minus, float scale, int64_t tokens, int64_t k, void* y,
                       int64_t ld, cudaStream_t);

}  // namespace q4s
