// The definition of rotate.h: the Hadamard factor as a fast transform in double (exact up to rounding), then
// M.
#include "kernels/rotate.h"

#include <cmath>
#include <vector>

#include "kernels/cpu_kernels.h"

namespace q4s {
namespace {

// x = (H_p (x) I_m) x, unnormalised, in place.
void hadamard(double* x, int64_t p, int64_t m) {
  for (int64_t h = 1; h < p; h *= 2)
    for (int64_t i = 0; i < p; i += 2 * h)
      for (int64_t j = i * m; j < (i + h) * m; ++j) {
        const double a = x[j], b = x[j + h * m];
        x[j] = a + b;
        x[j + h * m] = a - b;
      }
}

}  // namespace

void rotate_cpu(const RotateArgs& a, Part part) {
  const int64_t p = a.dim / a.m, m = a.m;
  const double scale = 1 / std::sqrt(double(p));
  std::vector<double> v(a.dim);
  const auto [begin, end] = part.of(a.tokens);
  for (int64_t t = begin; t < end; ++t) {
    const float* x = a.x + t * a.dim;
    float* y = a.y + t * a.dim;
    for (int64_t i = 0; i < a.dim; ++i) v[i] = a.inverse ? x[i] : double(x[i]) * a.signs[i];
    hadamard(v.data(), p, m);
    for (int64_t i = 0; i < p; ++i)
      for (int64_t j = 0; j < m; ++j) {  // row i of (p, m) times M, or M^T
        double sum = 0;
        for (int64_t l = 0; l < m; ++l)
          sum += v[i * m + l] * (a.inverse ? a.factor[j * m + l] : a.factor[l * m + j]);
        y[i * m + j] = float(sum * scale * (a.inverse ? a.signs[i * m + j] : 1));
      }
  }
}

void rotate(const RotateArgs& a, Part part) {
  if (a.m > kMostFactor) return rotate_cpu(a, part);
  const auto [begin, end] = part.of(a.tokens);
  cpu_kernels().rotate(a, begin, end);
}

}  // namespace q4s
