// score_logits.h on the GPU: one block a row, the largest first, then all sums in one pass and a fixed order.
#include "kernels/block_reduce.cuh"
#include "kernels/pdl.cuh"
#include "kernels/score_logits.h"

namespace q4s {
namespace {

constexpr int kThreads = 512;

// A row's largest logit, and whether all are finite.
__device__ float largest(const float* x, int64_t n, float* shared, bool& finite) {
  float top = -INFINITY;
  bool good = true;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    top = fmaxf(top, x[i]);
    good &= isfinite(x[i]);
  }
  finite = __syncthreads_and(good);
  return block_max<kThreads>(top, shared, -INFINITY);
}

__device__ double block_sum(double v, double* shared) {
  return block_reduce<kThreads>(v, shared, 0.0, [](double a, double b) { return a + b; });
}

__device__ int64_t block_first(int64_t id, int64_t* shared) {
  return block_reduce<kThreads>(id, shared, INT64_MAX, [](int64_t a, int64_t b) { return min(a, b); });
}

template <bool kReference>
__global__ void __launch_bounds__(kThreads) score_logits_kernel(ScoreLogitsArgs a) {
  __shared__ float tops[32];
  __shared__ double sums[32];
  __shared__ int64_t ids[32];
  pdl_trigger();
  pdl_wait();
  const int64_t r = blockIdx.x;
  const float* q = a.logits + r * a.vocab;
  const float* p = kReference ? a.reference + r * a.vocab : q;
  LogitScore* score = a.score + r;
  bool finite, p_finite = true;
  const float top_q = largest(q, a.vocab, tops, finite);
  const float top_p = kReference ? largest(p, a.vocab, tops, p_finite) : top_q;
  if (!finite || !p_finite) {
    if (threadIdx.x == 0) *score = {NAN, NAN, NAN, 0};
    return;
  }

  double sum_q = 0, sum_p = 0, dot = 0;  // dot: of exp(p - top_p) and p - q
  int64_t first_q = INT64_MAX, first_p = INT64_MAX;
  for (int64_t i = threadIdx.x; i < a.vocab; i += kThreads) {
    sum_q += expf(q[i] - top_q);
    if (!kReference) continue;
    const double e = expf(p[i] - top_p);
    sum_p += e;
    dot += e * (double(p[i]) - q[i]);
    if (q[i] == top_q) first_q = min(first_q, i);
    if (p[i] == top_p) first_p = min(first_p, i);
  }
  const int32_t target = a.target[r];
  const double lse_q = top_q + log(block_sum(sum_q, sums));
  if (!kReference) {
    if (threadIdx.x == 0) *score = {lse_q - q[target], 0, 0, 0};
    return;
  }
  sum_p = block_sum(sum_p, sums);
  dot = block_sum(dot, sums);
  first_q = block_first(first_q, ids);
  first_p = block_first(first_p, ids);
  const double lse_p = top_p + log(sum_p);
  if (threadIdx.x == 0)
    *score = {lse_q - q[target], lse_p - p[target], dot / sum_p - lse_p + lse_q, first_q == first_p};
}

}  // namespace

void score_logits_cuda(const ScoreLogitsArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  launch("score of logits", a.reference ? score_logits_kernel<true> : score_logits_kernel<false>,
         unsigned(a.rows), kThreads, 0, 1, true, stream, a);
}

}  // namespace q4s
