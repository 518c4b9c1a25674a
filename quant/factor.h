// From the Hessian of one input to what GPTQ needs of it: damped H, the order of the columns, and the upper
// Cholesky factor U of its inverse in that order (H = R R^T with R upper, U = R^-1: one factorisation is
// enough).
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/types.h"

namespace q4s {

// Runs a function once per worker, each with its share. The caller's thread pool behind a plain function.
using Team = std::function<void(const std::function<void(Part)>&)>;
inline void one_thread_team(const std::function<void(Part)>& fn) { fn(Part{}); }

struct HessianFactor {
  int64_t k = 0;
  std::vector<float> h;        // (K, K) H + lambda I, original order; a dead column has diagonal 1
  std::vector<float> u;        // (K, K) upper, in `order`; empty when nothing could be factored
  std::vector<int32_t> order;  // (K) columns by descending diagonal (stable), or as they are
  std::vector<uint8_t> dead;   // (K) 1: the input is always zero; the weight counts as 0
  double damp = 0;             // the damping used, as a fraction of the mean diagonal
  double lambda = 0;           // damp * mean diag H, as added to every diagonal entry
  bool ok() const { return !u.empty(); }
};

constexpr int64_t kExactFactor = 4096;  // the largest K that is factored in f64 at once

// h (K, K): symmetric, undamped, taken over. Damping starts at `damp` and is multiplied by 4 on a failed or
// non-finite factorisation until it passes 1; then ok() is false and the caller rounds to nearest. f64 up to
// kExactFactor, f32 above with f64 as the rescue. The same bits for every team.
HessianFactor factor_hessian(std::vector<float> h, int64_t k, double damp, bool act_order, const Team& team);

// The part of it that needs only the diagonal (K) of H: fills f's order, dead, damp and lambda, and calls
// attempt with the damped diagonal until it succeeds. False: `finite` (of all of H) was, or nothing worked.
bool climb_damping(HessianFactor& f, std::vector<float> diagonal, bool finite, double damp, bool act_order,
                   const std::function<bool(const std::vector<float>& damped)>& attempt);

}  // namespace q4s
