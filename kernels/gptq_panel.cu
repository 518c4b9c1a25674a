// One block of 128 columns of the GPTQ pass or of a sweep, for all rows: kernels/gptq_steps.h. The block of U
// or H and a band of rows lie in shared memory. A thread owns a row and walks it column by column in pieces
// of 32 held in registers: a code is chosen, and the columns of the piece behind it hear of it at once, so
// that the chain from column to column is one decision and one sum. What a piece moves reaches the rest of
// the block by a product of all threads, four rows by eight columns each. Every column hears of those before
// it in their order.
#include <cuda_pipeline.h>

#include <algorithm>

#include "kernels/gptq_device.cuh"
#include "kernels/gptq_steps.h"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kBlock = int(kGptqBlock);
constexpr int kPiece = 32;           // columns whose values stay in registers
constexpr int kQuads = kBlock / 4;   // of a row
constexpr int kStride = kBlock + 4;  // of x and of codes: eight rows meet different banks, 16 bytes each

template <int kRows>
struct Shared {
  float m[kBlock * kBlock];  // M[i][j] for i <= j
  float x[kRows * kStride];  // ends as `moved`
  float diagonal[kBlock], inverse[kBlock];
  int column[kBlock], group[kBlock];
  uint8_t codes[kRows * kStride];
};

__device__ __forceinline__ float4& quad(float* p) { return *reinterpret_cast<float4*>(p); }
__device__ __forceinline__ uint32_t& word(uint8_t* p) { return *reinterpret_cast<uint32_t*>(p); }

template <bool kSweep, int kRows>
__device__ __forceinline__ void load(const GptqPanelArgs& a, Shared<kRows>& s, int64_t first) {
  const int size = int(a.size), tid = int(threadIdx.x);
  const bool aligned = a.k % 4 == 0;  // and so is `size`
  const float* m = a.m + a.begin * a.k + a.begin;
  if (aligned) {
    for (int p = tid; p < size * kQuads; p += kRows) {
      const int i = p / kQuads, c = p % kQuads * 4;
      if (c + 3 >= i && c < size) __pipeline_memcpy_async(&s.m[i * kBlock + c], m + i * a.k + c, 16);
    }
  } else {
    for (int p = tid; p < size * kBlock; p += kRows) {
      const int i = p / kBlock, c = p % kBlock;
      if (c >= i && c < size) __pipeline_memcpy_async(&s.m[i * kBlock + c], m + i * a.k + c, 4);
    }
  }
#pragma unroll 4
  for (int p = tid; p < kRows * kQuads; p += kRows) {
    const int r = p / kQuads, c = p % kQuads * 4;
    const bool live = first + r < a.n;
    const int64_t at = (first + r) * a.k + a.begin + c;
    float* x = &s.x[r * kStride + c];
    uint8_t* code = &s.codes[r * kStride + c];
    if (live && aligned && c < size) {
      __pipeline_memcpy_async(x, a.x + at, 16);
      if (kSweep) __pipeline_memcpy_async(code, a.codes + at, 4);
    } else {
      for (int q = 0; q < 4; ++q) {
        const bool there = live && c + q < size;
        x[q] = there ? a.x[at + q] : 0.0f;
        code[q] = kSweep && there ? a.codes[at + q] : 0;
      }
    }
  }
  __pipeline_commit();
  for (int c = tid; c < kBlock; c += kRows) {
    const int64_t at = a.begin + c, column = c < size ? (a.order ? a.order[at] : at) : 0;
    s.column[c] = int(column);
    s.group[c] = int(column / a.group);
    s.diagonal[c] = c < size ? a.m[at * a.k + at] : 1;
    s.inverse[c] = __frcp_rn(s.diagonal[c]);
  }
  __pipeline_wait_prior(0);
  __syncthreads();
}

