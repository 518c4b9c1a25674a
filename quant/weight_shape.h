// Moments and histogram of a projection's weights, with the normal fit (mean, sd) that the plots draw.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/weight_steps.h"
#include "quant/factor.h"

namespace q4s {

struct WeightShape {
  double mean = 0, sd = 0, skew = 0, kurtosis = 0;  // kurtosis 3: normal
  double low = 0, high = 0;
  std::vector<int64_t> histogram;  // 64 equal bins over mean +- 4 sd; the ends take what lies beyond
};
WeightShape weight_shape(const float* w, int64_t count, const Team&);

// The same from sums made elsewhere: pass(p, mean, sd) are those of pass p (kernels/weight_steps.h) over all
// pieces of the count > 0 weights. Added up in order.
using ShapePass = std::function<std::vector<ShapeSums>(int pass, double mean, double sd)>;
WeightShape weight_shape(int64_t count, const ShapePass& pass);

}  // namespace q4s
