// How linear_decode cuts its work: a pure function of the shape, so that it is testable without a device.
//
// A block owns a run of tile rows. K is cut in units of 128 columns; warp w of a block multiplies units w, w
// + slices ... of all its rows, so that the warps together read each row in order. Blocks work in passes:
// rounds of rows that are reduced together, or, where x does not fit a block's shared memory at once, phases
// of K over all of the block's rows.
#pragma once
#include "kernels/q4_tiles.h"

namespace q4s {

constexpr int kDecodeWarps = 16;       // a block
constexpr int kDecodeRing = 4 * 1024;  // bytes on their way to a warp
constexpr int kDecodeSlots = 4;        // most units of a ring, int4's
constexpr int kUnitTiles = 2, kUnitColumns = kUnitTiles * kQ4TileCols;

struct LinearDecodeConfig {
  int tokens = 0;  // of one launch
  int blocks = 0;  // each has `rows` tile rows, the first `more_rows` one more
  int rows = 0, more_rows = 0;
  int slices = 0;                 // warps of a block that have work
  int phases = 1;                 // parts of K that are staged one after another; 1: rounds
  int units = 0, more_units = 0;  // of a phase; the first `more_units` have one more
  int slice_units = 0;            // most units of a warp in a phase
  int round = 0;                  // most tile rows of a pass
  // Bytes: where a block's shared memory has what, and its size. At 0 the units on their way: (warps,
  // kDecodeRing); x: (warps, T, slice_units of 256 bytes, and 64); bias: (warps, slice_units * groups in a
  // unit, 8 or 16 tokens) int32; x_scale: likewise without groups, f32; gain, if any, in the place of the
  // partial sums if there is one phase: (warps, slice_units, 128) f32; scales: (2 where there are rounds,
  // round, groups, 16) fp16; partial sums: (round, slices, 16, T); sums of squares: (warps, T); what
  // epilogues load early: (threads) of 12 bytes; barriers: (warps, kDecodeSlots) of 8 bytes.
  int x = 0, bias = 0, x_scale = 0, gain = 0, scales = 0, partial = 0, squares = 0, early = 0, barriers = 0,
      shared = 0;
};

// Groups of scales in a unit.
constexpr int linear_decode_unit_groups(const Q4Layout& l) {
  return l.bits == 16 ? 0 : l.group >= l.k || l.group >= kUnitColumns ? 1 : int(kUnitColumns / l.group);
}

// As many of `tokens` at once as fit `shared_bytes` a block; `shared` is more than that where not even one
// does.
LinearDecodeConfig linear_decode_config(const Q4Layout&, int tokens, bool norm, int multiprocessors,
                                        int shared_bytes);

}  // namespace q4s
