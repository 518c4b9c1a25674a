// A weight as the GPU holds it, raw device pointers: row-major in the file's format, or in tiles (kQ4, kQ8).
#pragma once
#include "kernels/linear_decode.h"

namespace q4s {

struct DeviceMatrix {
  WeightView view;    // shape and format; data (n, k) where not tiled
  TiledWeight tiles;  // kQ4, kQ8
  bool tiled() const { return view.format == Format::kQ4 || view.format == Format::kQ8; }
};

}  // namespace q4s
