// One linear: weights and the statistics of its inputs in, codes and scales out. Ties the steps of
// kernels/gptq.h together; knows no models and no files. Rows are independent, so linears that read the same
// input are solved stacked, and their losses are sums over ranges of rows.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/gptq.h"
#include "quant/factor.h"
#include "quant/grid.h"
#include "quant/row_coupling.h"

namespace q4s {

struct LinearProblem {
  const float* w = nullptr;  // (N, K) full-precision weights
  const float* d = nullptr;  // (K, K) (2/n) sum (x_full - x) x^T, or null
  const float* e = nullptr;  // (N, K) (2/n) sum (r_full - r) x^T, or null
  int64_t n = 0, k = 0;
};

struct SolveOptions {
  GridKind grid = GridKind::kSigned;
  int64_t group = 128;  // 0: the whole row
  bool rtn = false;     // plain rounding: no use of H but for the losses (and for the search where asked)
  bool search = true;   // scale search weighted with diag(H)
  bool refine = true;   // sweep, refit, sweep
  bool dither = true;   // and with refine: dithered sweeps, then sweep, refit, sweep once more
  float alpha = 0.5f;   // weight of the correction towards the full-precision inputs (d)
  float beta = 0.5f;    // weight of the repair of the residual stream (e)
  const RowCoupling* coupling = nullptr;  // of the rows' errors; null: they are independent
};

// Of one row, against the original weights; H is undamped.
struct RowLoss {
  double error_h, error_damped;  // dw H dw^T, dw (H + lambda I) dw^T
  double weight_h;               // w H w^T
  double rtn_h;                  // dw H dw^T of plain rounding with plain scales
  double target_h;   // as error_damped, but against the corrected weights: what the solver minimised
  double error_abs;  // sum |dw|
  float error_max;   // max |dw|
};

// Dithered sweeps over a linear of n * k weights. A dither of .08 steps and 12 sweeps take 4 % off what is
// lost without, 6 sweeps 3 % (less dither moves too little, .15 and more breaks up what GPTQ had arranged).
// They cost n k^2 each against the tokens' k^2, so that a large linear gets few.
constexpr float kDither = 0.08f;
constexpr int dithered_sweeps(int64_t n, int64_t k) { return n * k <= int64_t(8) << 20 ? 12 : 4; }

// The refinement after the GPTQ pass, by a device's sweep and refit: to a local minimum over codes and
// scales; then, where asked, so many dithered sweeps that leave it, and to the next one. Returns the number
// of sweeps.
template <class Sweep, class Refit>
int refine_codes(GptqRefineArgs args, int dithered, Sweep sweep, Refit refit) {
  const auto settle = [&] {
    sweep(args);
    refit(args);
    sweep(args);
  };
  settle();
  if (dithered == 0) return 2;
  args.dither = kDither;
  for (args.pass = 0; int(args.pass) < dithered; ++args.pass) sweep(args);
  args.dither = 0;
  settle();
  return 4 + dithered;
}

RowLoss row_loss(const RowSums&, double lambda);

struct QuantizedLinear {
  int64_t n = 0, k = 0, group = 0;
  GridKind grid = GridKind::kSigned;
  std::vector<uint8_t> codes;    // (N, K) q + offset
  std::vector<uint16_t> scales;  // (N, G) fp16 bits
  std::vector<RowLoss> rows;     // (N)
  double damp = 0;               // damping used; 0 with rtn
  int sweeps = 0;
  std::string fallback;  // why it was rounded to nearest though GPTQ was asked for; else empty

  int64_t groups() const { return ceil_div(k, group); }
  static constexpr const char* kNoFactor = "the Hessian could not be factored: rounded to nearest";
  static constexpr const char* kNoCorrection =
      "the correction towards full precision is not finite: left out";
  void dequantize(int64_t begin, int64_t end, float* out) const;  // rows [begin, end) -> (end - begin, K)
};

struct LossSummary {
  double loss;          // 1/2 tr(dW (H + lambda I) dW^T): the seed's, with H normalised by sequences
  double relative;      // tr(dW H dW^T) / tr(W H W^T)
  double rtn_relative;  // the same of plain rounding
  double error_max, error_mean;
  double target;  // what the solver minimised, over tr(W H W^T)
};
LossSummary summarize(const std::vector<RowLoss>& rows, int64_t k, int64_t row_begin, int64_t row_end);

// Losses of dequantised weights q (N, K) against w (N, K), which counts as the target too; rtn_h is left 0.
std::vector<RowLoss> row_losses(const float* w, const float* q, const HessianFactor&, int64_t n,
                                const Team& team);

// Plain rounding without any statistics: weight (K) or null weighs the scale search, where options ask for
// one. Losses are not measured.
QuantizedLinear round_to_nearest(const float* w, const float* weight, int64_t n, int64_t k,
                                 const SolveOptions&, const Team&);

// The factor may serve several calls (other groups, other grids). If it is not ok(), or the correction is not
// finite, the result falls back (to plain rounding, to no correction) and says so.
// Target: W' = W + alpha W D H^-1 + beta E H^-1, a closed form of asymmetric calibration (GPTAQ, arXiv
// 2504.02692) that repairs the residual stream as well.
QuantizedLinear solve(const LinearProblem&, const HessianFactor&, const SolveOptions&, const Team&);

}  // namespace q4s
