// The definition of swiglu.h; split over tokens.
#include "kernels/swiglu.h"

#include <cmath>

#include "kernels/cpu_kernels.h"

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

void swiglu(const SwigluArgs& a, Part part) {
  constexpr int64_t kColumns = 256;  // a piece of one token's row; a multiple of every vector width
  const int64_t pieces = ceil_div(a.hidden, kColumns);
  const auto [begin, end] = part.of(a.tokens * pieces);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = i % pieces * kColumns;
    cpu_kernels().swiglu(a, i / pieces, column, std::min(a.hidden, column + kColumns));
  }
}

}  // namespace q4s
