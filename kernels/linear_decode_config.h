// How linear_decode cuts its work: a pure function of the shape, so that it is testable without a device.
#pragma once
#include "kernels/q4_tiles.h"

namespace q4s {

struct LinearDecodeConfig {
  int warps;        // a block
  int cluster;      // blocks that share a run of tile rows, each with its part of K
  int blocks;       // in all, a multiple of cluster
  int round;        // tile rows between two reductions
  int slice_tiles;  // longest part of K of one warp
  int tokens;       // of one launch
  int64_t shared;   // bytes of shared memory a block
};

struct LinearDecodeTuning {
  int pipe = 0, chunk = 4, stages = 3, warps = 8, cluster = 0, per_sm = 1;
};

}  // namespace q4s
