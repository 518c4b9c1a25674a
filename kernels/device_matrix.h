// A weight as the GPU holds it, raw device pointers: row-major in the file's format, or int4 in tiles.
#pragma once
#include "kernels/q4_tiles.h"

namespace q4s {

struct DeviceMatrix {
  WeightView view;   // kF32, kF16, kBF16, kQ8: data (n, k) and scales; kQ4: format, grid, n, k, group, no pointers
  Q4Layout layout;   // kQ4
  const uint8_t* codes = nullptr;    // kQ4: tiles
  const uint16_t* scales = nullptr;  // kQ4: (n_tile, group, 16)
};

}  // namespace q4s
