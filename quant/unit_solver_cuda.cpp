// UnitSolver on the GPU, on the stream of the backend that makes the activations. Packed codes, scales and
// losses go back to the host; all else stays on the device, in memory that is kept from unit to unit.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels/device_array.h"
#include "kernels/gptq_cuda.h"
#include "kernels/gptq_steps.h"
#include "kernels/weight_steps.h"
#include "quant/device_guard.h"
#include "quant/unit_solver.h"
#include "runtime/cuda_backend.h"

namespace q4s {
namespace {

class CudaUnitSolver final : public UnitSolver {
 public:
  CudaUnitSolver(Backend& b, StageClock* clock) : stream_(cuda_stream(b)), clock_(clock), gptq_(stream_) {}

  void begin(int64_t n, int64_t k, int64_t samples, bool corrects, bool residual) override {
    device_guarded("statistics", [&] {
      n_ = n, k_ = k;
      corrects_ = corrects, residual_ = corrects && residual;
      scale_ = 2.0f / float(samples);
      gptq_.drop_statistics();
      h_.clear(k * k, stream_);
      if (corrects_) d_.clear(k * k, stream_);
      if (residual_) e_.clear(n * k, stream_);
    });
  }

  void begin_identity(int64_t n, int64_t k) override {
    begin(n, k, 1, false, false);
    device_guarded("statistics", [&] {
      f_ = {};
      f_.k = k;
      f_.dead.assign(k, 0);
      ok_ = false;
      dead_.upload(f_.dead.data(), k, stream_);
      const std::vector<float> ones(k, 1.0f);
      diagonal_.upload(ones.data(), k, stream_);
      gptq_diagonal_cuda(h_.get(), diagonal_.get(), k, true, stream_);
    });
  }

  void add(const float* x, const float* x_full, const float* r, const float* r_full,
           int64_t tokens) override {
    device_guarded("statistics", [&] {
      gptq_.statistics({x, corrects_ ? x_full : nullptr, residual_ ? r : nullptr,
                        residual_ ? r_full : nullptr, h_.get(), d_.get(), e_.get(), tokens, k_, n_, scale_});
    });
  }

  void finish() override {
    device_guarded("statistics", [&] { gptq_.finish_statistics(); });
  }

  double factor(double damp, bool act_order) override {
    return device_guarded("factor", [&] {
      f_ = {};
      f_.k = k_;
      gptq_mirror_cuda(h_.get(), k_, stream_);
      ok_ = factor_matrix(f_, h_.get(), diagonal_, order_, u_.take(k_ * k_), damp, act_order);
      std::vector<int32_t> inverse(k_);
      for (int64_t i = 0; i < k_; ++i) inverse[f_.order[i]] = int32_t(i);
      inverse_.upload(inverse.data(), k_, stream_);
      dead_.upload(f_.dead.data(), k_, stream_);
      cuda_check(cudaStreamSynchronize(stream_), "factor");
      return f_.damp;
    });
  }

  QuantizedLinear solve(float* w, const SolveOptions& o) override {
    return device_guarded("solve", [&] { return solve_on_device(w, o); });
  }

  PackedWeight packed() override {
    return device_guarded("codes", [&] {
      PackedWeight p = empty_packed(solved_);
      gptq_pack_cuda(codes_.get(), packed_.take(int64_t(p.data.size())), n_, k_, grid_bits(solved_.grid),
                     stream_);
      packed_.download(p.data.data(), int64_t(p.data.size()), stream_);
      scales_.download(p.scales.data(), int64_t(p.scales.size()), stream_);
      return p;
    });
  }

  void values(float* to) override {
    device_guarded("codes", [&] {
      gptq_values_cuda(
          {nullptr, scales_.get(), codes_.get(), n_, k_, solved_.group, grid_levels(solved_.grid)}, to,
          stream_);
    });
  }

  const HessianFactor& fetch() override {
    device_guarded("factor", [&] {
      f_.h.resize(k_ * k_);
      h_.download(f_.h.data(), k_ * k_, stream_);
      if (!ok_) return;
      f_.u.resize(k_ * k_);
      u_.download(f_.u.data(), k_ * k_, stream_);
    });
    return f_;
  }

  Distance distance(const float* x, const float* x_full, int64_t count) override {
    return device_guarded("distance", [&] {
      constexpr int64_t kColumns = 4096;  // any: sums are taken row by row, then here
      const int64_t rows = ceil_div(count, kColumns);
      std::vector<double> sums(2 * rows);
      gptq_distance_cuda(x, x_full, distances_.take(2 * rows), count, kColumns, stream_);
      distances_.download(sums.data(), 2 * rows, stream_);
      Distance d;
      for (int64_t i = 0; i < rows; ++i) d.difference_2 += sums[2 * i], d.full_2 += sums[2 * i + 1];
      return d;
    });
  }

  void product(const ProductArgs& a) override {
    device_guarded("product", [&] {
      gptq_.product(a.ta == Transpose::kYes, a.tb == Transpose::kYes, a.m, a.n, a.k, a.alpha, a.a, a.lda, a.b,
                    a.ldb, a.beta, a.c, a.ldc);
    });
  }

