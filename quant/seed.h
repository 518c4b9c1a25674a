// The analysis this project started from ("Remove zero_point in GPTQ-for-LLaMa by error analysis"),
// reproduced so that its figures can be checked: GPTQ with groups formed after act-order (a weight's group
// then depends on its rank, which needs a g_idx at run time) and scales from the minimum and maximum of the
// half-updated group. It can use zero points. Nothing of this is ever saved.
#pragma once
#include <vector>

#include "quant/solver.h"

namespace q4s {

struct SeedResult {
  std::vector<float> values;  // (N, K) dequantised, original column order
  std::vector<RowLoss> rows;  // (N)
};

// w (N, K). The factor carries damping (the seed's is 0.01) and the order. group 0: the whole row. A group's
// range is read from the weights as they were when its block of 128 columns began, as the seed does.
SeedResult seed_solve(const float* w, int64_t n, const HessianFactor&, GridKind, int64_t group, const Team&);

}  // namespace q4s
