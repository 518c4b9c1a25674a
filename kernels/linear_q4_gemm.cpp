// The shape -> config functions of linear_q4_gemm.h: how a product is cut into tiles and dealt to the SMs.
// Pure arithmetic, no CUDA: tested on the CPU.
#include "kernels/linear_q4_gemm.h"

#include <algorithm>
#include <cstdio>

namespace q4s {
namespace {

constexpr size_t kFlagBytes = 4096;  // head of the workspace: one flag per part of a split tile
constexpr int64_t kBandBytes = 24 << 20;  // activations that should stay in L2 while all rows pass

// Cycles of one SM. Constants from one H100: dense fp16 mma 2048 products a cycle, about 34 bytes of L2 and 13 of
// DRAM a cycle and SM.
constexpr double kL2 = 34, kDram = 13;

double tensor_cycles(const Q4GemmTile& t) {  // of one unit
  const double mma = double(t.rows) * std::max(t.columns, 32) * kQ4GemmUnit / 2048 * 1.05;
  const double convert = t.rows / 64 * 2 * 75.0;  // issue slots of a scheduler: 75 a warp and 64 x 64 block
  return std::max(mma, mma * 0.5 + convert);
}
double code_bytes(const Q4GemmTile& t) { return double(t.rows) * kQ4GemmUnit / 2 * 1.0625; }
double bytes(const Q4GemmTile& t) { return code_bytes(t) + 2.0 * t.columns * kQ4GemmUnit / t.cluster; }

double stream_cycles(const Q4GemmConfig& c) {
  const Q4GemmTile t{c.rows, c.columns, c.cluster};
  const double unit = std::max({tensor_cycles(t), bytes(t) / kL2, code_bytes(t) / kDram}) + 40;
  const double store = t.rows * t.columns / 24.0;
  double cycles = 5000 + double(ceil_div(c.whole, c.clusters)) * (unit * c.k_blocks + store);
  if (c.streamed) {
    const double units = double(c.streamed) * c.k_blocks / c.clusters;
    const double parts = std::max(1.0, double(c.clusters) / c.streamed);  // of one tile
    cycles += units * unit + store + 1500 + parts * t.rows * t.columns * 4 / 40.0;
  }
  return cycles;
}

double split_cycles(const Q4GemmConfig& c, int multiprocessors) {
  const Q4GemmTile t{c.rows, c.columns, 1};
  const int64_t blocks = int64_t(c.row_blocks) * c.column_blocks * c.splits;
  const double units = double(c.row_blocks) * c.column_blocks * c.k_blocks / multiprocessors;
  const double busiest = double(ceil_div(blocks, multiprocessors)) * double(ceil_div(c.k_blocks, c.splits));
  const double work = std::max({units * bytes(t) / kL2, units / c.column_blocks * code_bytes(t) / kDram,
                                busiest * (tensor_cycles(t) + 40)});
  const double share = double(t.rows) * t.columns * 4;
  return 4000 + work + share / 60 + share * double(blocks) / multiprocessors / 60;
}

}  // namespace

std::string Q4GemmConfig::print() const {
  char text[160];
  if (kernel == Q4GemmKernel::kStream)
    std::snprintf(text, sizeof text, "stream %dx%d cluster %d%s grid %d, tiles %d whole + %d streamed x %d units", rows,
                  columns, cluster, staggered ? " staggered" : "", clusters * cluster, whole, streamed, k_blocks);
  else if (kernel == Q4GemmKernel::kSplit)
    std::snprintf(text, sizeof text, "split %dx%d grid %dx%d, %d units in %d parts", rows, columns, row_blocks,
                  column_blocks, k_blocks, splits);
  else
    std::snprintf(text, sizeof text, "mma.sync %dx%d grid %dx%d, %d parts of K", rows, columns, row_blocks,
                  column_blocks, splits);
  return text;
}

Q4GemmConfig q4_gemm_config_stream(const Q4GemmShape& s, Q4GemmTile t, bool stream) {
  Q4GemmConfig c;
  c.kernel = Q4GemmKernel::kStream;
  c.rows = t.rows, c.columns = t.columns, c.cluster = t.cluster;
  c.k_blocks = int(ceil_div(s.w.k, kQ4GemmUnit));
  c.row_blocks = int(ceil_div(s.w.n_tiles() * kQ4TileRows, int64_t(t.rows) * t.cluster));
  c.column_blocks = int(ceil_div(s.tokens, t.columns));
  c.band = int(std::clamp(kBandBytes / (2 * s.w.k * t.columns), int64_t(1), int64_t(c.column_blocks)));
  c.staggered = true;
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

Q4GemmConfig q4_gemm_config_split(const Q4GemmShape& s, Q4GemmTile t, int splits) {
  Q4GemmConfig c;
  c.kernel = Q4GemmKernel::kSplit;
  c.rows = t.rows, c.columns = t.columns;
  c.k_blocks = int(ceil_div(s.w.k, kQ4GemmUnit));
  c.row_blocks = int(ceil_div(s.w.n_tiles() * kQ4TileRows, t.rows));
  c.column_blocks = int(ceil_div(s.tokens, t.columns));
  c.splits = std::min({splits, c.k_blocks, kQ4GemmMostSplits});
  c.workspace_bytes = kFlagBytes;
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
  const bool simple_groups = g == 32 || g % kQ4TileCols == 0 || g >= s.w.k;  // a stage: one group, or two of 32
  if (!s.hopper || !simple_groups) return q4_gemm_config_portable(s);
  Q4GemmConfig best;
  double best_cycles = 0;
  const auto consider = [&](const Q4GemmConfig& c, double cycles) {
    if (best.columns == 0 || cycles < best_cycles) best = c, best_cycles = cycles;
  };
  for (const Q4GemmTile& t : kQ4GemmStreamTiles)
    for (bool stream : {false, true}) {
      const Q4GemmConfig c = q4_gemm_config_stream(s, t, stream);
      consider(c, stream_cycles(c));
    }
  for (const Q4GemmTile& t : kQ4GemmSplitTiles)
    for (int splits = 1; splits <= kQ4GemmMostSplits; ++splits) {
      const Q4GemmConfig c = q4_gemm_config_split(s, t, splits);
      consider(c, split_cycles(c, s.multiprocessors));
    }
  return best;
}

}  // namespace q4s
