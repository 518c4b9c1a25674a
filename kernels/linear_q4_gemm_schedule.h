// Which parts of which tiles a cluster of the sm_90a GEMM computes, in order. Runs on the device; tested on
// the CPU.
#pragma once
#include "kernels/q4_tiles.h"

namespace q4s {

// The work of a launch, as in Q4GemmConfig.
struct Q4GemmWork {
  int k_blocks, row_blocks, column_blocks, band, streamed, tiles, clusters;
};

// K blocks [begin, end) of a tile. begin > 0: the sum goes to whoever has begin == 0, in the order of K.
struct Q4GemmPart {
  int row_block, column_block, tile, begin, end;
};

// Parts of cluster `v`: of its share of the units of the streamed tiles first a part with begin > 0, if it
// has one; then whole tiles; then the rest of the share. So one slot of the workspace a cluster is enough, it
// is written long before its reader looks, and clusters come to the ends of their tiles at different times.
class Q4GemmSchedule {
 public:
  Q4S_HOST_DEVICE Q4GemmSchedule(const Q4GemmWork& work, int v) : work_(work) {
    unit_ = first_unit(v);
    last_ = first_unit(v + 1);
    tile_ = work.streamed + v;
  }
  Q4S_HOST_DEVICE int64_t first_unit(int v) const {
    return int64_t(work_.streamed) * work_.k_blocks * v / work_.clusters;
  }
  Q4S_HOST_DEVICE bool next(Q4GemmPart& part) {
    const bool whole_left = tile_ < work_.tiles;
    if (unit_ < last_ && (unit_ % work_.k_blocks || !whole_left)) {
      part.tile = int(unit_ / work_.k_blocks);
      part.begin = int(unit_ - int64_t(part.tile) * work_.k_blocks);
      const int64_t left = part.begin + last_ - unit_;
      part.end = left < work_.k_blocks ? int(left) : work_.k_blocks;
      unit_ += part.end - part.begin;
    } else if (whole_left) {
      part.tile = tile_;
      part.begin = 0;
      part.end = work_.k_blocks;
      tile_ += work_.clusters;
    } else {
      return false;
    }
    // Bands of column blocks; rows outermost within one, so that neighbours share weights and activations in
    // L2.
    const int per_band = work_.band * work_.row_blocks, band = part.tile / per_band,
              in_band = part.tile % per_band;
    const int rest = work_.column_blocks - band * work_.band, width = rest < work_.band ? rest : work_.band;
    part.row_block = in_band / width;
    part.column_block = band * work_.band + in_band % width;
    return true;
  }

 private:
  const Q4GemmWork& work_;
  int tile_;
  int64_t unit_, last_;
};

}  // namespace q4s
