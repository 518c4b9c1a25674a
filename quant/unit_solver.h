// From the inputs of one unit (linears that read the same input) to its codes, where the activations are:
// sums over tokens, factorisation and solve on the CPU or on the GPU. The recipe of a solve is that of
// quant/solver.h on both; statistics and factor never leave the GPU unless fetched.
#pragma once
#include <memory>

#include "kernels/dense.h"
#include "quant/pack.h"
#include "quant/solver.h"
#include "quant/stage_clock.h"
#include "runtime/backend.h"

namespace q4s {

struct Distance {
  double difference_2 = 0, full_2 = 0;  // sums of (x_full - x)^2 and of x_full^2
};

// C (m, n) = alpha op(A) op(B) + beta C, row-major, all in backend memory, as dense_gemm.
struct ProductArgs {
  Transpose ta, tb;
  int64_t m, n, k;
  float alpha;
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float beta;
  float* c;
  int64_t ldc;
};

// Calls come in the order of the declarations, solve() as often as wanted.
class UnitSolver {
 public:
  virtual ~UnitSolver() = default;
  // H = 0, and D, E where the correction towards full precision and the repair of the residual stream are
  // wanted.
  virtual void begin(int64_t n, int64_t k, int64_t samples, bool corrects, bool residual) = 0;
  // H = I, nothing summed or factored: for plain rounding without a calibration.
  virtual void begin_identity(int64_t n, int64_t k) = 0;
  // Backend memory: x, x_full (T, K) inputs of the quantised and of the full-precision model's linear; r,
  // r_full (T, N) their residual streams. Only x is read unless begin() asked for the others.
  virtual void add(const float* x, const float* x_full, const float* r, const float* r_full,
                   int64_t tokens) = 0;
  // Ends the sums.
  virtual void finish() = 0;
  // Returns the damping used. Where nothing could be factored, solve() will round to nearest.
  virtual double factor(double damp, bool act_order) = 0;
  // w (N, K) in backend memory; columns of dead inputs become 0 in it. Codes and scales stay with the solver:
  // the result has everything else.
  virtual QuantizedLinear solve(float* w, const SolveOptions&) = 0;
  // What was solved last: as it goes into the file, and (N, K) in backend memory as the packed kernels
  // compute with it.
  virtual PackedWeight packed() = 0;
  virtual void values(float* to) = 0;
  // The factor in host memory, with h and u.
  virtual const HessianFactor& fetch() = 0;

  // Of two arrays in backend memory; at any time.
  virtual Distance distance(const float* x, const float* x_full, int64_t count) = 0;
  virtual void product(const ProductArgs&) = 0;  // at any time
  // factor_hessian() with act-order of another matrix (K, K) in host memory; at any time but between add()
  // and factor().
  virtual HessianFactor factor_of(std::vector<float> h, int64_t k, double damp) = 0;
};

// By the backend's name. The GPU's marks the stages inside a solve with the clock, where there is one.
std::unique_ptr<UnitSolver> make_unit_solver(Backend&, StageClock* clock = nullptr);
std::unique_ptr<UnitSolver> make_cuda_unit_solver(Backend&, StageClock*);

}  // namespace q4s