  HessianFactor factor_of(std::vector<float> h, int64_t k, double damp) override {
    return device_guarded("factor", [&] {
      HessianFactor f;
      f.k = k;
      f.h = std::move(h);
      DeviceArray<float> matrix, diagonal, u;
      DeviceArray<int32_t> order;
      matrix.upload(f.h.data(), k * k, stream_);
      const bool ok = factor_matrix(f, matrix.get(), diagonal, order, u.take(k * k), damp, true);
      matrix.download(f.h.data(), k * k, stream_);
      f.u.resize(ok ? k * k : 0);
      if (ok) u.download(f.u.data(), k * k, stream_);
      return f;
    });
  }

 private:
  void enter(Stage s) {
    if (clock_) clock_->enter(s);
  }

  // h (K, K) becomes damped, u its factor; `diagonal` and `order` end as those of the factor.
  bool factor_matrix(HessianFactor& f, float* h, DeviceArray<float>& diagonal, DeviceArray<int32_t>& order,
                     float* u, double damp, bool act_order) {
    const int64_t k = f.k;
    std::vector<float> on_host(k);
    gptq_diagonal_cuda(h, diagonal.take(k), k, false, stream_);
    diagonal.download(on_host.data(), k, stream_);
    flag_.clear(1, stream_);
    gptq_finite_cuda(h, k * k, FLT_MAX, flag_.get(), stream_);
    int bad = 0;
    flag_.download(&bad, 1, stream_);
    return climb_damping(f, std::move(on_host), bad == 0, damp, act_order,
                         [&](const std::vector<float>& damped) {
                           diagonal.upload(damped.data(), k, stream_);
                           gptq_diagonal_cuda(h, diagonal.get(), k, true, stream_);
                           if (!f.order.empty()) order.upload(f.order.data(), k, stream_);
                           return (k > kExactFactor && gptq_.factor(h, order.get(), u, k, false)) ||
                                  gptq_.factor(h, order.get(), u, k);
                         });
  }

  QuantizedLinear solve_on_device(float* w, const SolveOptions& o) {
    QuantizedLinear q;
    bool solved = false;
    q.n = n_, q.k = k_;
    q.group = o.group == 0 ? k_ : std::min(o.group, k_);
    q.grid = o.grid;
    const int64_t count = n_ * k_, groups = q.groups();
    const Levels levels = grid_levels(o.grid);
    gptq_clear_columns_cuda(w, dead_.get(), n_, k_, stream_);
    uint16_t* scales = scales_.take(n_ * groups);
    uint8_t* codes = codes_.take(count);
    float* target = w;

    if (o.rtn || !ok_) {
      std::vector<float> diagonal(k_);
      gptq_diagonal_cuda(h_.get(), diagonal_.get(), k_, false, stream_);
      diagonal_.download(diagonal.data(), k_, stream_);
      const bool usable =
          std::all_of(diagonal.begin(), diagonal.end(), [](float v) { return std::isfinite(v) && v > 0; });
      enter(Stage::kSearch);
      round(w, usable ? diagonal_.get() : nullptr, o.search, q.group, levels, scales, codes);
      if (!o.rtn) q.fallback = q.kNoFactor;
    } else {
      enter(Stage::kTarget);
      const float* d = corrects_ && o.alpha != 0.0f ? d_.get() : nullptr;
      const float* e = residual_ && o.beta != 0.0f ? e_.get() : nullptr;
      if (d || e) {
        target = target_.take(count);
        cuda_check(cudaMemcpyAsync(target, w, size_t(count) * 4, cudaMemcpyDeviceToDevice, stream_), "copy");
        if (!gptq_.correct({target, d, e, u_.get(), order_.get(), inverse_.get(), n_, k_, o.alpha, o.beta}))
          q.fallback = q.kNoCorrection;
      }
      q.sweeps = decide_rows(target, q, o);
      q.damp = f_.damp;
      solved = true;
    }
    enter(Stage::kLosses);
    q.rows = losses({w, h_.get(), scales, codes, n_, k_, q.group, levels}, true);
    if (solved && target == w) {
      for (RowLoss& r : q.rows) r.target_h = r.error_damped;
    } else if (solved) {
      const std::vector<RowLoss> aimed =
          losses({target, h_.get(), scales, codes, n_, k_, q.group, levels}, false);
      for (int64_t i = 0; i < n_; ++i) q.rows[i].target_h = aimed[i].error_damped;
    }
    // Plain rounding, for the report.
    uint16_t* plain_scales = plain_scales_.take(n_ * groups);
    uint8_t* plain_codes = packed_.take(count);
    round(w, nullptr, false, q.group, levels, plain_scales, plain_codes);
    const std::vector<RowLoss> plain =
        losses({w, h_.get(), plain_scales, plain_codes, n_, k_, q.group, levels}, false);
    for (int64_t i = 0; i < n_; ++i) q.rows[i].rtn_h = plain[i].error_h;
    solved_ = q;
    return q;
  }

