#include "kernels/linear_decode_config.h"

#include <algorithm>

#include "kernels/types.h"

namespace q4s {
namespace {

constexpr int kFewStages = 4;  // of a ring that hides the memory's latency

// Lays out shared memory with at most `limit` units of a row at a time.
LinearDecodeConfig place(const LinearDecodeShape* shapes, size_t count, int tokens, int multiprocessors,
                         int shared_bytes, int limit) {
  LinearDecodeConfig c;
  c.tokens = tokens;
  c.blocks = multiprocessors;
  int x_units = 0, meta = 0, squares = 0, sums = 0, groups = 0, bits = 4;
  for (size_t i = 0; i < count; ++i) {
    const Q4Layout& l = shapes[i].layout;
    LinearDecodePart& part = c.part[i];
    part.rows = int(l.n_tiles() / c.blocks);
    part.more_rows = int(l.n_tiles() % c.blocks);
    part.units = int(ceil_div(l.k_tiles(), kUnitTiles));
    part.phases = int(ceil_div(part.units, limit));
    part.phase_units = int(ceil_div(part.units, part.phases));
    const int unit_groups = linear_decode_unit_groups(l);
    x_units = std::max(x_units, part.phase_units);
    meta = std::max(meta, part.phase_units * linear_decode_meta(unit_groups));
    if (shapes[i].norm) squares = std::max(squares, part.units);
    if (part.phases > 1) sums = std::max(sums, part.rows + (part.more_rows > 0));
    groups = std::max(groups, unit_groups);
    bits = l.bits;
  }
  c.stride = x_units * kUnitColumns * 2 + 64;
  c.stage_scales = kDecodeWarps * kUnitTiles * kQ4TileBytes * (bits / 4);
  c.stage_bytes = c.stage_scales + kDecodeWarps * groups * kQ4TileRows * 2;
  const auto layout = [&](int stages) {
    c.stages = stages;
    c.x = stages * c.stage_bytes;
    c.meta = c.x + tokens * c.stride;
    c.squares = c.meta + meta * tokens * 4;
    c.partial = int(round_up(c.squares + squares * tokens * 4, 16));
    c.sums = c.partial + kDecodeMeetings * kDecodeWarps * tokens * kQ4TileRows * 4;
    c.norm = c.sums + sums * tokens * kQ4TileRows * 4;
    c.barriers = int(round_up(c.norm + kDecodeReducers * tokens * 4, 8));
    c.shared = c.barriers + 2 * (kDecodeStages + kDecodeMeetings) * 8;
  };
  layout(0);
  layout(std::clamp((shared_bytes - c.shared) / c.stage_bytes, 2, kDecodeStages));
  return c;
}

}  // namespace

LinearDecodeConfig linear_decode_config(const LinearDecodeShape* shapes, size_t count, int tokens,
                                        int multiprocessors, int shared_bytes) {
  int units = 1;
  for (size_t i = 0; i < count; ++i)
    units = std::max(units, int(ceil_div(shapes[i].layout.k_tiles(), kUnitTiles)));
  for (;; tokens = (tokens + 1) / 2) {
    LinearDecodeConfig best;
    for (int parts = 1; parts <= std::min(16, units); ++parts) {
      const LinearDecodeConfig c =
          place(shapes, count, tokens, multiprocessors, shared_bytes, int(ceil_div(units, parts)));
      if (best.blocks == 0 || (best.shared > shared_bytes && c.shared <= shared_bytes) ||
          (best.stages < kFewStages && c.stages > best.stages && c.shared <= shared_bytes))
        best = c;
    }
    if (best.shared <= shared_bytes || tokens == 1) return best;
  }
}

}  // namespace q4s
