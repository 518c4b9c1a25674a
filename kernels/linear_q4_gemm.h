// y = x W^T for many tokens, W in Q4 tiles (q4_tiles.h), x fp16, fp32 accumulation on the tensor cores. W is
// int4; the mma.sync kernel takes int8 too, for the head of a model.
//
// The product is computed as y^T = W x^T: the int4 weights become the register operand of the mma, tokens are
// its columns. Four kernels: three for sm_90a (warpgroup mma, TMA, clusters), from many tokens to few, and
// a plain mma.sync one for sm_80 and up, which also takes the group sizes the others do not. Values: w' =
// fp16(scale * (q - 8)) (or q - 7.5), so |y - exact| <= sum |w x| (2^-11 + 2^-11 + small) when x was rounded
// from f32; w itself where the sums of a group are scaled (up to 64 tokens, groups of 128 or more). Sums run
// in an order fixed by shape and config: the same bits at every run.
#pragma once
#include <cstddef>
#include <string>

#include "kernels/cuda_stream.h"
#include "kernels/q4_tiles.h"
#include "kernels/rope_kv.h"

namespace q4s {

struct Q4GemmShape {
  int64_t tokens;
  Q4Layout w;
  int multiprocessors = 132;
  bool hopper = true;  // sm_90a instructions available
};

enum class Q4GemmKernel : uint8_t {
  kStream,    // sm_90a, persistent: parts of (tile, K) dealt over the clusters
  kSplit,     // sm_90a: a tile of even shares of the rows is computed by a cluster, each block a part of K
  kFew,       // sm_90a, persistent: tiles of rows dealt over clusters, each of whose blocks has a part of K
  kPortable,  // mma.sync
};
constexpr int kQ4GemmUnit = 128;  // columns of W: K is cut by units on sm_90a
// Whether a unit is in one group; whether it is, or has whole groups: what the sm_90a kernels take.
inline bool q4_gemm_one_group(const Q4Layout& w) { return w.group % kQ4GemmUnit == 0 || w.group >= w.k; }
inline bool q4_gemm_simple_groups(const Q4Layout& w) {
  return w.group == 32 || w.group == 64 || q4_gemm_one_group(w);
}

// How a product is cut. A block computes rows x columns of y^T.
// kStream: `cluster` blocks below each other share the activations by multicast. Work is counted in (tile,
// unit); `whole` tiles go to one cluster each, round robin; the units of the `streamed` ones are dealt evenly
// over the clusters, their parts summed in order.
// kFew: one column block. Two blocks a cluster, each half of K; each of `clusters` has a run of row blocks of
// 16.
struct Q4GemmConfig {
  Q4GemmKernel kernel = Q4GemmKernel::kPortable;
  int rows = 0, columns = 0, cluster = 1;
  int k_blocks = 0;                       // units of K; kPortable: tiles of 64 columns
  int row_blocks = 0, column_blocks = 0;  // tiles (of a cluster): row_blocks covers rows * cluster rows each
  int band = 1;                           // column blocks that run beside each other, for L2
  int clusters = 0;                       // launched by kStream, kFew
  int streamed = 0, whole = 0;            // tiles; the streamed ones come first
  int splits = 1;                         // kSplit, kFew, kPortable: parts of K
  size_t workspace_bytes = 0;
  std::string print() const;
};

// Tiles of the sm_90a kernels (rows, columns, cluster), which the choice below picks from.
struct Q4GemmTile {
  int rows, columns, cluster;
};
constexpr Q4GemmTile kQ4GemmStreamTiles[] = {{128, 128, 1}, {128, 256, 2}};
// Of kSplit, with the most rows.
constexpr Q4GemmTile kQ4GemmSplitTiles[] = {{128, 32, 1}, {192, 32, 1},  {128, 64, 1},
                                            {192, 64, 1}, {128, 128, 1}, {192, 128, 1}};
constexpr int kQ4GemmMostSplits = 5;  // blocks of a cluster
constexpr int kQ4GemmFewTokens = 16;  // most that kFew takes
// Most tokens for which int8 weights are multiplied here and not turned into fp16 for cuBLAS. A head of 32000
// x 4096: 112 us for 297 at 64 tokens; 280 an earlier build at 128, where cuBLAS was not measured.
constexpr int64_t kQ4GemmInt8Tokens = 128;

// kStream with one tile; `stream` deals the tiles beyond full waves in parts.
Q4GemmConfig q4_gemm_config_stream(const Q4GemmShape&, Q4GemmTile, bool stream);
// kSplit with one tile and at most `splits` parts of K: rows in as few waves as the tile allows, the same
// count in all blocks but the last.
Q4GemmConfig q4_gemm_config_split(const Q4GemmShape&, Q4GemmTile, int splits);
// kFew; throws std::logic_error for more than kQ4GemmFewTokens tokens.
Q4GemmConfig q4_gemm_config_few(const Q4GemmShape&);
// The mma.sync kernel.
Q4GemmConfig q4_gemm_config_portable(const Q4GemmShape&);
// The best of them by an estimate of the time. Pure.
Q4GemmConfig q4_gemm_config(const Q4GemmShape&);

// Rows of every matrix that q4_gemm reads: k rounded up to whole tiles.
constexpr int64_t q4_gemm_pitch(int64_t k) { return round_up(k, kQ4TileCols); }

struct Q4GemmActivationsArgs {
  const float* x;     // (T, K)
  const float* gain;  // (K) or null: x is normalised by its root mean square first
  uint16_t* y;        // (T, pitch(K)) fp16, zero beyond K; clamped to the finite range
  int64_t tokens, k;
  float eps;
  bool pdl = false;
  float* guess = nullptr;  // q4_gemm_guess(), with `gain`
};
void q4_gemm_activations_cuda(const Q4GemmActivationsArgs&, cudaStream_t);

enum class Q4GemmOutput : uint8_t {
  kStore,   // y (T, N) (+ residual)                                                   rows kPlain
  kSwiglu,  // y (T, N/2) = silu(gate) * up                                            rows kPairHalves
  kRopeKv,  // y (T, H*head_dim) = rotated q; k rotated and v appended to the cache     rows kRope
};

struct Q4GemmArgs {
  const uint16_t* x;  // (T, pitch(K)) fp16, 16-aligned; null in a chain: what the product before makes
  Q4Layout w;
  Grid grid;
  const uint8_t* codes;    // Q4 tiles, 16-aligned
  const uint16_t* scales;  // 16-aligned
  int64_t tokens;
  Q4GemmOutput output;
  void* y;                // null in a chain: only the next product wants it
  bool y_half;            // fp16 instead of f32
  int64_t y_pitch;        // elements from row to row of y
  const float* residual;  // kStore: (T, N) or null; may be y
  const float* table;     // kRopeKv, as in rope_kv.h
  Placement at;
  KvLayer kv;
  int64_t heads, kv_heads;
  std::byte* workspace;  // config.workspace_bytes, 256-aligned; zeroed when allocated, and left so that it
                         // serves any later product without clearing
  bool pdl = false;      // launched as a programmatic dependent of the kernel before it
  const float* gain = nullptr;  // (K), where x is null: of the norm that x passes first
  float eps = 0;                // of that
};
void q4_gemm_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);

