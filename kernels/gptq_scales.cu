// Scales of groups and plain rounding on the GPU, the same bits as on the CPU: a warp searches for a group,
// its lanes being the candidates; then a thread a group polishes what was found. Contract: kernels/gptq.h.
#include "kernels/gptq_device.cuh"
#include "kernels/gptq_steps.h"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kMultiples = 71;  // 0.50 .. 1.20
constexpr int kThreads = 128;
constexpr int kWarps = 8;

// Weighted squared error of one weight under a candidate.
__device__ __forceinline__ float term(float w, float weight, float scale, float inverse, const Levels& l) {
  const float t = fminf(fmaxf(__fsub_rn(__fmul_rn(w, inverse), l.shift), float(l.low)), float(l.high));
  const float level = __fadd_rn(__fsub_rn(__fadd_rn(t, kRoundEven), kRoundEven), l.shift);
  const float e = __fsub_rn(w, __fmul_rn(scale, level));
  return __fmul_rn(weight, __fmul_rn(e, e));
}

__device__ float judge(const float* w, const float* weight, int64_t k, const Levels& l, float scale) {
  const float inverse = inverse_of(scale);
  float sum = 0;
  for (int64_t j = 0; j < k; ++j)
    sum = __fadd_rn(sum, term(w[j], weight ? weight[j] : 1.0f, scale, inverse, l));
  return sum;
}

// Candidate c = lane + 32 slot; the order that breaks ties is that of c.
template <int kSlots>
__global__ void __launch_bounds__(kWarps * 32) search_kernel(GptqScalesArgs a, int64_t groups) {
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (index >= a.n * groups) return;
  const int64_t begin = index % groups * a.group, k = min(a.group, a.k - begin);
  const float* w = a.w + index / groups * a.k + begin;
  const float* weight = a.weight ? a.weight + begin : nullptr;
  const Levels l = a.levels;

  float top = 0;
  for (int64_t j = lane; j < k; j += 32) top = fmaxf(top, fabsf(w[j]));
  for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  const float base = __fdiv_rn(top, l.reach);

  float scale[kSlots], inverse[kSlots], sum[kSlots] = {};
  const int candidates = l.negative ? 2 * kMultiples : kMultiples;
  for (int i = 0; i < kSlots; ++i) {
    const int c = lane + 32 * i, multiple = c < kMultiples ? c : c - kMultiples;
    const float s = scale_of(scale_bits(__fmul_rn(base, __fdiv_rn(float(50 + multiple), 100.0f))));
    scale[i] = c < kMultiples ? s : -s;
    inverse[i] = inverse_of(scale[i]);
  }
#pragma unroll 4
  for (int64_t j = 0; j < k; ++j) {
    const float v = w[j], h = weight ? weight[j] : 1.0f;
    for (int i = 0; i < kSlots; ++i) sum[i] = __fadd_rn(sum[i], term(v, h, scale[i], inverse[i], l));
  }
  float best = 0, error = INFINITY;
  int winner = 1 << 20;
  for (int i = 0; i < kSlots; ++i) {
    const int c = lane + 32 * i;
    if (c < candidates && sum[i] < error) best = scale[i], error = sum[i], winner = c;
  }
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, error, d), s = __shfl_xor_sync(~0u, best, d);
    const int c = __shfl_xor_sync(~0u, winner, d);
    if (other < error || (other == error && c < winner)) best = s, error = other, winner = c;
  }
  if (lane == 0) a.scales[index] = scale_bits(best);
}

// Up to three rounds of weighted least squares from the scale found.
__device__ float polish(const float* w, const float* weight, int64_t k, const Levels& l, float best) {
  if (best == 0.0f) return best;
  float best_error = judge(w, weight, k, l, best);
  for (int round = 0; round < 3 && best != 0.0f; ++round) {
    const float inverse = inverse_of(best);
    float wv = 0, vv = 0;
    for (int64_t j = 0; j < k; ++j) {
      const float v = level_of(code_of(w[j], best, inverse, l), l), h = weight ? weight[j] : 1.0f;
      wv = __fadd_rn(wv, __fmul_rn(h, __fmul_rn(w[j], v)));
      vv = __fadd_rn(vv, __fmul_rn(h, __fmul_rn(v, v)));
    }
    if (!(vv > 0.0f)) break;
    const float next = scale_of(scale_bits(__fdiv_rn(wv, vv)));
    const float error = judge(w, weight, k, l, next);
    if (!(error < best_error)) break;
    best = next, best_error = error;
  }
  return best;
}

