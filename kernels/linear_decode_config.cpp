#include "kernels/linear_decode_config.h"

#include <algorithm>

#include "kernels/types.h"

namespace q4s {
namespace {

constexpr int kMaxPhases = 16, kWarps = kDecodeWarps;
constexpr int64_t kScaleBytes = 16384;  // of a round, if it has more than one row

int64_t scale_row_bytes(const Q4Layout& l) { return l.groups() * kQ4TileRows * 2; }

// Lays out shared memory.
void place(LinearDecodeConfig& c, const Q4Layout& l, bool norm, int rows) {
  const int token_block = (c.tokens + 7) / 8 * 8;
  c.x = kWarps * kDecodeRing;
  c.bias = c.x + kWarps * c.tokens * (c.slice_units * kUnitColumns * 2 + 64);
  c.x_scale = c.bias + kWarps * c.slice_units * linear_decode_unit_groups(l) * token_block * 4;
  c.scales = c.x_scale + kWarps * c.slice_units * token_block * 4;
  c.partial = c.scales + (c.round < rows ? 2 : 1) * int(scale_row_bytes(l)) * c.round;
  // Gains are done with before sums begin, unless they are needed again for a further phase.
  const int sums = c.round * c.slices * kQ4TileRows * c.tokens * 4;
  const int gains = norm ? kWarps * c.slice_units * kUnitColumns * 4 : 0;
  c.gain = c.partial + (c.phases == 1 ? 0 : sums);
  c.squares = std::max(c.partial + sums, c.gain + gains);
  c.early = c.squares + kWarps * c.tokens * 4;
  c.barriers = (c.early + kWarps * 32 * 12 + 7) / 8 * 8;
  c.shared = c.barriers + kWarps * kDecodeSlots * 8;
}

}  // namespace

LinearDecodeConfig linear_decode_config(const Q4Layout& l, int tokens, bool norm, int multiprocessors,
                                        int shared_bytes) {
  LinearDecodeConfig c;
  const int units = int(ceil_div(l.k_tiles(), kUnitTiles));
  c.blocks = int(std::min<int64_t>(l.n_tiles(), multiprocessors));
  const int rows = int(ceil_div(l.n_tiles(), c.blocks));  // most of a block
  c.rows = int(l.n_tiles() / c.blocks);
  c.more_rows = int(l.n_tiles() % c.blocks);
  for (c.tokens = tokens;; c.tokens = (c.tokens + 1) / 2) {
    for (c.phases = 1; c.phases <= std::min(kMaxPhases, units); ++c.phases) {
      c.units = units / c.phases;
      c.more_units = units % c.phases;
      c.slices = std::min(kWarps, c.units);
      c.slice_units = int(ceil_div(c.units + (c.more_units > 0), c.slices));
      c.round = rows;
      if (c.phases > 1) {
        place(c, l, norm, rows);
        if (c.shared <= shared_bytes) return c;
        continue;
      }
      // Rounds of like size, one output pair a thread.
      const int by_scales = int(kScaleBytes / std::max<int64_t>(1, scale_row_bytes(l)));
      for (int most = std::max(1, std::min(kWarps * 32 / (8 * c.tokens), by_scales)); most >= 1; most /= 2) {
        c.round = int(ceil_div(rows, ceil_div(rows, most)));
        place(c, l, norm, rows);
        if (c.shared <= shared_bytes) return c;
      }
    }
    if (c.tokens == 1) return c;
  }
}

}  // namespace q4s
