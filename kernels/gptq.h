// The steps of the quantiser on plain arrays: statistics of the inputs, scales of the groups, the GPTQ pass,
// and the refinement of codes and scales. Rows of W are independent in every step but the first; a CUDA
// version of a step must give the same result up to f32 rounding. What ties the steps together is
// quant/solver.h.
//
// W (N, K) f32 is one linear, H (K, K) its damped Hessian, groups are `group` consecutive columns (last one
// may be short), scales are fp16 bits (N, G), codes one byte each (N, K), all in the original column order.
#pragma once
#include "kernels/philox.h"
#include "kernels/types.h"

namespace q4s {

// A scale-only grid: value = scale * (q + shift), q an integer in [low, high], stored as code = q + offset.
struct Levels {
  float shift;        // 0, or 1/2 on the half-step grid
  int32_t low, high;  // range of q
  int32_t offset;     // 8 for 4 bits, 128 for 8 bits
  float reach;        // the plain scale is max|w| / reach
  bool negative;      // the scale takes the sign that puts the extreme weight on the longer side

  float value(uint8_t code, float scale) const { return scale * (float(int32_t(code) - offset) + shift); }
};

// Round half to even for |x| < 2^22 without a library call, so that loops over it become vector code.
constexpr float kRoundEven = 12582912.0f;  // 1.5 * 2^23: the adder rounds at 1
inline float round_even(float x) { return (x + kRoundEven) - kRoundEven; }

// The nearest level. Scale 0 means that the group is all zero: the code of q = 0.
inline uint8_t nearest_code(float w, float scale, const Levels& l) {
  const float t = scale == 0.0f ? 0.0f : w / scale - l.shift;
  const float low = float(l.low), high = float(l.high);
  return uint8_t(int32_t(round_even(t < low ? low : t > high ? high : t)) + l.offset);
}

// c (M, K) += factor * a^T b over T tokens: H with a = b = x (only the upper triangle is promised), D with a
// = x_full - x, and E with a = r_full - r. f32 sums; tokens in order of the calls.
struct GptqGramArgs {
  const float* a;  // (T, M)
  const float* b;  // (T, K)
  float* c;        // (M, K)
  int64_t tokens, m, k;
  float factor;
  bool upper;  // c[i, j < i] may be left as it is; M == K
};
void gptq_gram_cpu(const GptqGramArgs&, Part = {});

// One scale per group. Plain: max|w| / reach, fp16. Search: the multiples 0.50, 0.51 .. 1.20 of it, and their
// negatives where the grid is lopsided, each rounded to fp16 and judged by sum_j weight[j] (w_j - value_j)^2
// (f32, j ascending; the first of equals wins, positive ones first); then up to three rounds of weighted
// least squares on the codes of the best, each kept only if it is better. An all-zero group has scale 0.
struct GptqScalesArgs {
  const float* w;       // (N, K)
  const float* weight;  // (K) diagonal of H, or null: ones
  uint16_t* scales;     // (N, G)
  int64_t n, k, group;
  Levels levels;
  bool search;
};
void gptq_scales_cpu(const GptqScalesArgs&, Part = {});

// Plain rounding: codes of w under given scales.
struct GptqRoundArgs {
  const float* w;          // (N, K)
  const uint16_t* scales;  // (N, G)
  uint8_t* codes;          // (N, K)
  int64_t n, k, group;
  Levels levels;
};
void gptq_round_cpu(const GptqRoundArgs&, Part = {});

// GPTQ (Frantar et al. 2022, arXiv 2210.17323) with fixed scales. Columns are taken in `order`; u is the
// upper Cholesky factor of the inverse of H in that order. Blocks of 128 columns: inside one, column i of a
// row gives err = (w_i - value_i) / u_ii and w_j -= err * u_ij for later j of the block; then one product
// updates the rest.
struct GptqSolveArgs {
  float* w;                // (N, K) columns permuted by `order`; overwritten
  const float* u;          // (K, K) upper, in `order`
  const int32_t* order;    // (K) original column of each step
  const uint16_t* scales;  // (N, G)
  uint8_t* codes;          // (N, K)
  int64_t n, k, group;
  Levels levels;
};
constexpr int64_t kGptqBlock = 128;
void gptq_solve_cpu(const GptqSolveArgs&, Part = {});

// Refinement of (w - q) H (w - q)^T, row by row.
//  sweep  columns ascending: each code moves to the level nearest to the exact minimiser over that
//  coordinate,
//         value_j + (e H)_j / H_jj with e = w - q; a move updates e H. Never raises the loss. With `dither`
//         the minimiser is moved first, by at most so many steps of the grid (SweepDither): such a sweep may
//         leave a local minimum, and a later one without dither find a better.
//  refit  codes fixed: the G scales that minimise the loss (normal equations, f64 Cholesky), rounded to fp16;
//         a group without a non-zero level keeps its scale, a row that would get worse keeps all of its.
struct GptqRefineArgs {
  const float* w;    // (N, K)
  const float* h;    // (K, K) symmetric
  uint16_t* scales;  // (N, G)
  uint8_t* codes;    // (N, K)
  int64_t n, k, group;
  Levels levels;
  float dither = 0;   // of a sweep, in steps of the grid
  uint32_t pass = 0;  // another random sequence for each
};

// The random numbers of a dithered sweep, a pure function of pass, row and column: uniform in [-1, 1). One
// draw serves four columns.
struct SweepDither {
  Philox4 draw;
  Q4S_HOST_DEVICE SweepDither(uint32_t pass, int64_t row, int64_t column)
      : draw(philox4x32({{uint32_t(column / 4), uint32_t(row), uint32_t(row >> 32), pass}}, 0x71347364u,
                        0u)) {}
  Q4S_HOST_DEVICE float at(int64_t column) const {
    return float(int32_t(draw.x[column % 4] >> 8) - (1 << 23)) * 0x1p-23f;
  }
};
void gptq_sweep_cpu(const GptqRefineArgs&, Part = {});
void gptq_refit_cpu(const GptqRefineArgs&, Part = {});

// What the report needs, per row: e H e^T and e e^T of the error e = w - q, w H w^T and w w^T, max and sum of
// |e|.
struct RowSums {
  double error_h, error_2, weight_h, weight_2, error_abs;
  float error_max;
};
struct GptqLossArgs {
  const float* w;  // (N, K)
  const float* q;  // (N, K) dequantised
  const float* h;  // (K, K) symmetric
  RowSums* sums;   // (N)
  int64_t n, k;
};
void gptq_loss_cpu(const GptqLossArgs&, Part = {});

}  // namespace q4s
