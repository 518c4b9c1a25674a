// UnitSolver on the GPU, on the stream of the backend that makes the activations. Weights come from the host, codes,
// scales and losses go back; all else stays on the device, in memory that is kept from unit to unit.
#include <algorithm>
#include <cmath>

#include "kernels/device_array.h"
#include "kernels/gptq_cuda.h"
#include "kernels/gptq_steps.h"
#include "quant/unit_solver.h"
#include "runtime/cuda_backend.h"
#include "runtime/error.h"

namespace q4s {
namespace {

// Errors of the device leave as Error that says what was being done.
template <typename Fn>
auto guarded(const char* what, const Fn& fn) {
  try {
    return fn();
  } catch (const CudaError& e) {
    const bool memory = e.code == cudaErrorMemoryAllocation;
    throw Error(memory ? ErrorKind::kResource : ErrorKind::kRuntime, std::string("GPU: ") + what + ": " + e.what());
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& e) {
    throw Error(ErrorKind::kRuntime, std::string("GPU: ") + what + ": " + e.what());
  }
}

class CudaUnitSolver final : public UnitSolver {
 public:
  explicit CudaUnitSolver(Backend& b) : stream_(cuda_stream(b)), gptq_(stream_) {}

  void begin(int64_t n, int64_t k, int64_t samples, bool corrects, bool residual) override {
    guarded("statistics", [&] {
      n_ = n, k_ = k;
      corrects_ = corrects, residual_ = corrects && residual;
      scale_ = 2.0f / float(samples);
      h_.clear(k * k, stream_);
      if (corrects_) d_.clear(k * k, stream_);
      if (residual_) e_.clear(n * k, stream_);
    });
  }

  void add(const float* x, const float* x_full, const float* r, const float* r_full, int64_t tokens) override {
    guarded("statistics", [&] {
      gptq_.statistics({x, corrects_ ? x_full : nullptr, residual_ ? r : nullptr, residual_ ? r_full : nullptr, h_.get(),
                        d_.get(), e_.get(), tokens, k_, n_, scale_});
    });
  }

  void wait() override {
    guarded("statistics", [&] { synchronize(); });
  }

  double factor(double damp, bool act_order) override {
    return guarded("factor", [&] {
      f_ = {};
      f_.k = k_;
      gptq_mirror_cuda(h_.get(), k_, stream_);
      std::vector<float> diagonal(k_);
      gptq_diagonal_cuda(h_.get(), diagonal_.take(k_), k_, false, stream_);
      diagonal_.download(diagonal.data(), k_, stream_);
      flag_.clear(1, stream_);
      gptq_finite_cuda(h_.get(), k_ * k_, flag_.get(), stream_);
      int bad = 0;
      flag_.download(&bad, 1, stream_);
      ok_ = climb_damping(f_, std::move(diagonal), bad == 0, damp, act_order, [&](const std::vector<float>& damped) {
        diagonal_.upload(damped.data(), k_, stream_);
        gptq_diagonal_cuda(h_.get(), diagonal_.get(), k_, true, stream_);
        if (!f_.order.empty()) order_.upload(f_.order.data(), k_, stream_);
        return gptq_.factor(h_.get(), order_.get(), u_.take(k_ * k_), k_);
      });
      std::vector<int32_t> inverse(k_);
      for (int64_t i = 0; i < k_; ++i) inverse[f_.order[i]] = int32_t(i);
      inverse_.upload(inverse.data(), k_, stream_);
      dead_.upload(f_.dead.data(), k_, stream_);
      synchronize();
      return f_.damp;
    });
  }

  QuantizedLinear solve(const float* w, const SolveOptions& o) override {
    return guarded("solve", [&] { return solve_on_device(w, o); });
  }

  const HessianFactor& fetch() override {
    guarded("factor", [&] {
      f_.h.resize(k_ * k_);
      h_.download(f_.h.data(), k_ * k_, stream_);
      if (!ok_) return;
      f_.u.resize(k_ * k_);
      u_.download(f_.u.data(), k_ * k_, stream_);
    });
    return f_;
  }

