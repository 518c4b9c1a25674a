#include "quant/solver.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/dense.h"
#include "kernels/half.h"

namespace q4s {
namespace {

constexpr int64_t kRows = 96;  // fixed pieces of work, as in kernels/gptq.cpp

template <class Fn>
void for_rows(int64_t n, const Team& team, Fn fn) {
  team([&](Part part) {
    const Part::Range r = part.of(n, kRows);
    for (int64_t i = r.begin; i < r.end; i += kRows) fn(i, std::min(kRows, n - i));
  });
}

// out (N, K) = in with columns permuted: step i takes column order[i].
void permute(const float* in, const std::vector<int32_t>& order, int64_t rows, int64_t k, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < k; ++i) out[r * k + i] = in[r * k + order[i]];
}

// w += (alpha w0 D + beta E) H^-1 with H^-1 = U^T U in the order of the factor. False: not finite, w
// untouched.
bool add_correction(const LinearProblem& p, const HessianFactor& f, const SolveOptions& o, const Team& team,
                    std::vector<float>& w) {
  const int64_t k = p.k;
  const Transpose no = Transpose::kNo, yes = Transpose::kYes;
  std::vector<float> change(p.n * k);
  for_rows(p.n, team, [&](int64_t first, int64_t rows) {
    std::vector<float> a(rows * k), b(rows * k);
    if (p.e) std::copy(p.e + first * k, p.e + (first + rows) * k, a.begin());
    if (p.d)
      dense_gemm(no, no, rows, k, k, o.alpha, &w[first * k], k, p.d, k, p.e ? o.beta : 0.0f, a.data(), k);
    if (!p.d)
      for (float& v : a) v *= o.beta;
    permute(a.data(), f.order, rows, k, b.data());
    dense_gemm(no, yes, rows, k, k, 1.0f, b.data(), k, f.u.data(), k, 0.0f, a.data(), k);
    dense_gemm(no, no, rows, k, k, 1.0f, a.data(), k, f.u.data(), k, 0.0f, b.data(), k);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < k; ++i) change[(first + r) * k + f.order[i]] = b[r * k + i];
  });
  if (!std::all_of(change.begin(), change.end(), [](float v) { return std::isfinite(v); })) return false;
  for (size_t i = 0; i < w.size(); ++i) w[i] += change[i];
  return true;
}

QuantizedLinear prepare(int64_t n, int64_t k, const SolveOptions& o) {
  QuantizedLinear q;
  q.n = n;
  q.k = k;
  q.group = o.group == 0 ? k : std::min(o.group, k);
  q.grid = o.grid;
  q.codes.resize(n * k);
  q.scales.resize(n * q.groups());
  return q;
}

// Scales and codes of rows that stand together: w, scales and codes from the first of n rows on. Returns the
// number of sweeps.
int decide(const float* w, int64_t n, const std::vector<float>& diagonal, const HessianFactor& f,
           const SolveOptions& o, const Team& team, const QuantizedLinear& shape, uint16_t* scales,
           uint8_t* codes) {
  const int64_t k = f.k;
  const Levels levels = grid_levels(shape.grid);
  std::vector<float> work(n * k);
  team([&](Part part) {
    gptq_scales_cpu({w, diagonal.data(), scales, n, k, shape.group, levels, o.search}, part);
  });
  for_rows(n, team,
           [&](int64_t first, int64_t rows) { permute(w + first * k, f.order, rows, k, &work[first * k]); });
  team([&](Part part) {
    gptq_solve_cpu({work.data(), f.u.data(), f.order.data(), scales, codes, n, k, shape.group, levels}, part);
  });
  if (!o.refine) return 0;
  return refine_codes(
      {w, f.h.data(), scales, codes, n, k, shape.group, levels}, o.dither ? dithered_sweeps(shape.n, k) : 0,
      [&](const GptqRefineArgs& a) { team([&](Part part) { gptq_sweep_cpu(a, part); }); },
      [&](const GptqRefineArgs& a) { team([&](Part part) { gptq_refit_cpu(a, part); }); });
}

// All rows of q for the target w: at once, or in the steps of their coupling.
void decide_rows(const std::vector<float>& w, const std::vector<float>& diagonal, const HessianFactor& f,
                 const SolveOptions& o, const Team& team, QuantizedLinear& q) {
  const int64_t k = q.k, groups = q.groups();
  if (!o.coupling || o.coupling->blocks == 0) {
    q.sweeps = decide(w.data(), q.n, diagonal, f, o, team, q, q.scales.data(), q.codes.data());
    return;
  }
  const RowCoupling& c = *o.coupling;
  const int64_t size = c.size, free = c.free_rows();
  QuantizedLinear placed = q;  // rows where the coupling has them
  std::vector<float> target(q.n * k), error(q.n * k);
  for (int64_t i = 0; i < q.n; ++i) std::copy_n(&w[c.rows[i] * k], k, &target[i * k]);
  for (const RowCoupling::Step& s : c.steps()) {
    q.sweeps = decide(&target[s.begin * k], s.end - s.begin, diagonal, f, o, team, q,
                      &placed.scales[s.begin * groups], &placed.codes[s.begin * k]);
    placed.dequantize(s.begin, s.end, &error[s.begin * k]);
    for (int64_t i = s.begin * k; i < s.end * k; ++i) error[i] = target[i] - error[i];
    if (s.rank_end == size) break;
    team([&](Part part) {  // the target of what comes later
      const auto [first, last] = part.of(c.blocks);
      for (int64_t b = first; b < last; ++b) {
        const int64_t ld = c.blocks * k, from = free * k + b * k;
        dense_gemm(Transpose::kYes, Transpose::kNo, size - s.rank_end, k, s.rank_end - s.rank_begin, -1.0f,
                   &c.feedback[(b * size + s.rank_begin) * size + s.rank_end], size,
                   &error[from + s.rank_begin * ld], ld, 1.0f, &target[from + s.rank_end * ld], ld);
      }
    });
  }
  for (int64_t i = 0; i < q.n; ++i) {
    std::copy_n(&placed.codes[i * k], k, &q.codes[c.rows[i] * k]);
    std::copy_n(&placed.scales[i * groups], groups, &q.scales[c.rows[i] * groups]);
  }
}