__global__ void __launch_bounds__(kThreads) finish_kernel(GptqScalesArgs a, int64_t groups) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.n * groups) return;
  const int64_t begin = index % groups * a.group, k = min(a.group, a.k - begin);
  const float* w = a.w + index / groups * a.k + begin;
  float scale;
  if (a.search) {
    scale = polish(w, a.weight ? a.weight + begin : nullptr, k, a.levels, scale_of(a.scales[index]));
  } else {
    float top = 0;
    for (int64_t j = 0; j < k; ++j) top = fabsf(w[j]) > fabsf(top) ? w[j] : top;
    scale = __fdiv_rn(fabsf(top), a.levels.reach);
    if (a.levels.negative && top > 0.0f) scale = -scale;
  }
  const uint16_t bits = scale_bits(scale);
  a.scales[index] = scale_of(bits) == 0.0f ? 0 : bits;
}

enum class What { kCode, kError };

template <What what>
__global__ void __launch_bounds__(kThreads) round_kernel(GptqRoundArgs a, float* out) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.k) return;
  const int64_t groups = (a.k + a.group - 1) / a.group, g = j / a.group;
  for (int64_t row = blockIdx.y; row < a.n; row += gridDim.y) {
    const int64_t i = row * a.k + j;
    const float scale = scale_of(a.scales[row * groups + g]);
    if (what == What::kError)
      out[i] = __fsub_rn(a.w[i], value_of(a.codes[i], scale, a.levels));
    else
      a.codes[i] = uint8_t(code_of(a.w[i], scale, inverse_of(scale), a.levels));
  }
}

__global__ void __launch_bounds__(kThreads) levels_kernel(GptqRoundArgs a, __half2* out, float part) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.k) return;
  for (int64_t row = blockIdx.y; row < a.n; row += gridDim.y) {
    const int64_t i = row * a.k + j;
    const float level = level_of(a.codes[i], a.levels);
    out[i] = __floats2half2_rn(level, level * part);
  }
}

dim3 round_grid(const GptqRoundArgs& a) {
  return dim3(unsigned(ceil_div(a.k, kThreads)), unsigned(std::min<int64_t>(a.n, 4096)));
}

}  // namespace

void gptq_scales_cuda(const GptqScalesArgs& a, cudaStream_t stream) {
  const int64_t groups = ceil_div(a.k, a.group), all = a.n * groups;
  if (all == 0) return;
  if (a.search) {
    const unsigned blocks = unsigned(ceil_div(all, kWarps));
    launch("scales", a.levels.negative ? search_kernel<5> : search_kernel<3>, blocks, kWarps * 32, 0, 1,
           false, stream, a, groups);
  }
  launch("scales", finish_kernel, unsigned(ceil_div(all, kThreads)), kThreads, 0, 1, false, stream, a,
         groups);
}

void gptq_round_cuda(const GptqRoundArgs& a, cudaStream_t stream) {
  launch("round", round_kernel<What::kCode>, round_grid(a), kThreads, 0, 1, false, stream, a,
         static_cast<float*>(nullptr));
}
void gptq_error_cuda(const GptqRoundArgs& a, float* out, cudaStream_t stream) {
  launch("error", round_kernel<What::kError>, round_grid(a), kThreads, 0, 1, false, stream, a, out);
}
void gptq_levels_cuda(const GptqRoundArgs& a, uint16_t* out, float part, cudaStream_t stream) {
  launch("levels", levels_kernel, round_grid(a), kThreads, 0, 1, false, stream, a,
         reinterpret_cast<__half2*>(out), part);
}

}  // namespace q4s
