// The pure part of the int4 GEMM: the choice of a config, and that a schedule covers every unit of work once.
#include "kernels/linear_q4_gemm.h"

#include <doctest/doctest.h>

#include <random>
#include <stdexcept>
#include <vector>

#include "kernels/linear_q4_gemm_schedule.h"

using namespace q4s;

namespace {

Q4GemmShape shape(int64_t tokens, int64_t n, int64_t k, int64_t group = 128, RowMap map = RowMap::kPlain) {
  Q4GemmShape s{tokens, {}};
  s.w.n = n, s.w.k = k, s.w.group = group, s.w.map = map;
  return s;
}

// Every (tile, k block) once; every split tile's parts in the order of K on rising clusters, each cluster's
// part with begin > 0 being its first; every tile of the grid named once.
void check_schedule(const Q4GemmShape& s, const Q4GemmConfig& c) {
  CAPTURE(c.print());
  REQUIRE(c.kernel == Q4GemmKernel::kStream);
  REQUIRE(c.clusters >= 1);
  REQUIRE(c.clusters * c.cluster <= s.multiprocessors);
  const int tiles = c.whole + c.streamed;
  REQUIRE(int64_t(c.row_blocks) * c.rows * c.cluster >= s.w.n_tiles() * 16);
  REQUIRE(int64_t(c.column_blocks) * c.columns >= s.tokens);
  REQUIRE(tiles == c.row_blocks * c.column_blocks);
  const Q4GemmWork work{c.k_blocks, c.row_blocks, c.column_blocks, c.band, c.streamed, tiles, c.clusters};
  std::vector<int> done(tiles, 0), place(tiles, -1);
  std::vector<int> reached(tiles, 0);  // units of a tile so far, walking clusters upwards
  for (int v = 0; v < c.clusters; ++v) {
    Q4GemmSchedule schedule(work, v);
    Q4GemmPart part;
    bool first = true;
    while (schedule.next(part)) {
      REQUIRE(part.begin < part.end);
      REQUIRE(part.end <= c.k_blocks);
      if (part.begin > 0) REQUIRE(first);
      REQUIRE(reached[part.tile] == part.begin);
      reached[part.tile] = part.end;
      done[part.tile] += part.end - part.begin;
      const int at = part.column_block * c.row_blocks + part.row_block;
      REQUIRE(part.row_block < c.row_blocks);
      REQUIRE(part.column_block < c.column_blocks);
      REQUIRE((place[part.tile] == -1 || place[part.tile] == at));
      place[part.tile] = at;
      first = false;
    }
    // The kernel's wait for a later cluster's part relies on it having one.
    if (c.streamed) REQUIRE(schedule.first_unit(v) < schedule.first_unit(v + 1));
  }
  std::vector<bool> named(tiles, false);
  for (int t = 0; t < tiles; ++t) {
    REQUIRE(done[t] == c.k_blocks);
    REQUIRE(!named[place[t]]);
    named[place[t]] = true;
  }
}

// Tiles cover the product, each with rows of it; no part of K is empty.
void check_split(const Q4GemmShape& s, const Q4GemmConfig& c, int most_rows = 192) {
  CAPTURE(c.print());
  REQUIRE(c.kernel == Q4GemmKernel::kSplit);
  REQUIRE(c.rows % 16 == 0);
  REQUIRE(c.rows <= most_rows);
  REQUIRE(int64_t(c.row_blocks) * c.rows >= s.w.n_tiles() * 16);
  REQUIRE(int64_t(c.row_blocks - 1) * c.rows < s.w.n_tiles() * 16);
  REQUIRE(int64_t(c.column_blocks) * c.columns >= s.tokens);
  REQUIRE(int64_t(c.k_blocks) * kQ4GemmUnit >= s.w.k);
  REQUIRE(c.splits >= 1);
  REQUIRE(c.splits <= std::min(c.k_blocks, kQ4GemmMostSplits));
}

// Every cluster has row blocks, at once on the device.
void check_few(const Q4GemmShape& s, const Q4GemmConfig& c) {
  CAPTURE(c.print());
  REQUIRE(c.kernel == Q4GemmKernel::kFew);
  REQUIRE(int64_t(c.row_blocks) * c.rows >= s.w.n_tiles() * 16);
  REQUIRE(int64_t(c.column_blocks) * c.columns >= s.tokens);
  REQUIRE(int64_t(c.k_blocks) * kQ4GemmUnit >= s.w.k);
  REQUIRE(c.clusters >= 1);
  REQUIRE(c.clusters <= c.row_blocks);
  REQUIRE(c.clusters * c.splits <= std::max(s.multiprocessors, c.splits));
}

void check(const Q4GemmShape& s, const Q4GemmConfig& c) {
  if (c.kernel == Q4GemmKernel::kStream) return check_schedule(s, c);
  c.kernel == Q4GemmKernel::kFew ? check_few(s, c) : check_split(s, c);
}

}  // namespace