// The 32 columns from c0 on of this thread's row.
template <bool kSweep, int kRows>
__device__ __forceinline__ void walk_piece(const GptqPanelArgs& a, Shared<kRows>& s, int c0, int64_t row,
                                           const uint16_t* scales) {
  const Levels l = a.levels;
  float* x = &s.x[int(threadIdx.x) * kStride + c0];
  uint8_t* codes = &s.codes[int(threadIdx.x) * kStride + c0];
  float v[kPiece], scale[kPiece], inverse[kPiece];
#pragma unroll
  for (int j = 0; j < kPiece; ++j) scale[j] = scale_of(scales[s.group[c0 + j]]);
#pragma unroll
  for (int j = 0; j < kPiece; j += 4) {
    const float4 q = quad(x + j);
    v[j] = q.x, v[j + 1] = q.y, v[j + 2] = q.z, v[j + 3] = q.w;
  }
#pragma unroll
  for (int j = 0; j < kPiece; ++j) inverse[j] = inverse_of(scale[j]);
  uint32_t old = 0, now = 0;
  SweepDither dither(0, 0, 0);
#pragma unroll
  for (int j = 0; j < kPiece; ++j) {
    const float d = s.diagonal[c0 + j], d_inverse = s.inverse[c0 + j];
    if (j % 4 == 0) old = kSweep ? word(codes + j) : 0, now = 0;
    int code;
    if (kSweep) {
      const int before = int(old >> (j % 4 * 8) & 255);
      const float value = value_of(before, scale[j], l);
      float best = __fadd_rn(value, quotient(v[j], d, d_inverse));
      if (a.dither > 0.0f) {
        if (j % 4 == 0) dither = SweepDither(a.pass, row, a.begin + c0 + j);
        best = __fadd_rn(best, __fmul_rn(scale[j], __fmul_rn(a.dither, dither.at(j))));
      }
      code = scale[j] == 0.0f ? before : code_of(best, scale[j], inverse[j], l);
      v[j] = __fsub_rn(value_of(code, scale[j], l), value);
    } else {
      code = code_of(v[j], scale[j], inverse[j], l);
      v[j] = quotient(__fsub_rn(v[j], value_of(code, scale[j], l)), d, d_inverse);
    }
    now |= uint32_t(code) << (j % 4 * 8);
    if (j % 4 == 3) word(codes + j - 3) = now;
    float* m = s.m + (c0 + j) * kBlock + c0;
#pragma unroll
    for (int i = (j + 1) / 4 * 4; i < kPiece; i += 4) {
      const float4 q = quad(m + i);
      if (i > j) v[i] = fmaf(-v[j], q.x, v[i]);
      if (i + 1 > j) v[i + 1] = fmaf(-v[j], q.y, v[i + 1]);
      if (i + 2 > j) v[i + 2] = fmaf(-v[j], q.z, v[i + 2]);
      v[i + 3] = fmaf(-v[j], q.w, v[i + 3]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPiece; j += 4) quad(x + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
}

// x[c] -= moved of the piece at c0 * M, for the columns c behind it. Columns past `size` are computed and
// never used.
template <int kRows>
__device__ __forceinline__ void tell_rest(Shared<kRows>& s, int c0, int size) {
  constexpr int kApart = kRows / 4;  // between the rows of a thread
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 8 + lane % 8;
  float* const x = &s.x[row * kStride];
#pragma unroll 1
  for (int c = c0 + kPiece + lane / 8 * 8; c < size; c += kPiece) {
    float4 sum[4][2];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[r][h] = quad(x + r * kApart * kStride + c + 4 * h);
#pragma unroll 2
    for (int i = 0; i < kPiece; i += 4) {
      float4 moved[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) moved[r] = quad(x + r * kApart * kStride + c0 + i);
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 f = quad(s.m + (c0 + i + q) * kBlock + c + 4 * h);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float e = -(q == 0 ? moved[r].x : q == 1 ? moved[r].y : q == 2 ? moved[r].z : moved[r].w);
            sum[r][h].x = fmaf(e, f.x, sum[r][h].x);
            sum[r][h].y = fmaf(e, f.y, sum[r][h].y);
            sum[r][h].z = fmaf(e, f.z, sum[r][h].z);
            sum[r][h].w = fmaf(e, f.w, sum[r][h].w);
          }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) quad(x + r * kApart * kStride + c + 4 * h) = sum[r][h];
  }
}

template <bool kSweep, int kRows>
__global__ void __launch_bounds__(kRows) panel_kernel(GptqPanelArgs a) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared<kRows>& s = *reinterpret_cast<Shared<kRows>*>(raw);
  const int64_t first = int64_t(blockIdx.x) * kRows, groups = (a.k + a.group - 1) / a.group;
  const int64_t row = first + threadIdx.x;
  const int size = int(a.size);
  load<kSweep>(a, s, first);
  for (int c0 = 0; c0 < size; c0 += kPiece) {
    walk_piece<kSweep>(a, s, c0, row, a.scales + min(row, a.n - 1) * groups);
    __syncthreads();
    if (c0 + kPiece < size) tell_rest(s, c0, size);
    __syncthreads();
  }
  const bool words = !a.order && a.k % 4 == 0;
#pragma unroll 4
  for (int p = int(threadIdx.x); p < kRows * kQuads; p += kRows) {
    const int r = p / kQuads, c = p % kQuads * 4;
    if (first + r >= a.n || c >= size) continue;
    quad(a.moved + (first + r) * a.moved_stride + c) = quad(&s.x[r * kStride + c]);
    uint8_t* codes = &s.codes[r * kStride + c];
    uint8_t* to = a.codes + (first + r) * a.k;
    if (words) {
      word(to + a.begin + c) = word(codes);
    } else {
      for (int q = 0; q < 4 && c + q < size; ++q) to[s.column[c + q]] = codes[q];
    }
  }
}

template <bool kSweep, int kRows>
bool start(const GptqPanelArgs& a, int64_t rows, cudaStream_t stream) {
  if (rows > kRows || sizeof(Shared<kRows>) > size_t(device_facts().shared_bytes)) return false;
  launch(kSweep ? "sweep" : "solve", panel_kernel<kSweep, kRows>, unsigned(ceil_div(a.n, kRows)), kRows,
         sizeof(Shared<kRows>), 1, false, stream, a);
  return true;
}

// As few rows to a block as let all blocks run at once: the time is that of the chain, however many share it.
template <bool kSweep>
void run(const GptqPanelArgs& a, cudaStream_t stream) {
  if (a.n == 0 || a.size == 0) return;
  const int64_t rows = ceil_div(a.n, device_facts().multiprocessors);
  start<kSweep, 32>(a, rows, stream) || start<kSweep, 64>(a, rows, stream) ||
      start<kSweep, 96>(a, rows, stream) || start<kSweep, 128>(a, rows, stream) ||
      start<kSweep, 192>(a, std::min<int64_t>(rows, 192), stream) || start<kSweep, 128>(a, 0, stream) ||
      start<kSweep, 32>(a, 0, stream);
}

}  // namespace

void gptq_solve_panel_cuda(const GptqPanelArgs& a, cudaStream_t stream) { run<false>(a, stream); }
void gptq_sweep_panel_cuda(const GptqPanelArgs& a, cudaStream_t stream) { run<true>(a, stream); }

}  // namespace q4s