  Distance distance(const float* x, const float* x_full, int64_t count) override {
    return guarded("distance", [&] {
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

 private:
  void synchronize() { cuda_check(cudaStreamSynchronize(stream_), "running the quantiser"); }

  QuantizedLinear solve_on_device(const float* w, const SolveOptions& o) {
    QuantizedLinear q;
    bool solved = false;
    q.n = n_, q.k = k_;
    q.group = o.group == 0 ? k_ : std::min(o.group, k_);
    q.grid = o.grid;
    const int64_t count = n_ * k_, groups = q.groups();
    const Levels levels = grid_levels(o.grid);
    original_.upload(w, count, stream_);
    gptq_clear_columns_cuda(original_.get(), dead_.get(), n_, k_, stream_);
    uint16_t* scales = scales_.take(n_ * groups);
    uint8_t* codes = codes_.take(count);

    if (o.rtn || !ok_) {
      std::vector<float> diagonal(k_);
      gptq_diagonal_cuda(h_.get(), diagonal_.get(), k_, false, stream_);
      diagonal_.download(diagonal.data(), k_, stream_);
      const bool usable = std::all_of(diagonal.begin(), diagonal.end(), [](float v) { return std::isfinite(v) && v > 0; });
      round(usable ? diagonal_.get() : nullptr, o.search, q.group, levels, scales, codes);
      if (!o.rtn) q.fallback = q.kNoFactor;
    } else {
      float *target = target_.take(count), *work = work_.take(count);
      cuda_check(cudaMemcpyAsync(target, original_.get(), size_t(count) * 4, cudaMemcpyDeviceToDevice, stream_), "copy");
      const float* d = corrects_ && o.alpha != 0.0f ? d_.get() : nullptr;
      const float* e = residual_ && o.beta != 0.0f ? e_.get() : nullptr;
      if ((d || e) && !gptq_.correct({target, d, e, u_.get(), order_.get(), inverse_.get(), n_, k_, o.alpha, o.beta}))
        q.fallback = q.kNoCorrection;
      gptq_scales_cuda({target, diagonal_.get(), scales, n_, k_, q.group, levels, o.search}, stream_);
      gptq_gather_columns_cuda(target, order_.get(), work, n_, k_, false, stream_);
      gptq_.solve({work, u_.get(), order_.get(), scales, codes, n_, k_, q.group, levels});
      if (o.refine) {
        const GptqRefineArgs refine{target, h_.get(), scales, codes, n_, k_, q.group, levels};
        gptq_.sweep(refine);
        gptq_.refit(refine);
        gptq_.sweep(refine);
        q.sweeps = 2;
      }
      q.damp = f_.damp;
      solved = true;
    }
    q.rows = losses({original_.get(), h_.get(), scales, codes, n_, k_, q.group, levels}, true);
    if (solved) {
      const std::vector<RowLoss> aimed = losses({target_.get(), h_.get(), scales, codes, n_, k_, q.group, levels}, false);
      for (int64_t i = 0; i < n_; ++i) q.rows[i].target_h = aimed[i].error_damped;
    }
    q.codes.resize(count);
    codes_.download(q.codes.data(), count, stream_);
    q.scales.resize(n_ * groups);
    scales_.download(q.scales.data(), n_ * groups, stream_);

    round(nullptr, false, q.group, levels, scales, codes);  // plain rounding, for the report
    const std::vector<RowLoss> plain = losses({original_.get(), h_.get(), scales, codes, n_, k_, q.group, levels}, false);
    for (int64_t i = 0; i < n_; ++i) q.rows[i].rtn_h = plain[i].error_h;
    return q;
  }

  void round(const float* weight, bool search, int64_t group, const Levels& l, uint16_t* scales, uint8_t* codes) {
    gptq_scales_cuda({original_.get(), weight, scales, n_, k_, group, l, search}, stream_);
    gptq_round_cuda({original_.get(), scales, codes, n_, k_, group, l}, stream_);
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
  GptqCuda gptq_;
  int64_t n_ = 0, k_ = 0;
  bool corrects_ = false, residual_ = false, ok_ = false;
  float scale_ = 0;
  HessianFactor f_;                            // order, dead, damping; h and u once fetched
  DeviceArray<float> h_, d_, u_;               // (K, K); h_ damped after factor()
  DeviceArray<float> e_;                       // (N, K)
  DeviceArray<float> diagonal_;                // (K) of h_
  DeviceArray<int32_t> order_, inverse_;       // (K)
  DeviceArray<uint8_t> dead_;                  // (K)
  DeviceArray<int> flag_;                      // (1)
  DeviceArray<float> original_, target_, work_;  // (N, K) weights: as given, corrected, in the factor's order
  DeviceArray<uint8_t> codes_;                 // (N, K)
  DeviceArray<uint16_t> scales_;               // (N, G)
  DeviceArray<RowSums> sums_;                  // (N)
  DeviceArray<double> distances_;
};

}  // namespace

std::unique_ptr<UnitSolver> make_cuda_unit_solver(Backend& b) {
  return guarded("quantiser", [&] { return std::make_unique<CudaUnitSolver>(b); });
}

}  // namespace q4s
