// The shape -> config functions of linear_q4_gemm.h: how a product is cut into tiles and dealt to the SMs.
// Pure arithmetic, no CUDA: tested on the CPU.
#include "kernels/linear_q4_gemm.h"

#include <algorithm>
#include <cstdio>

namespace q4s {
namespace {

constexpr int kStageColumns = 128;   // K columns of one pipeline stage of the sm_90a kernel
constexpr size_t kFlagBytes = 4096;  // head of the workspace: one flag per part of a split tile
constexpr int64_t kBandBytes = 24 << 20;  // activations that should stay in L2 while all rows pass

// Cycles of one unit (rows x columns x 128) on one SM: whichever of these limits it. Constants from one H100:
// dense fp16 mma 2048 products a cycle at N >= 64, about 34 bytes of L2 and 13 of DRAM a cycle and SM.
double unit_cycles(const Q4GemmTile& t) {
  const double mma = double(t.rows) * std::max(t.columns, 32) * kStageColumns / 2048 * 1.08;
  const double convert = t.rows / 64 * 2 * 75.0;  // issue slots of a scheduler: 75 a warp and 64 x 64 block
  const double codes = double(t.rows) * kStageColumns / 2 * 1.0625, acts = 2.0 * t.columns * kStageColumns;
  return std::max({mma, mma * 0.5 + convert, (codes + acts / t.cluster) / 34, codes / 13}) + 40;
}

}  // namespace

std::string Q4GemmConfig::print() const {
  char text[160];
  if (hopper)
    std::snprintf(text, sizeof text, "wgmma %dx%d cluster %d grid %d, tiles %d whole + %d streamed x %d k-blocks",
                  rows, columns, cluster, clusters * cluster, whole, streamed, k_blocks);
  else
    std::snprintf(text, sizeof text, "mma.sync %dx%d grid %dx%d, %d parts of K", rows, columns, row_blocks,
                  column_blocks, splits);
  return text;
}

Q4GemmConfig q4_gemm_config(const Q4GemmShape& s, Q4GemmTile t, bool stream) {
  Q4GemmConfig c;
  c.hopper = true;
  c.rows = t.rows, c.columns = t.columns, c.cluster = t.cluster;
  c.k_blocks = int(ceil_div(s.w.k, kStageColumns));
  c.row_blocks = int(ceil_div(s.w.n_tiles() * kQ4TileRows, int64_t(t.rows) * t.cluster));
  c.column_blocks = int(ceil_div(s.tokens, t.columns));
  c.band = int(std::clamp(kBandBytes / (2 * s.w.k * t.columns), int64_t(1), int64_t(c.column_blocks)));
  const int tiles = c.row_blocks * c.column_blocks, most = std::max(1, s.multiprocessors / t.cluster);
  // A part shorter than a few units costs more in filling the pipeline and summing than it saves.
  constexpr int64_t kLeastUnits = 4;
  c.streamed = stream ? tiles % most : 0;
  const int64_t parts = int64_t(c.streamed) * c.k_blocks / kLeastUnits;
  if (parts < c.streamed || (tiles > most && parts < most)) c.streamed = 0;
  c.whole = tiles - c.streamed;
  c.clusters = int(c.streamed && !c.whole ? std::min<int64_t>(most, parts) : std::min(most, c.whole));
  c.workspace_bytes = kFlagBytes;
  if (c.streamed) c.workspace_bytes += size_t(c.clusters) * t.cluster * t.rows * t.columns * 4;
  return c;
}

Q4GemmConfig q4_gemm_config_portable(const Q4GemmShape& s) {
  Q4GemmConfig c;
  c.rows = 128, c.columns = s.tokens <= 16 ? 16 : 64;
  c.k_blocks = int(s.w.k_tiles());
  c.row_blocks = int(ceil_div(s.w.n_tiles() * kQ4TileRows, c.rows));
  c.column_blocks = int(ceil_div(s.tokens, c.columns));
  // Two blocks fit a multiprocessor. Split K while a part keeps 8 tiles.
  const int64_t tiles = int64_t(c.row_blocks) * c.column_blocks;
  c.splits = int(std::clamp<int64_t>(2 * s.multiprocessors / tiles, 1, std::max(1, c.k_blocks / 8)));
  // One arrival counter a tile; a split product has fewer tiles than two waves.
  c.workspace_bytes = kFlagBytes;
  if (c.splits > 1) c.workspace_bytes += size_t(tiles) * c.splits * c.rows * c.columns * 4;
  return c;
}

Q4GemmConfig q4_gemm_config(const Q4GemmShape& s) {
  const int64_t g = s.w.group;
  const bool simple_groups = g == 32 || g == 64 || g % kStageColumns == 0 || g >= s.w.k;
  if (!s.hopper || !simple_groups) return q4_gemm_config_portable(s);
  Q4GemmConfig best;
  double best_cycles = 0;
  for (const Q4GemmTile& t : kQ4GemmTiles) {
    if (t.columns >= 2 * s.tokens && t.columns > 16) continue;
    for (bool stream : {false, true}) {
      const Q4GemmConfig c = q4_gemm_config(s, t, stream);
      const double unit = unit_cycles(t), tile = unit * c.k_blocks + 1500 + 10.0 * t.columns;
      double cycles = 3000 + double(ceil_div(c.whole, c.clusters)) * tile;
      if (c.streamed) {
        const double units = double(c.streamed) * c.k_blocks / c.clusters;
        const double parts = std::max(1.0, double(c.clusters) / c.streamed);  // of one tile
        cycles += units * unit + 1500 + 10.0 * t.columns + 1500 + parts * t.rows * t.columns * 4 / 40.0;
      }
      if (best.columns == 0 || cycles <= best_cycles) best = c, best_cycles = cycles;
    }
  }
  return best;
}

}  // namespace q4s
