// The definition of swiglu.h; split over tokens.
#include "kernels/swiglu.h"

#include <cmath>

namespace q4s {

void swiglu_cpu(const SwigluArgs& a, Part part) {
  const auto [begin, end] = part.of(a.tokens);
  for (int64_t t = begin; t < end; ++t) {
    const float* gate = a.x + t * 2 * a.hidden;
    const float* up = gate + a.hidden;
    for (int64_t i = 0; i < a.hidden; ++i) {
      const double g = gate[i];
      a.y[t * a.hidden + i] = float(g / (1 + std::exp(-g)) * up[i]);
    }
  }
}

}  // namespace q4s