// Products that follow each other, of up to kQ4GemmFewTokens tokens, in one launch that holds all
// multiprocessors (kFew). The first has an x; that of the others is y of the one before them, SiLU(gate) * up
// or, normalised, the residual stream. A residual may be y of an earlier one: the thread that stored a value
// reads it.
//
// What normalises the stream is applied to the sums: its maker passes on y * gain * guess in fp16 and sums of
// squares of y, the reader finds the factor from these and corrects what `guess` was: the factor of the token
// before the maker added to the stream, times kQ4GemmHeadroom. With G the largest gain, no value leaves the
// range of fp16 while the stream's root mean square grows by less than 2^20 / (G sqrt(D)), 16384 times for G
// = 1 and D = 4096: then it is clamped. Values lose bits below 2^-10 / gain of the old mean square's root,
// where they err by 2^-21 of it.
constexpr size_t kQ4GemmChain = 4;
constexpr float kQ4GemmHeadroom = 1.f / 16;
// Memory that blocks of a chain exchange what they make through, 256-aligned: zeroed when allocated, and left
// so that it serves any later chain on the same stream.
constexpr size_t kQ4GemmExchangeSet = 3 << 20, kQ4GemmExchange = 256 + 2 * kQ4GemmExchangeSet;
// In it, (kQ4GemmFewTokens): the guesses of the next chain. A chain whose first product adds to a stream that
// its second normalises reads them; one that normalises a stream leaves the next ones.
inline float* q4_gemm_guess(std::byte* exchange) { return reinterpret_cast<float*>(exchange + 64); }
// Whether a product may follow another in a chain; its x is not looked at.
bool q4_gemm_follows(const Q4GemmArgs&, const Q4GemmArgs& before);
void q4_gemm_chain_cuda(const Q4GemmArgs*, size_t count, std::byte* exchange, cudaStream_t);

}  // namespace q4s
