// One block of 128 columns of the GPTQ pass or of a sweep, for all rows: kernels/gptq_steps.h. A thread owns
// a row and walks its columns in pieces of 32 held in registers; the block of U or H lies in shared memory,
// transposed, so that what column j hears from the columns before it is read four numbers at a time, the same
// for every thread.
#include <cuda_pipeline.h>

#include "kernels/gptq_device.cuh"
#include "kernels/gptq_steps.h"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kBlock = int(kGptqBlock);
constexpr int kPiece = 32;             // columns whose errors stay in registers
constexpr int kRows = 64;              // rows, and threads, of a thread block
constexpr int kStride = kBlock + 4;    // of m: rows stay 16-byte aligned
constexpr int kRowStride = kRows + 1;  // of x: no bank conflicts in either direction
constexpr int kCodeStride = kRows + 4;

struct Shared {
  float m[kBlock * kStride];     // m[j][i] = M[i][j] for i <= j
  float x[kBlock * kRowStride];  // (columns, rows); ends as `moved`
  float diagonal[kBlock], inverse[kBlock];
  int column[kBlock], group[kBlock];
  uint8_t codes[kBlock * kCodeStride];  // (columns, rows)
};

template <bool kSweep>
__device__ __forceinline__ void load(const GptqPanelArgs& a, Shared& s, int64_t first) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = int(a.size);
  for (int i = warp; i < size; i += kRows / 32) {
    const float* row = a.m + (a.begin + i) * a.k + a.begin;
    for (int j = i / 32 * 32 + lane; j < size; j += 32)
      if (j >= i) __pipeline_memcpy_async(&s.m[j * kStride + i], row + j, 4);
  }
  for (int r = warp; r < kRows; r += kRows / 32) {
    const bool live = first + r < a.n;
    const float* row = a.x + (first + r) * a.k + a.begin;
    for (int c = lane; c < kBlock; c += 32) {
      if (live && c < size)
        __pipeline_memcpy_async(&s.x[c * kRowStride + r], row + c, 4);
      else
        s.x[c * kRowStride + r] = 0;
    }
  }
  __pipeline_commit();
  for (int c = threadIdx.x; c < kBlock; c += kRows) {
    const int64_t at = a.begin + c, column = c < size ? (a.order ? a.order[at] : at) : 0;
    s.column[c] = int(column);
    s.group[c] = int(column / a.group);
    s.diagonal[c] = c < size ? a.m[at * a.k + at] : 1;
    s.inverse[c] = __frcp_rn(s.diagonal[c]);
  }
  if (kSweep) {
    for (int r = warp; r < kRows; r += kRows / 32) {
      const uint8_t* row = a.codes + (first + r) * a.k + a.begin;
#pragma unroll
      for (int c = lane; c < kBlock; c += 32)
        s.codes[c * kCodeStride + r] = first + r < a.n && c < size ? row[c] : 0;
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
}

template <bool kSweep>
__global__ void __launch_bounds__(kRows) panel_kernel(GptqPanelArgs a) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int64_t first = int64_t(blockIdx.x) * kRows, groups = (a.k + a.group - 1) / a.group;
  const int size = int(a.size), r = threadIdx.x;
  const Levels l = a.levels;
  load<kSweep>(a, s, first);
  const uint16_t* scales = a.scales + min(first + r, a.n - 1) * groups;

  for (int c0 = 0; c0 < size; c0 += kPiece) {
    float scale[kPiece], inverse[kPiece], moved[kPiece];
    uint32_t codes[kPiece / 4] = {};
    SweepDither dither(0, 0, 0);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) scale[j] = scale_of(scales[s.group[c0 + j]]);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) inverse[j] = inverse_of(scale[j]);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const float* m = s.m + (c0 + j) * kStride + c0;
      float v = s.x[(c0 + j) * kRowStride + r];
#pragma unroll
      for (int i = 0; i < j; i += 4) {
        const float4 q = *reinterpret_cast<const float4*>(m + i);
        v = fmaf(-moved[i], q.x, v);
        if (i + 1 < j) v = fmaf(-moved[i + 1], q.y, v);
        if (i + 2 < j) v = fmaf(-moved[i + 2], q.z, v);
        if (i + 3 < j) v = fmaf(-moved[i + 3], q.w, v);
      }
      const float d = s.diagonal[c0 + j], d_inverse = s.inverse[c0 + j];
      int code;
      if (kSweep) {
        const int old = s.codes[(c0 + j) * kCodeStride + r];
        const float value = value_of(old, scale[j], l);
        float best = __fadd_rn(value, quotient(v, d, d_inverse));
        if (a.dither > 0.0f) {
          if (j % 4 == 0) dither = SweepDither(a.pass, first + r, a.begin + c0 + j);
          best = __fadd_rn(best, __fmul_rn(scale[j], __fmul_rn(a.dither, dither.at(j))));
        }
        code = scale[j] == 0.0f ? old : code_of(best, scale[j], inverse[j], l);
        moved[j] = __fsub_rn(value_of(code, scale[j], l), value);
      } else {
        code = code_of(v, scale[j], inverse[j], l);
        moved[j] = quotient(__fsub_rn(v, value_of(code, scale[j], l)), d, d_inverse);
      }
      codes[j / 4] |= uint32_t(code) << (j % 4 * 8);
    }
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      s.x[(c0 + j) * kRowStride + r] = moved[j];
      s.codes[(c0 + j) * kCodeStride + r] = uint8_t(codes[j / 4] >> (j % 4 * 8));
    }
    for (int c = c0 + kPiece; c < size; c += 4) {  // columns past `size` are computed and never used
      float v[4];
      for (int q = 0; q < 4; ++q) v[q] = s.x[(c + q) * kRowStride + r];
#pragma unroll
      for (int i = 0; i < kPiece; i += 4) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float4 f = *reinterpret_cast<const float4*>(s.m + (c + q) * kStride + c0 + i);
          v[q] = fmaf(-moved[i], f.x, v[q]);
          v[q] = fmaf(-moved[i + 1], f.y, v[q]);
          v[q] = fmaf(-moved[i + 2], f.z, v[q]);
          v[q] = fmaf(-moved[i + 3], f.w, v[q]);
        }
      }
      for (int q = 0; q < 4; ++q) s.x[(c + q) * kRowStride + r] = v[q];
    }
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = warp; row < kRows && first + row < a.n; row += kRows / 32) {
    for (int c = lane; c < size; c += 32) {
      a.moved[(first + row) * kBlock + c] = s.x[c * kRowStride + row];
      a.codes[(first + row) * a.k + s.column[c]] = s.codes[c * kCodeStride + row];
    }
  }
}

template <bool kSweep>
void run(const GptqPanelArgs& a, cudaStream_t stream) {
  if (a.n == 0 || a.size == 0) return;
  launch(kSweep ? "sweep" : "solve", panel_kernel<kSweep>, unsigned(ceil_div(a.n, kRows)), kRows,
         sizeof(Shared), 1, false, stream, a);
}

}  // namespace

void gptq_solve_panel_cuda(const GptqPanelArgs& a, cudaStream_t stream) { run<false>(a, stream); }
void gptq_sweep_panel_cuda(const GptqPanelArgs& a, cudaStream_t stream) { run<true>(a, stream); }

}  // namespace q4s