  // Scales and codes of n rows that stand together. Returns the number of sweeps.
  int decide(const float* w, int64_t n, const QuantizedLinear& q, const SolveOptions& o, uint16_t* scales,
             uint8_t* codes) {
    const Levels levels = grid_levels(q.grid);
    enter(Stage::kSearch);
    gptq_scales_cuda({w, diagonal_.get(), scales, n, k_, q.group, levels, o.search}, stream_);
    enter(Stage::kSolve);
    float* work = work_.take(n * k_);
    gptq_gather_columns_cuda(w, order_.get(), work, n, k_, false, stream_);
    gptq_.solve({work, u_.get(), order_.get(), scales, codes, n, k_, q.group, levels});
    if (!o.refine) return 0;
    enter(Stage::kRefine);
    return refine_codes(
        {w, h_.get(), scales, codes, n, k_, q.group, levels}, o.dither ? dithered_sweeps(n_, k_) : 0,
        [&](const GptqRefineArgs& a) { gptq_.sweep(a); }, [&](const GptqRefineArgs& a) { gptq_.refit(a); });
  }

  // All rows for the target w: at once, or in the steps of their coupling.
  int decide_rows(const float* w, const QuantizedLinear& q, const SolveOptions& o) {
    if (!o.coupling || o.coupling->blocks == 0) return decide(w, n_, q, o, scales_.get(), codes_.get());
    const RowCoupling& c = *o.coupling;
    const int64_t groups = q.groups(), free = c.free_rows();
    rows_.upload(c.rows.data(), n_, stream_);
    feedback_.upload(c.feedback.data(), int64_t(c.feedback.size()), stream_);
    float *target = placed_.take(n_ * k_), *error = error_.take(n_ * k_);
    uint16_t* scales = placed_scales_.take(n_ * groups);
    uint8_t* codes = packed_.take(n_ * k_);
    gather_rows_cuda(w, rows_.get(), target, n_, k_, stream_);
    int sweeps = 0;
    for (const RowCoupling::Step& s : c.steps()) {
      const int64_t n = s.end - s.begin, at = s.begin * k_;
      uint16_t* step_scales = scales + s.begin * groups;
      sweeps = decide(target + at, n, q, o, step_scales, codes + at);
      gptq_error_cuda({target + at, step_scales, codes + at, n, k_, q.group, grid_levels(q.grid)}, error + at,
                      stream_);
      gptq_.feed_back({feedback_.get(), error + free * k_, target + free * k_, c.blocks, c.size, s.rank_begin,
                       s.rank_end, k_});
    }
    gptq_scatter_rows_cuda(codes, rows_.get(), codes_.get(), n_, k_, stream_);
    gptq_scatter_rows_cuda(scales, rows_.get(), scales_.get(), n_, 2 * groups, stream_);
    return sweeps;
  }

  void round(const float* w, const float* weight, bool search, int64_t group, const Levels& l,
             uint16_t* scales, uint8_t* codes) {
    gptq_scales_cuda({w, weight, scales, n_, k_, group, l, search}, stream_);
    gptq_round_cuda({w, scales, codes, n_, k_, group, l}, stream_);
  }

  std::vector<RowLoss> losses(const GptqRefineArgs& args, bool weights) {
    std::vector<RowSums> sums(n_);
    gptq_.losses(args, sums_.take(n_), weights);
    sums_.download(sums.data(), n_, stream_);
    std::vector<RowLoss> rows(n_);
    for (int64_t i = 0; i < n_; ++i) rows[i] = row_loss(sums[i], f_.lambda);
    return rows;
  }

  cudaStream_t stream_;
  StageClock* clock_;
  GptqCuda gptq_;
  int64_t n_ = 0, k_ = 0;
  bool corrects_ = false, residual_ = false, ok_ = false;
  float scale_ = 0;
  HessianFactor f_;                              // order, dead, damping; h and u once fetched
  DeviceArray<float> h_, d_, u_;                 // (K, K); h_ damped after factor()
  DeviceArray<float> e_;                         // (N, K)
  DeviceArray<float> diagonal_;                  // (K) of h_
  DeviceArray<int32_t> order_, inverse_;         // (K)
  DeviceArray<uint8_t> dead_;                    // (K)
  DeviceArray<int> flag_;                        // (1)
  DeviceArray<float> target_, work_;             // (N, K) weights: corrected, in the factor's order
  DeviceArray<float> placed_, error_;            // (N, K) rows in a coupling's order
  DeviceArray<int32_t> rows_;                    // (N) that order
  DeviceArray<float> feedback_;                  // (blocks, size, size)
  DeviceArray<uint16_t> placed_scales_;          // (N, G)
  DeviceArray<uint8_t> codes_, packed_;          // (N, K); packed_: of plain rounding or a coupling, too
  DeviceArray<uint16_t> scales_, plain_scales_;  // (N, G)
  QuantizedLinear solved_;                       // without codes and scales
  DeviceArray<RowSums> sums_;                    // (N)
  DeviceArray<double> distances_;
};

}  // namespace

std::unique_ptr<UnitSolver> make_cuda_unit_solver(Backend& b, StageClock* clock) {
  return device_guarded("quantiser", [&] { return std::make_unique<CudaUnitSolver>(b, clock); });
}

}  // namespace q4s
