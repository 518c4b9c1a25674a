// The definition of rms_norm.h; split over tokens.
#include "kernels/rms_norm.h"

#include <cmath>

#include "kernels/cpu_kernels.h"

namespace q4s {

void rms_norm_cpu(const RmsNormArgs& a, Part part) {
  const auto [begin, end] = part.of(a.tokens);
  for (int64_t t = begin; t < end; ++t) {
    const float* x = a.x + t * a.dim;
    float* y = a.y + t * a.dim;
    double sum = 0;
    for (int64_t i = 0; i < a.dim; ++i) sum += double(x[i]) * x[i];
    const double scale = 1 / std::sqrt(sum / double(a.dim) + a.eps);
    for (int64_t i = 0; i < a.dim; ++i) y[i] = float(a.w[i] * (x[i] * scale));
  }
}

void rms_norm(const RmsNormArgs& a, Part part) {
  const auto [begin, end] = part.of(a.tokens);
  cpu_kernels().rms_norm(a, begin, end);
}

}  // namespace q4s