TEST_CASE("q4_gemm_config: every unit of work is dealt once, for every tile and shape") {
  std::mt19937_64 r(11);
  for (int i = 0; i < 300; ++i) {
    const Q4GemmShape s = shape(1 + int64_t(r() % 9000), 1 + int64_t(r() % 30000), 1 + int64_t(r() % 12000),
                                r() % 2 ? 128 : 32, r() % 2 ? RowMap::kPlain : RowMap::kPairHalves);
    const Q4GemmTile tile = kQ4GemmStreamTiles[r() % std::size(kQ4GemmStreamTiles)];
    check_schedule(s, q4_gemm_config_stream(s, tile, i % 2));
    const Q4GemmTile split = kQ4GemmSplitTiles[r() % std::size(kQ4GemmSplitTiles)];
    check_split(s, q4_gemm_config_split(s, split, 1 + int(r() % 8)), split.rows);
    Q4GemmShape few = s;
    few.tokens = 1 + s.tokens % kQ4GemmFewTokens;
    check_few(few, q4_gemm_config_few(few));
  }
}

TEST_CASE("q4_gemm_config: the choice") {
  for (int64_t tokens : {9, 16, 64, 128, 500, 2048, 8192})
    for (auto [n, k] :
         {std::pair<int64_t, int64_t>{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}, {576, 576}}) {
      const Q4GemmShape s = shape(tokens, n, k);
      const Q4GemmConfig c = q4_gemm_config(s);
      check(s, c);
      CHECK(c.print() == q4_gemm_config(s).print());
    }
  // Whole waves of large tiles when there is plenty of work.
  CHECK(q4_gemm_config(shape(8192, 22016, 4096)).kernel == Q4GemmKernel::kStream);
  // Few tokens: all multiprocessors read weights.
  const Q4GemmConfig few = q4_gemm_config(shape(32, 4096, 4096));
  CHECK(few.row_blocks * few.column_blocks * few.splits >= 90);
  // Rows are dealt so that they are as good as all at work, for as long.
  for (int64_t tokens : {32, 64, 128})
    for (auto [n, k] :
         {std::pair<int64_t, int64_t>{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}}) {
      const Q4GemmConfig c = q4_gemm_config(shape(tokens, n, k));
      CAPTURE(c.print());
      CHECK(c.kernel == Q4GemmKernel::kSplit);
      CHECK(c.row_blocks * c.column_blocks * c.splits >= 105);
      CHECK(c.row_blocks * c.column_blocks * c.splits <= 132);
    }
  // Groups that stages do not line up with, and devices without wgmma, take the portable kernel.
  CHECK(q4_gemm_config(shape(64, 4096, 4096, 96)).kernel == Q4GemmKernel::kPortable);
  Q4GemmShape old = shape(64, 4096, 4096);
  old.hopper = false;
  CHECK(q4_gemm_config(old).kernel == Q4GemmKernel::kPortable);
  CHECK_THROWS_AS(q4_gemm_config_few(shape(kQ4GemmFewTokens + 1, 4096, 4096)), std::logic_error);
}

TEST_CASE("q4_gemm_config_portable: parts of K are not empty, counters fit") {
  std::mt19937_64 r(12);
  for (int i = 0; i < 300; ++i) {
    const Q4GemmShape s = shape(1 + int64_t(r() % 900), 1 + int64_t(r() % 9000), 1 + int64_t(r() % 9000));
    const Q4GemmConfig c = q4_gemm_config_portable(s);
    REQUIRE(c.splits >= 1);
    REQUIRE(c.splits <= c.k_blocks);
    if (c.splits > 1) REQUIRE(c.row_blocks * c.column_blocks <= 1024);
  }
}