// Losses of q against the original weights w and the corrected ones, and of plain rounding beside it.
void measure(const std::vector<float>& w, const std::vector<float>& target, const HessianFactor& f,
             const Team& team, QuantizedLinear& q) {
  SolveOptions plain;
  plain.grid = q.grid;
  plain.group = q.group;
  plain.search = false;
  std::vector<float> value(w.size());
  const auto losses = [&](const QuantizedLinear& r, const std::vector<float>& against) {
    for_rows(r.n, team,
             [&](int64_t first, int64_t rows) { r.dequantize(first, first + rows, &value[first * r.k]); });
    return row_losses(against.data(), value.data(), f, r.n, team);
  };
  const std::vector<RowLoss> rounded = losses(round_to_nearest(w.data(), nullptr, q.n, q.k, plain, team), w);
  q.rows = losses(q, w);
  const std::vector<RowLoss> aimed = losses(q, target);
  for (int64_t i = 0; i < q.n; ++i) {
    q.rows[i].rtn_h = rounded[i].error_h;
    q.rows[i].target_h = aimed[i].error_damped;
  }
}

}  // namespace

QuantizedLinear round_to_nearest(const float* w, const float* weight, int64_t n, int64_t k,
                                 const SolveOptions& o, const Team& team) {
  const Levels levels = grid_levels(o.grid);
  QuantizedLinear q = prepare(n, k, o);
  team([&](Part part) {
    gptq_scales_cpu({w, weight, q.scales.data(), n, k, q.group, levels, o.search}, part);
    gptq_round_cpu({w, q.scales.data(), q.codes.data(), n, k, q.group, levels}, part);
  });
  return q;
}

QuantizedLinear solve(const LinearProblem& p, const HessianFactor& f, const SolveOptions& o,
                      const Team& team) {
  assert(f.k == p.k);
  QuantizedLinear q = prepare(p.n, p.k, o);

  std::vector<float> original(p.w, p.w + p.n * p.k);
  for (int64_t j = 0; j < p.k; ++j)
    if (f.dead[j])
      for (int64_t i = 0; i < p.n; ++i) original[i * p.k + j] = 0.0f;
  std::vector<float> diagonal(p.k);
  for (int64_t j = 0; j < p.k; ++j) diagonal[j] = f.h[j * (p.k + 1)];

  if (o.rtn || !f.ok()) {
    const bool usable =
        std::all_of(diagonal.begin(), diagonal.end(), [](float v) { return std::isfinite(v) && v > 0; });
    q = round_to_nearest(original.data(), usable ? diagonal.data() : nullptr, p.n, p.k, o, team);
    if (!o.rtn) q.fallback = q.kNoFactor;
    measure(original, original, f, team, q);
    return q;
  }

  std::vector<float> w = original;
  if ((p.d && o.alpha != 0.0f) || (p.e && o.beta != 0.0f)) {
    if (!add_correction(p, f, o, team, w)) q.fallback = q.kNoCorrection;
  }
  decide_rows(w, diagonal, f, o, team, q);
  q.damp = f.damp;
  measure(original, w, f, team, q);
  return q;
}

std::vector<RowLoss> row_losses(const float* w, const float* q, const HessianFactor& f, int64_t n,
                                const Team& team) {
  std::vector<RowSums> sums(n);
  team([&](Part part) { gptq_loss_cpu({w, q, f.h.data(), sums.data(), n, f.k}, part); });
  std::vector<RowLoss> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = row_loss(sums[i], f.lambda);
  return rows;
}

RowLoss row_loss(const RowSums& s, double lambda) {
  return {s.error_h - lambda * s.error_2,
          s.error_h,
          s.weight_h - lambda * s.weight_2,
          0.0,
          s.error_h,
          s.error_abs,
          s.error_max};
}

void QuantizedLinear::dequantize(int64_t begin, int64_t end, float* out) const {
  const Levels levels = grid_levels(grid);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t g = 0; g < groups(); ++g) {
      const float scale = half_to_float(scales[i * groups() + g]);
      for (int64_t j = g * group; j < std::min(k, (g + 1) * group); ++j)
        *out++ = levels.value(codes[i * k + j], scale);
    }
  }
}

LossSummary summarize(const std::vector<RowLoss>& rows, int64_t k, int64_t row_begin, int64_t row_end) {
  LossSummary s{};
  double weight = 0.0, error = 0.0, rtn = 0.0, target = 0.0;
  for (int64_t i = row_begin; i < row_end; ++i) {
    const RowLoss& r = rows[i];
    s.loss += 0.5 * r.error_damped;
    error += r.error_h;
    rtn += r.rtn_h;
    target += r.target_h;
    weight += r.weight_h;
    s.error_mean += r.error_abs;
    s.error_max = std::max(s.error_max, double(r.error_max));
  }
  s.relative = weight > 0.0 ? error / weight : 0.0;
  s.rtn_relative = weight > 0.0 ? rtn / weight : 0.0;
  s.target = weight > 0.0 ? target / weight : 0.0;
  if (row_end > row_begin) s.error_mean /= double(row_end - row_begin) * double(k);
  return s;
}

}  // namespace q4s
