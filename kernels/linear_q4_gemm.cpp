// The shape -> config functions of linear_q4_gemm.h: how a product is cut into tiles and dealt to the SMs.
// Pure arithmetic, no CUDA: tested on the CPU.
#include "kernels/linear_q4_gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

namespace q4s {
namespace {

constexpr size_t kFlagBytes = 4096;       // head of the workspace: one flag per part of a split tile
constexpr int64_t kBandBytes = 24 << 20;  // activations that should stay in L2 while all rows pass

// Clusters of so many blocks, one a multiprocessor, that run at once.
int clusters_at_once(int multiprocessors, int blocks) {
  // A cluster stays within a group of multiprocessors, and these differ in size. Asked of an H100.
  constexpr int kOfH100[kQ4GemmMostSplits] = {132, 66, 39, 30, 22};
  if (multiprocessors == kOfH100[0]) return kOfH100[blocks - 1];
  return std::max(1, blocks <= 2 ? multiprocessors / blocks : multiprocessors * 7 / 8 / blocks);
}

// Microseconds of one H100. kStream and kSplit: constants fitted to a sweep over all tiles and cuts of the 7B
// shapes, 32 to 2048 tokens (prefill_bench_cuda --sweep); what it then chooses was within 1.1 % of the best
// in all 40 products. kFew: to what the four products take alone at 16 tokens.
struct Bytes {  // of one unit of K and one tile
  double weights, activations;
  explicit Bytes(const Q4GemmTile& t)
      : weights(t.rows * kQ4GemmUnit / 2 * 1.0625), activations(2.0 * t.columns * kQ4GemmUnit / t.cluster) {}
};

double stream_us(const Q4GemmConfig& c, int multiprocessors) {
  const Q4GemmTile t{c.rows, c.columns, c.cluster};
  const Bytes bytes(t);
  const double tile = t.rows * t.columns / 32768.0;  // of the largest
  const double busy = std::min(1.0, double(c.clusters) * c.cluster / multiprocessors);
  const double unit = std::max(tile * 1.34 + 0.2, (bytes.weights + bytes.activations) * busy / 42000);
  const double store = 3.0 * tile;
  double us = 2.3 + double(ceil_div(c.whole, c.clusters)) * (unit * c.k_blocks + store);
  if (c.streamed)
    us += double(c.streamed) * c.k_blocks / c.clusters * unit + store + 6.0 +
          1.95 * tile * std::max(1.0, double(c.clusters) / c.streamed);
  return us;
}

double split_us(const Q4GemmConfig& c, int multiprocessors) {
  const Bytes bytes({c.rows, c.columns, 1});
  // Conversion and tensor core add up: what a warpgroup takes for a unit, also one without rows.
  const double compute = 0.104 + (c.rows <= 128 ? 2 : 3) * (0.042 + 0.0026 * c.columns);
  const int64_t clusters = int64_t(c.row_blocks) * c.column_blocks,
                at_once = clusters_at_once(multiprocessors, c.splits);
  const auto wave = [&](int64_t count) {
    const double busy = double(count) * c.splits / multiprocessors;
    const double unit =
        std::max({compute, bytes.weights * busy / std::min<int64_t>(count, c.column_blocks) / 25200,
                  (bytes.weights + bytes.activations) * busy / 45200});
    return double(ceil_div(c.k_blocks, c.splits)) * unit;
  };
  const int64_t waves = clusters / at_once, rest = clusters % at_once;
  return 1.8 + 0.25 * (c.splits - 1) + 0.4 * (c.rows / 128.0) * (c.columns / 64.0) +
         double(waves + (rest > 0) - 1) * 2.8 + double(waves) * wave(at_once) + (rest ? wave(rest) : 0);
}

double few_us(const Q4GemmConfig& c) {
  const int64_t most = ceil_div(c.row_blocks, c.clusters), bands = ceil_div(most, 24),
                pairs = ceil_div(ceil_div(most, bands), 2);
  // A warp's way through a unit, of which 12 / pairs go at once; its activations.
  const double unit = std::max(0.95 * double(pairs) / 12, 0.25);
  return 5.5 + double(bands * ceil_div(c.k_blocks, c.splits)) * unit;
}

}  // namespace

std::string Q4GemmConfig::print() const {
  char text[160];
  if (kernel == Q4GemmKernel::kStream)
    std::snprintf(text, sizeof text,
                  "stream %dx%d cluster %d grid %d, tiles %d whole + %d streamed x %d units", rows, columns,
                  cluster, clusters * cluster, whole, streamed, k_blocks);
  else if (kernel == Q4GemmKernel::kSplit)
    std::snprintf(text, sizeof text, "split %dx%d grid %dx%d, %d units in %d parts", rows, columns,
                  row_blocks, column_blocks, k_blocks, splits);
  else if (kernel == Q4GemmKernel::kFew)
    std::snprintf(text, sizeof text, "few %dx%d, %d tiles of rows over %d clusters, %d units in 2 parts",
                  rows, columns, row_blocks, clusters, k_blocks);
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
  c.columns = t.columns;
  c.k_blocks = int(ceil_div(s.w.k, kQ4GemmUnit));
  c.column_blocks = int(ceil_div(s.tokens, t.columns));
  c.splits = std::min({splits, c.k_blocks, kQ4GemmMostSplits});
  const int64_t at_once = std::max(1, clusters_at_once(s.multiprocessors, c.splits) / c.column_blocks);
  const int64_t waves = ceil_div(s.w.n_tiles(), at_once * (t.rows / kQ4TileRows));
  const int64_t row_tiles = ceil_div(s.w.n_tiles(), at_once * waves);
  c.rows = int(row_tiles) * kQ4TileRows;
  c.row_blocks = int(ceil_div(s.w.n_tiles(), row_tiles));
  c.workspace_bytes = kFlagBytes;
  return c;
}

Q4GemmConfig q4_gemm_config_few(const Q4GemmShape& s) {
  if (s.tokens > kQ4GemmFewTokens) throw std::logic_error("q4_gemm: too many tokens for the kernel for few");
  Q4GemmConfig c;
  c.kernel = Q4GemmKernel::kFew;
  c.rows = kQ4TileRows, c.columns = kQ4GemmFewTokens, c.splits = 2;
  c.k_blocks = int(ceil_div(s.w.k, kQ4GemmUnit));
  c.row_blocks = int(s.w.n_tiles());
  c.column_blocks = 1;
  c.clusters = std::clamp(s.multiprocessors / c.splits, 1, c.row_blocks);
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
  if (!s.hopper || s.w.bits != 4 || !q4_gemm_simple_groups(s.w)) return q4_gemm_config_portable(s);
  Q4GemmConfig best;
  double best_us = 0;
  const auto consider = [&](const Q4GemmConfig& c, double us) {
    if (best.columns == 0 || us < best_us) best = c, best_us = us;
  };
  for (const Q4GemmTile& t : kQ4GemmStreamTiles)
    for (bool stream : {false, true}) {
      const Q4GemmConfig c = q4_gemm_config_stream(s, t, stream);
      consider(c, stream_us(c, s.multiprocessors));
    }
  if (s.tokens <= kQ4GemmFewTokens) {
    const Q4GemmConfig c = q4_gemm_config_few(s);
    consider(c, few_us(c));
  }
  for (const Q4GemmTile& t : kQ4GemmSplitTiles) {
    // Up to 128 tokens convert a weight once.
    if (s.tokens <= kQ4GemmFewTokens || (t.columns < 128 && t.columns < s.tokens)) continue;
    // Clusters of three blocks may be the best alone, but a layer with them took 10 to 20 us more than its
    // products: they wait for places beside each other that the product before leaves last.
    for (int splits : {1, 2, 4, 5}) {
      const Q4GemmConfig c = q4_gemm_config_split(s, t, splits);
      consider(c, split_us(c, s.multiprocessors));
    }
  }
  return best;
}

}  // namespace q4s
