// f64 helpers of the quantiser's tests: random problems with correlated inputs, and plain dense algebra.
#pragma once
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/half.h"
#include "quant/solver.h"

namespace q4s::oracle {

using Matrix = std::vector<double>;

inline std::vector<float> gaussian(int64_t count, uint32_t seed, float sd = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, sd);
  std::vector<float> v(count);
  for (float& x : v) x = normal(rng);
  return v;
}

// Inputs whose columns are correlated and of different size, (T, K).
inline std::vector<float> inputs(int64_t tokens, int64_t k, uint32_t seed) {
  std::vector<float> x = gaussian(tokens * k, seed);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < k; ++j) {
      if (j > 0) x[t * k + j] = 0.8f * x[t * k + j - 1] + 0.6f * x[t * k + j];
    }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < k; ++j) x[t * k + j] *= 0.2f + float(j * 7 % 11) / 4.0f;
  return x;
}

inline std::vector<float> hessian(const std::vector<float>& x, int64_t tokens, int64_t k,
                                  double factor = 2.0) {
  std::vector<float> h(k * k);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      double s = 0;
      for (int64_t t = 0; t < tokens; ++t) s += double(x[t * k + i]) * x[t * k + j];
      h[i * k + j] = float(factor * s);
    }
  return h;
}

// x with a x = b for a (k, k), b (k, m): Gauss-Jordan with pivoting.
inline Matrix linear_solve(Matrix a, Matrix b, int64_t k, int64_t m) {
  for (int64_t c = 0; c < k; ++c) {
    int64_t pivot = c;
    for (int64_t i = c; i < k; ++i)
      if (std::fabs(a[i * k + c]) > std::fabs(a[pivot * k + c])) pivot = i;
    for (int64_t j = 0; j < k; ++j) std::swap(a[c * k + j], a[pivot * k + j]);
    for (int64_t j = 0; j < m; ++j) std::swap(b[c * m + j], b[pivot * m + j]);
    for (int64_t i = 0; i < k; ++i) {
      if (i == c) continue;
      const double f = a[i * k + c] / a[c * k + c];
      for (int64_t j = c; j < k; ++j) a[i * k + j] -= f * a[c * k + j];
      for (int64_t j = 0; j < m; ++j) b[i * m + j] -= f * b[c * m + j];
    }
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < m; ++j) b[i * m + j] /= a[i * k + i];
  return b;
}

inline Matrix widen(const std::vector<float>& a) { return Matrix(a.begin(), a.end()); }

// (w - q) H (w - q)^T of one row.
inline double row_loss(const float* w, const float* q, const std::vector<float>& h, int64_t k) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      sum += (double(w[i]) - q[i]) * double(h[i * k + j]) * (double(w[j]) - q[j]);
  return sum;
}

inline std::vector<float> values(const QuantizedLinear& q) {
  std::vector<float> v(q.n * q.k);
  q.dequantize(0, q.n, v.data());
  return v;
}

// A team of `count` parts run one after the other in reverse order: any order must do.
inline Team parts(int count) {
  return [count](const std::function<void(Part)>& fn) {
    for (int i = count - 1; i >= 0; --i) fn(Part{i, count});
  };
}

}  // namespace q4s::oracle
