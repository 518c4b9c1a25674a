// The quantiser's steps on the GPU: kernels/gptq.h with device pointers, products through cuBLAS, the
// factorisation through cuSOLVER. Results equal the CPU's up to the rounding of f32 sums, but for the
// statistics, whose operands are rounded to fp16. The same bits every run. Working memory is kept from call
// to call.
#pragma once
#include <memory>

#include "kernels/cuda_stream.h"
#include "kernels/gptq.h"

namespace q4s {

// H += factor x^T x (whole panels of it: the upper triangle is promised), D += factor (x_full - x)^T x,
// E += factor (r_full - r)^T x. Differences are taken in f32, then everything is rounded to fp16 (a
// difference times 16, which keeps small ones normal; values beyond fp16 become its largest); products of
// fp16 are exact in the f32 sums. The fp16 x is what the int4 kernels multiply, so H is that of the inputs
// they see; in D and E the rounding adds noise of 2^-12 of a difference, not correlated over tokens.
struct GptqStatisticsArgs {
  const float* x;       // (T, K) inputs of the quantised model's linear
  const float* x_full;  // (T, K) of the full-precision model's; null: no D
  const float* r;       // (T, N) residual streams; null: no E
  const float* r_full;  // (T, N)
  float* h;             // (K, K)
  float* d;             // (K, K)
  float* e;             // (N, K)
  int64_t tokens, k, n;
  float factor;
};

// w += (alpha w D + beta E) H^-1, H^-1 = U^T U in `order`; d or e may be null.
struct GptqCorrectArgs {
  float* w;                // (N, K)
  const float* d;          // (K, K)
  const float* e;          // (N, K)
  const float* u;          // (K, K)
  const int32_t* order;    // (K) and its inverse
  const int32_t* inverse;  // (K)
  int64_t n, k;
  float alpha, beta;
};

// The feedback of rows that count together (quant/row_coupling.h): rank r of block b is row r * blocks + b of
// error and target. Ranks from rank_end on: target -= F^T error over ranks [rank_begin, rank_end).
struct GptqFeedbackArgs {
  const float* feedback;  // (blocks, size, size)
  const float* error;     // (size * blocks, K)
  float* target;          // (size * blocks, K)
  int64_t blocks, size, rank_begin, rank_end, k;
};

class GptqCuda {
 public:
  explicit GptqCuda(cudaStream_t);  // throws CudaError, std::runtime_error, as all calls do
  ~GptqCuda();
  GptqCuda(const GptqCuda&) = delete;
  GptqCuda& operator=(const GptqCuda&) = delete;

  // Sums wait until enough tokens have come for a good product: h, d and e of one call are those of the next,
  // and nothing else is called but product() until the sums are finished or dropped.
  void statistics(const GptqStatisticsArgs&);
  void finish_statistics();
  void drop_statistics();
  // u (K, K) = upper Cholesky factor of the inverse of h (K, K, symmetric) in `order`, in f64 throughout, or
  // in f32. False: not positive definite, or not finite. Waits.
  bool factor(const float* h, const int32_t* order, float* u, int64_t k, bool exact = true);
  // False: the change is not finite and w is as it was. Waits.
  bool correct(const GptqCorrectArgs&);
  void solve(const GptqSolveArgs&);  // a.w in `order`, overwritten
  void sweep(const GptqRefineArgs&);
  void refit(const GptqRefineArgs&);
  void feed_back(const GptqFeedbackArgs&);
  // sums (N) of w - value(codes) under h; with `weights` those of w as well, else they are zero.
  void losses(const GptqRefineArgs&, RowSums* sums, bool weights);

  // Row-major C (m, n) = alpha op(A) op(B) + beta C in f32.
  void product(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
               const float* b, int64_t ldb, float beta, float* c, int64_t ldc);

  size_t bytes() const;  // of working memory

 private:
  struct State;
  std::unique_ptr<State> s_;
};

}  // namespace q4s
