// A weight as the GPU holds it, raw device pointers: row-major in the file's format, or in tiles.
#pragma once
#include "kernels/linear_decode.h"

namespace q4s {

struct DeviceMatrix {
  WeightView view;     // shape and format; data (n, k) where not tiled
  bool tiled = false;  // kQ4, kQ8; kF16 where the decode kernels shall read it
  TiledWeight tiles;
};

}  // namespace q4s
