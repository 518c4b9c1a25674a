#include "quant/unit_solver.h"

#include <algorithm>
#include <cassert>

#include "runtime/error.h"

namespace q4s {
namespace {

class CpuUnitSolver final : public UnitSolver {
 public:
  explicit CpuUnitSolver(ThreadPool& pool)
      : pool_(pool), team_([&pool](const std::function<void(Part)>& fn) { pool.run(fn); }) {}

  void begin(int64_t n, int64_t k, int64_t samples, bool corrects, bool residual) override {
    n_ = n, k_ = k;
    scale_ = 2.0f / float(samples);
    h_.assign(k * k, 0.0f);
    d_.assign(corrects ? k * k : 0, 0.0f);
    e_.assign(corrects && residual ? n * k : 0, 0.0f);
  }

  void begin_identity(int64_t n, int64_t k) override {
    begin(n, k, 1, false, false);
    factor_ = {};
    factor_.k = k;
    for (int64_t j = 0; j < k; ++j) h_[j * (k + 1)] = 1.0f;
    factor_.h = std::move(h_);
    factor_.dead.assign(k, 0);
  }

  void add(const float* x, const float* x_full, const float* r, const float* r_full,
           int64_t tokens) override {
    gram(x, x, h_, tokens, k_, true);
    if (!d_.empty()) gram(difference(x_full, x, tokens * k_), x, d_, tokens, k_, false);
    if (!e_.empty()) gram(difference(r_full, r, tokens * n_), x, e_, tokens, n_, false);
  }

  void finish() override {}

  double factor(double damp, bool act_order) override {
    for (int64_t i = 0; i < k_; ++i)
      for (int64_t j = 0; j < i; ++j) h_[i * k_ + j] = h_[j * k_ + i];
    factor_ = factor_hessian(std::move(h_), k_, damp, act_order, team_);
    return factor_.damp;
  }

  QuantizedLinear solve(float* w, const SolveOptions& o) override {
    const LinearProblem p{w, d_.empty() ? nullptr : d_.data(), e_.empty() ? nullptr : e_.data(), n_, k_};
    solved_ = q4s::solve(p, factor_, o, team_);
    QuantizedLinear q = solved_;
    q.codes = {}, q.scales = {};
    return q;
  }
  PackedWeight packed() override { return pack(solved_); }
  void values(float* to) override {
    team_([&](Part part) {
      const auto [begin, end] = part.of(n_);
      solved_.dequantize(begin, end, to + begin * k_);
    });
  }

  const HessianFactor& fetch() override { return factor_; }

  Distance distance(const float* x, const float* x_full, int64_t count) override {
    constexpr int64_t kPiece = 1 << 16;
    std::vector<Distance> pieces(ceil_div(count, kPiece));
    pool_.run([&](Part part) {
      const auto [begin, end] = part.of(int64_t(pieces.size()));
      for (int64_t p = begin; p < end; ++p)
        for (int64_t i = p * kPiece; i < std::min(count, (p + 1) * kPiece); ++i) {
          const double e = double(x_full[i]) - x[i];
          pieces[p].difference_2 += e * e;
          pieces[p].full_2 += double(x_full[i]) * x_full[i];
        }
    });
    Distance all;
    for (const Distance& d : pieces) all.difference_2 += d.difference_2, all.full_2 += d.full_2;
    return all;
  }

  void product(const ProductArgs& a) override {
    constexpr int64_t kRows = 64;  // of C: a piece of work
    pool_.run([&](Part part) {
      const auto [begin, end] = part.of(a.m, kRows);
      for (int64_t i = begin; i < end; i += kRows)
        dense_gemm(a.ta, a.tb, std::min(kRows, end - i), a.n, a.k, a.alpha,
                   a.a + i * (a.ta == Transpose::kYes ? 1 : a.lda), a.lda, a.b, a.ldb, a.beta,
                   a.c + i * a.ldc, a.ldc);
    });
  }
  HessianFactor factor_of(std::vector<float> h, int64_t k, double damp) override {
    return factor_hessian(std::move(h), k, damp, true, team_);
  }

 private:
  const float* difference(const float* a, const float* b, int64_t count) {
    difference_.resize(std::max(difference_.size(), size_t(count)));
    pool_.run([&](Part part) {
      const auto [begin, end] = part.of(count);
      for (int64_t i = begin; i < end; ++i) difference_[i] = a[i] - b[i];
    });
    return difference_.data();
  }
  void gram(const float* a, const float* x, std::vector<float>& sum, int64_t tokens, int64_t m, bool upper) {
    pool_.run([&](Part part) { gptq_gram_cpu({a, x, sum.data(), tokens, m, k_, scale_, upper}, part); });
  }

  ThreadPool& pool_;
  const Team team_;
  int64_t n_ = 0, k_ = 0;
  float scale_ = 0;
  std::vector<float> h_, d_;       // (K, K)
  std::vector<float> e_;           // (N, K)
  std::vector<float> difference_;  // (T, K) or (T, N)
  HessianFactor factor_;
  QuantizedLinear solved_;
};

}  // namespace

std::unique_ptr<UnitSolver> make_unit_solver(Backend& b, StageClock* clock) {
  if (b.name() == "cuda") return make_cuda_unit_solver(b, clock);
  return std::make_unique<CpuUnitSolver>(b.pool());
}

#ifndef Q4S_CUDA
std::unique_ptr<UnitSolver> make_cuda_unit_solver(Backend&, StageClock*) {
  throw Error(ErrorKind::kNoDevice, "this program was built without CUDA");
}
#endif

}  // namespace q4s
