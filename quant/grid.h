// The scale-only grids by name, and the one with zero points that exists for the error analysis alone.
#pragma once
#include <string>

#include "kernels/gptq.h"

namespace q4s {

enum class GridKind {
  kAsym,    // s (q - z), integer z: the seed's baseline, analysis only
  kSym7,    // -7..7, scale max|w|/7
  kSym8,    // -8..7, scale max|w|/7.5
  kHalf,    // s (q + 1/2), -8..7: never zero
  kSigned,  // -8..7, signed scale: the extreme weight is met exactly
  kInt8,    // -127..127: the fallback for a linear that four bits hurt
};

// Levels of a scale-only grid; kAsym has none (asserted).
Levels grid_levels(GridKind);
int grid_bits(GridKind);
const char* grid_name(GridKind);
GridKind parse_grid(const std::string& name);  // throws Error(kUsage) with the known names

}  // namespace q4s
