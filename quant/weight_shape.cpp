#include "quant/weight_shape.h"

#include <algorithm>
#include <cmath>

namespace q4s {
namespace {

void add(ShapeSums& p, const float* x, int64_t n, int pass, double mean, double sd) {
  if (pass == 0) {
    const auto [low, high] = std::minmax_element(x, x + n);
    p.low = *low;
    p.high = *high;
    for (int64_t i = 0; i < n; ++i) p.m1 += x[i];
  } else if (pass == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const double d = x[i] - mean, d2 = d * d;
      p.m2 += d2;
      p.m3 += d2 * d;
      p.m4 += d2 * d2;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const double bin = ((x[i] - mean) / sd + 4.0) * kShapeBins / 8.0;
      ++p.bins[int(std::clamp(bin, 0.0, kShapeBins - 1.0))];
    }
  }
}

}  // namespace

WeightShape weight_shape(int64_t count, const ShapePass& pass) {
  WeightShape s;
  s.histogram.assign(kShapeBins, 0);
  if (count == 0) return s;
  std::vector<ShapeSums> pieces = pass(0, 0, 0);
  s.low = pieces[0].low;
  s.high = pieces[0].high;
  for (const ShapeSums& p : pieces) {
    s.low = std::min(s.low, p.low);
    s.high = std::max(s.high, p.high);
    s.mean += p.m1;
  }
  s.mean /= double(count);
  double m2 = 0, m3 = 0, m4 = 0;
  for (const ShapeSums& p : pass(1, s.mean, 0)) m2 += p.m2, m3 += p.m3, m4 += p.m4;
  m2 /= double(count);
  s.sd = std::sqrt(m2);
  if (s.sd == 0.0) return s;
  s.skew = m3 / double(count) / (m2 * s.sd);
  s.kurtosis = m4 / double(count) / (m2 * m2);
  for (const ShapeSums& p : pass(2, s.mean, s.sd))
    for (int i = 0; i < kShapeBins; ++i) s.histogram[i] += p.bins[i];
  return s;
}

WeightShape weight_shape(const float* w, int64_t count, const Team& team) {
  return weight_shape(count, [&](int pass, double mean, double sd) {
    std::vector<ShapeSums> pieces(ceil_div(count, kShapePiece));
    team([&](Part part) {
      const auto [begin, end] = part.of(int64_t(pieces.size()));
      for (int64_t p = begin; p < end; ++p)
        add(pieces[p], w + p * kShapePiece, std::min(kShapePiece, count - p * kShapePiece), pass, mean, sd);
    });
    return pieces;
  });
}

}  // namespace q4s
