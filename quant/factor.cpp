#include "quant/factor.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/dense.h"

namespace q4s {
namespace {

constexpr int64_t kBlock = 128;

// A = R R^T for the upper triangle of a diagonal block (n, n), in place, and X = R^-1. False: not positive.
template <class T>
bool factor_block(T* a, T* x, int64_t n, int64_t stride) {
  for (int64_t c = n - 1; c >= 0; --c) {
    for (int64_t i = c; i >= 0; --i) {
      T s = a[i * stride + c];
      for (int64_t l = c + 1; l < n; ++l) s -= a[i * stride + l] * a[c * stride + l];
      if (i == c && !(s > T(0) && std::isfinite(s))) return false;
      a[i * stride + c] = i == c ? std::sqrt(s) : s / a[c * stride + c];
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    x[c * stride + c] = T(1) / a[c * stride + c];
    for (int64_t i = c - 1; i >= 0; --i) {
      T s = 0;
      for (int64_t l = i + 1; l <= c; ++l) s += a[i * stride + l] * x[l * stride + c];
      x[i * stride + c] = -s / a[i * stride + i];
    }
  }
  return true;
}

// u = upper Cholesky factor of the inverse of h taken in `order`, from the last block column to the first.
// The block grid is fixed, so each number comes out the same whoever computes it.
template <class T>
bool invert(const std::vector<float>& h, const std::vector<int32_t>& order, int64_t k, std::vector<float>& u,
            const Team& team) {
  const Transpose no = Transpose::kNo, yes = Transpose::kYes;
  const int64_t blocks = ceil_div(k, kBlock);
  std::vector<T> a(k * k), x(k * k);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i; j < k; ++j) a[i * k + j] = T(h[int64_t(order[i]) * k + order[j]]);

  for (int64_t block = blocks - 1; block >= 0; --block) {
    const int64_t at = block * kBlock, size = std::min(kBlock, k - at);
    if (!factor_block(&a[at * k + at], &x[at * k + at], size, k)) return false;
    team([&](Part part) {  // the block column above: R = A X^T
      std::vector<T> copy(kBlock * size);
      for (int64_t p = part.index; p < block; p += part.count) {
        T* panel = &a[p * kBlock * k + at];
        for (int64_t i = 0; i < kBlock; ++i) std::copy(panel + i * k, panel + i * k + size, &copy[i * size]);
        dense_gemm(no, yes, kBlock, size, size, T(1), copy.data(), size, &x[at * k + at], k, T(0), panel, k);
      }
    });
    team([&](Part part) {  // what remains: A -= R R^T, upper triangle of blocks
      for (int64_t p = part.index; p < block; p += part.count) {
        const int64_t i = p * kBlock;
        dense_gemm(no, yes, kBlock, at - i, size, T(-1), &a[i * k + at], k, &a[i * k + at], k, T(1),
                   &a[i * k + i], k);
      }
    });
  }
  team([&](Part part) {  // X = R^-1, a block column at a time
    std::vector<T> sum(kBlock * kBlock);
    for (int64_t block = part.index; block < blocks; block += part.count) {
      const int64_t at = block * kBlock, size = std::min(kBlock, k - at);
      for (int64_t p = block - 1; p >= 0; --p) {
        const int64_t i = p * kBlock, next = i + kBlock;
        dense_gemm(no, no, kBlock, size, at + size - next, T(1), &a[i * k + next], k, &x[next * k + at], k,
                   T(0), sum.data(), size);
        dense_gemm(no, no, kBlock, size, kBlock, T(-1), &x[i * k + i], k, sum.data(), size, T(0),
                   &x[i * k + at], k);
      }
    }
  });
  u.assign(k * k, 0.0f);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = i; j < k; ++j) {
      u[i * k + j] = float(x[i * k + j]);
      if (!std::isfinite(u[i * k + j])) return u.clear(), false;
    }
  }
  return true;
}

}  // namespace

bool climb_damping(HessianFactor& f, std::vector<float> diagonal, bool finite, double damp, bool act_order,
                   const std::function<bool(const std::vector<float>& damped)>& attempt) {
  const int64_t k = f.k;
  f.dead.assign(k, 0);
  f.order.resize(k);
  std::iota(f.order.begin(), f.order.end(), 0);
  double mean = 0.0;
  for (int64_t j = 0; j < k; ++j) {
    if (diagonal[j] == 0.0f) f.dead[j] = 1, diagonal[j] = 1.0f;
    mean += diagonal[j];
  }
  mean /= double(k);
  if (!finite) return false;
  if (act_order) {
    std::stable_sort(f.order.begin(), f.order.end(),
                     [&](int32_t a, int32_t b) { return diagonal[a] > diagonal[b]; });
  }
  std::vector<float> damped(k);
  for (double d = damp; d <= 1.0; d = d > 0.0 ? 4.0 * d : 1e-4) {
    f.damp = d;
    f.lambda = d * mean;
    for (int64_t j = 0; j < k; ++j) damped[j] = float(diagonal[j] + f.lambda);
    if (attempt(damped)) return true;
  }
  return false;
}

HessianFactor factor_hessian(std::vector<float> h, int64_t k, double damp, bool act_order, const Team& team) {
  HessianFactor f;
  f.k = k;
  f.h = std::move(h);
  std::vector<float> diagonal(k);
  for (int64_t j = 0; j < k; ++j) diagonal[j] = f.h[j * (k + 1)];
  const auto finite = [](float v) { return std::isfinite(v); };
  climb_damping(f, std::move(diagonal), std::all_of(f.h.begin(), f.h.end(), finite), damp, act_order,
                [&](const std::vector<float>& damped) {
                  for (int64_t j = 0; j < k; ++j) f.h[j * (k + 1)] = damped[j];
                  return k <= kExactFactor ? invert<double>(f.h, f.order, k, f.u, team)
                                           : invert<float>(f.h, f.order, k, f.u, team) ||
                                                 invert<double>(f.h, f.order, k, f.u, team);
                });
  return f;
}

}  // namespace q4s
