// The kernel of linear_decode.h, over the formats of q4_tiles.h.
//
// A cluster of blocks owns a run of tile rows (16 outputs each). K is cut into one slice for each warp of the
// cluster; a warp streams its slice of every tile row through a ring in shared memory that it alone fills and
// empties, so that the stream never meets a block-wide barrier. Weights are the A operand of mma.m16n8k16, up
// to 8 tokens (16 with two products) the B operand. The warps' partial sums meet in shared memory every
// `round` tile rows and are added in the order of the slices.
//
//   launch dependents -> fill the ring -> wait for the predecessor -> stage x as fp16, each warp its own
//   slice
//   -> for each tile row: multiply; at the end of a round: add up, epilogue
#pragma once
#include <algorithm>

#include "kernels/decode_ptx.cuh"
#include "kernels/linear_decode.h"
#include "kernels/linear_decode_config.h"
#include "kernels/pdl.cuh"

namespace q4s {

constexpr int kMaxDecodeWarps = 8;
constexpr int kScaleSlot = 2 * kQ4TileRows * 2;  // bytes kept for the scales of one tile: two groups of 32
constexpr int kStagePieces = 8;                  // float4 of x a lane holds while it finds their largest

struct LinearDecodeParams {
  const uint8_t* codes;
  const uint16_t* scales;
  const float* x;         // (T, K)
  const float* gain;      // (K) or null
  const float* residual;  // (T, N) or null
  float* y;
  const float* table;
  const int32_t* position;
  const int32_t* sequence;
  KvLayer kv;
  float eps;
  int tokens, n, k, n_tiles, k_tiles, groups;
  int group_shift;     // group of tile kt: kt >> group_shift; -1: two groups a tile
  int warps, cluster;  // warps a block, blocks a cluster
  int round;           // tile rows between two reductions
  int slice_tiles;     // longest slice
  int heads, kv_heads, head_dim;
  Epilogue epilogue;
};

// Where things lie in a block's shared memory, in bytes.
struct LinearDecodeShared {
  int ring, barriers, x, gain, partial, inverse, squares, total;
};
template <class Stream>
inline Q4S_HOST_DEVICE LinearDecodeShared linear_decode_shared(int warps, int tokens, int slice_tiles,
                                                               int round, bool norm) {
  LinearDecodeShared s;
  s.ring = 0;
  s.barriers = s.ring + warps * Stream::kStages * Stream::kSlot;
  s.x = s.barriers + (warps * Stream::kStages * 8 + 127) / 128 * 128;
  s.gain = s.x + warps * tokens * (slice_tiles * 128 + 64);
  s.partial = s.gain + (norm ? warps * slice_tiles * kQ4TileCols * 4 : 0);
  s.inverse = s.partial + round * warps * kQ4TileRows * tokens * 4;
  s.squares = s.inverse + warps * tokens * 4;
  s.total = s.squares + (norm ? warps * tokens * 32 * 4 : 0);
  return s;
}

// --- formats: a tile's bytes -> A fragments -> products
// -------------------------------------------------------

// c += a * x for the columns of one step of 16; b: this lane's halves of x, 2 words a token block.
template <int kBlocks>
__device__ inline void multiply(float (&c)[kBlocks][4], const uint32_t (&a)[4], const uint4 (&x)[kBlocks][2],
                                int step) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const uint4& v = x[b][step / 2];
    mma_16816(c[b], a, step % 2 ? v.z : v.x, step % 2 ? v.w : v.y);
  }
}

template <int kBlocks>
__device__ inline void add_scaled(float (&sum)[kBlocks][4], const float (&c)[kBlocks][4],
                                  const uint16_t* scale, int lane) {
  const float low = half_bits_to_float(scale[lane / 4]), high = half_bits_to_float(scale[lane / 4 + 8]);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    sum[b][0] += low * c[b][0];
    sum[b][1] += low * c[b][1];
    sum[b][2] += high * c[b][2];
    sum[b][3] += high * c[b][3];
  }
}

// int4: both grids are exact in fp16. 0x6400 | q = 1024 + q; 0x5400 | q << 4 = 64 + q.
template <Grid kGrid, bool kHalves>
struct Int4Tile {
  static constexpr int kBits = 4, kBytes = kQ4TileBytes;
  __device__ static void fragment(uint32_t (&a)[4], uint32_t w) {
    constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
    if (kGrid == Grid::kInt) {
      a[0] = sub_half2((w & kLow) | 0x64006400, 0x64086408);
      a[1] = sub_half2((w & kHigh) | 0x54005400, 0x54805480);
      a[2] = sub_half2((w >> 8 & kLow) | 0x64006400, 0x64086408);
      a[3] = sub_half2((w >> 8 & kHigh) | 0x54005400, 0x54805480);
    } else {  // 1024 + 7.5 is no half, 64 + 7.5 is
      a[0] = sub_half2((w << 4 & kHigh) | 0x54005400, 0x54785478);
      a[1] = sub_half2((w & kHigh) | 0x54005400, 0x54785478);
      a[2] = sub_half2((w >> 4 & kHigh) | 0x54005400, 0x54785478);
      a[3] = sub_half2((w >> 8 & kHigh) | 0x54005400, 0x54785478);
    }
  }
  // scale: of the tile's first group. kHalves: groups are 32 wide, those of the second half are `second`
  // further on.
  template <int kBlocks>
  __device__ static void add(float (&sum)[kBlocks][4], const uint8_t* tile, const uint16_t* scale, int second,
                             const uint4 (&x)[kBlocks][2], int lane) {
    const uint4 w = *reinterpret_cast<const uint4*>(tile + lane * 16);
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
    float c[kBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      fragment(a, words[step]);
      multiply(c, a, x, step);
      if (kHalves && step == 1) {
        add_scaled(sum, c, scale, lane);
        scale += second;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) c[b][0] = c[b][1] = c[b][2] = c[b][3] = 0;
      }
    }
    add_scaled(sum, c, scale, lane);
  }
};

// int8: bytes biased to 0..255 under the exponent of 1024, minus 1152.
template <bool kHalves>
struct Int8Tile {
  static constexpr int kBits = 8, kBytes = 2 * kQ4TileBytes;
  template <int kBlocks>
  __device__ static void add(float (&sum)[kBlocks][4], const uint8_t* tile, const uint16_t* scale, int second,
                             const uint4 (&x)[kBlocks][2], int lane) {
    float c[kBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint2 w = *reinterpret_cast<const uint2*>(tile + step / 2 * 512 + lane * 16 + step % 2 * 8);
      const uint32_t low = w.x ^ 0x80808080, high = w.y ^ 0x80808080;
      uint32_t a[4];
      a[0] = sub_half2(__byte_perm(low, 0x64646464, 0x4140), 0x64806480);
      a[1] = sub_half2(__byte_perm(high, 0x64646464, 0x4140), 0x64806480);
      a[2] = sub_half2(__byte_perm(low, 0x64646464, 0x4342), 0x64806480);
      a[3] = sub_half2(__byte_perm(high, 0x64646464, 0x4342), 0x64806480);
      multiply(c, a, x, step);
      if (kHalves && step == 1) {
        add_scaled(sum, c, scale, lane);
        scale += second;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) c[b][0] = c[b][1] = c[b][2] = c[b][3] = 0;
      }
    }
    add_scaled(sum, c, scale, lane);
  }
};

struct HalfTile {
  static constexpr int kBits = 16, kBytes = 4 * kQ4TileBytes;
  template <int kBlocks>
  __device__ static void add(float (&sum)[kBlocks][4], const uint8_t* tile, const uint16_t*, int,
                             const uint4 (&x)[kBlocks][2], int lane) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 w = *reinterpret_cast<const uint4*>(tile + step * 512 + lane * 16);
      const uint32_t a[4] = {w.x, w.y, w.z, w.w};
      multiply(sum, a, x, step);
    }
  }
};

// --- the weight stream of one warp
// ---------------------------------------------------------------------------

// What a warp multiplies: tiles [k0, k1) of tile rows [n0, n1).
struct Share {
  int n0, n1, k0, k1;
};

// kBulk: the copy engine fills a slot, one lane asks; else every lane copies (and reads back) its own 16
// bytes.
template <class Tile, int kStages_, int kChunk_, bool kBulk>
struct WeightStream {
  static constexpr int kStages = kStages_, kChunk = kChunk_;  // slots, tiles a slot
  static constexpr int kSlot = kChunk * (Tile::kBytes + kScaleSlot);

  const LinearDecodeParams& p;
  const Share& share;
  uint8_t* slots;      // (kStages) of this warp
  uint64_t* barriers;  // (kStages) of this warp
  uint64_t policy;
  int lane, tile_row, column;    // of the next chunk to ask for
  int filling = 0, reading = 0;  // slots
  uint32_t parity = 0;

  __device__ WeightStream(const LinearDecodeParams& p, const Share& share, uint8_t* slots, uint64_t* barriers,
                          int lane)
      : p(p),
        share(share),
        slots(slots),
        barriers(barriers),
        policy(evict_first()),
        lane(lane),
        tile_row(share.k0 < share.k1 ? share.n0 : share.n1),
        column(share.k0) {
    if (kBulk) {
      if (lane == 0) {
        for (int i = 0; i < kStages; ++i) barrier_init(barriers + i);
        barrier_init_done();
      }
      __syncwarp();
    }
    for (int i = 0; i < kStages; ++i) fill();
  }

  __device__ int first_group(int column) const {
    return p.group_shift < 0 ? 2 * column : column >> p.group_shift;
  }

  // Asks for the next chunk. The slot's last reads are behind a __syncwarp.
  __device__ void fill() {
    if (tile_row < share.n1) {
      const int tiles = min(kChunk, share.k1 - column);
      uint8_t* to = slots + filling * kSlot;
      const uint8_t* from = p.codes + (int64_t(tile_row) * p.k_tiles + column) * Tile::kBytes;
      const int first = first_group(column);
      const int last =
          p.group_shift < 0 ? min(2 * (column + tiles), p.groups) - 1 : first_group(column + tiles - 1);
      const uint16_t* scales = p.scales + (int64_t(tile_row) * p.groups + first) * kQ4TileRows;
      const int scale_bytes = Tile::kBits == 16 ? 0 : (last - first + 1) * kQ4TileRows * 2;
      if (kBulk) {
        if (lane == 0) {
          barrier_expect(barriers + filling, uint32_t(tiles * Tile::kBytes + scale_bytes));
          bulk_copy(to, from, uint32_t(tiles * Tile::kBytes), barriers + filling, policy);
          if (Tile::kBits != 16)
            bulk_copy(to + kChunk * Tile::kBytes, scales, uint32_t(scale_bytes), barriers + filling, policy);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kChunk * Tile::kBytes / 512; ++i)
          if (i < tiles * Tile::kBytes / 512)
            copy_async(to + i * 512 + lane * 16, from + i * 512 + lane * 16, policy);
        if (lane * 16 < scale_bytes)
          copy_async(to + kChunk * Tile::kBytes + lane * 16,
                     reinterpret_cast<const uint8_t*>(scales) + lane * 16, policy);
      }
      column += tiles;
      if (column == share.k1) {
        column = share.k0;
        ++tile_row;
      }
    }
    if (!kBulk) copy_commit();  // also an empty group: they are counted
    filling = filling + 1 == kStages ? 0 : filling + 1;
  }

  __device__ const uint8_t* wait() {
    if (kBulk) {
      barrier_wait(barriers + reading, parity);
    } else {
      copy_wait<kStages - 1>();
      __syncwarp();
    }
    return slots + reading * kSlot;
  }
  __device__ void release() {
    __syncwarp();
    reading = reading + 1 == kStages ? 0 : reading + 1;
    if (reading == 0) parity ^= 1;
    fill();
  }
};

// --- staging of x
// --------------------------------------------------------------------------------------------

// Four columns from `column`, zero from `end` on. aligned: 16 bytes at a time (end is then a multiple of 4).
__device__ inline float4 load_columns(const float* row, int column, int end, bool aligned) {
  if (column >= end) return make_float4(0, 0, 0, 0);
  if (aligned) return __ldcg(reinterpret_cast<const float4*>(row + column));
  float4 v = make_float4(__ldcg(row + column), 0, 0, 0);
  if (column + 1 < end) v.y = __ldcg(row + column + 1);
  if (column + 2 < end) v.z = __ldcg(row + column + 2);
  if (column + 3 < end) v.w = __ldcg(row + column + 3);
  return v;
}

// A warp's slice of x, staged as fp16 in the order of B fragments: [token][tile][half of a tile][t][step,
// pair]. Values are multiplied by the gain and by a power of two that brings the slice's largest below 2^15.
struct Staging {
  const LinearDecodeParams& p;
  int begin, columns, padded;  // first column, columns there are, columns of the slice's tiles
  const float* gain;           // (slice) in shared memory; null: no norm
  uint8_t* to;
  float* inverse;  // (T) inverse of the power of two
  float* squares;  // (T, 32) with a gain: sums of squares of x by lane
  int lane;

  __device__ int stride() const { return p.slice_tiles * 128 + 64; }
  // Piece i is 128 columns, four a lane.
  __device__ int column(int piece) const { return (piece * 32 + lane) * 4; }
  __device__ float4 load(int t, int piece) const {
    return load_columns(p.x + int64_t(t) * p.k + begin, column(piece), columns, p.k % 4 == 0);
  }
  // Applies the gain; updates the largest value and the sum of squares.
  __device__ void look(float4& v, int piece, float& top, float& sum) const {
    if (p.gain && column(piece) < padded) {
      const float4 g = reinterpret_cast<const float4*>(gain)[piece * 32 + lane];
      sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      v.x *= g.x, v.y *= g.y, v.z *= g.z, v.w *= g.w;
    }
    top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  }
  // 2^(14 - exponent of the largest), from its bits; both it and its inverse stay normal numbers.
  __device__ void set_scale(int t, float top, float sum) const {
    const int exponent = int(__reduce_max_sync(0xffffffffu, __float_as_uint(top)) >> 23);
    if (lane == 0) inverse[t] = __uint_as_float(uint32_t(254 - min(268 - exponent, 253)) << 23);
    if (p.gain) squares[t * 32 + lane] = sum;
  }
  __device__ void store(int t, int piece, const float4& v) const {
    if (column(piece) >= padded) return;
    const float scale = __uint_as_float((254u << 23) - __float_as_uint(inverse[t]));
    const int in_tile = lane % 16 * 4, step = in_tile / 16, in_step = in_tile % 16;
    uint32_t* words = reinterpret_cast<uint32_t*>(to + t * stride() + (piece * 2 + lane / 16) * 128) +
                      step / 2 * 16 + step % 2 * 2 + in_step % 8 / 2 * 4 + in_step / 8;
    words[0] = pack_half2(v.x * scale, v.y * scale);
    words[4] = pack_half2(v.z * scale, v.w * scale);
  }

  __device__ void run() const {
    const int pieces = (padded + 127) / 128;
    if (pieces == 0 || pieces > kStagePieces) return run_long(pieces);
    const int batch = kStagePieces / pieces;  // tokens held at a time
    for (int t0 = 0; t0 < p.tokens; t0 += batch) {
      const int count = min(batch, p.tokens - t0) * pieces;
      float4 hold[kStagePieces];
      int t = t0, piece = 0;
      const auto advance = [&] {
        if (++piece == pieces) piece = 0, ++t;
      };
#pragma unroll
      for (int i = 0; i < kStagePieces; ++i)
        if (i < count) {
          hold[i] = load(t, piece);
          advance();
        }
      t = t0, piece = 0;
      float top = 0, sum = 0;
#pragma unroll
      for (int i = 0; i < kStagePieces; ++i)
        if (i < count) {
          look(hold[i], piece, top, sum);
          if (piece + 1 == pieces) {
            set_scale(t, top, sum);
            top = sum = 0;
          }
          advance();
        }
      __syncwarp();
      t = t0, piece = 0;
#pragma unroll
      for (int i = 0; i < kStagePieces; ++i)
        if (i < count) {
          store(t, piece, hold[i]);
          advance();
        }
    }
  }
  // Slices of no or of many pieces: x is read twice.
  __device__ void run_long(int pieces) const {
    for (int t = 0; t < p.tokens; ++t) {
      float top = 0, sum = 0;
#pragma unroll 4
      for (int i = 0; i < pieces; ++i) {
        float4 v = load(t, i);
        look(v, i, top, sum);
      }
      set_scale(t, top, sum);
      __syncwarp();
#pragma unroll 4
      for (int i = 0; i < pieces; ++i) {
        float4 v = load(t, i);
        look(v, i, top, sum);
        store(t, i, v);
      }
    }
  }
};

// --- epilogue
// ------------------------------------------------------------------------------------------------

// Rows r and r+8 of a tile row, for one token: what one thread finishes. The constructor and prepare() load
// what the epilogue needs long before the sums are there: residual or position, then by position cos and sin.
struct OutputPair {
  int tile_row, r, token;
  bool active;
  float low = 0, high = 0;  // residual; or cos, sin
  int position = 0;

  // Item i of a round that starts at tile row `first` and has `count` of them.
  __device__ OutputPair(const LinearDecodeParams& p, int i, int first, int count)
      : tile_row(first + i / 8 / p.tokens),
        r(i % 8),
        token(i / 8 % p.tokens),
        active(i < 8 * count * p.tokens) {
    if (!active) return;
    const int row = tile_row * kQ4TileRows + r;
    if (p.epilogue == Epilogue::kNone && p.residual) {
      const float* from = p.residual + int64_t(token) * p.n;
      if (row < p.n) low = __ldcg(from + row);
      if (row + 8 < p.n) high = __ldcg(from + row + 8);
    }
    if (p.epilogue == Epilogue::kRopeKv) position = __ldcg(p.position + token);
  }
  __device__ void prepare(const LinearDecodeParams& p) {
    const int row = tile_row * kQ4TileRows + r;
    if (!active || p.epilogue != Epilogue::kRopeKv || row >= (p.heads + p.kv_heads) * p.head_dim) return;
    const int i = row % p.head_dim / 16 * 8 + r;
    const float2 turn = *reinterpret_cast<const float2*>(p.table + int64_t(position) * p.head_dim + 2 * i);
    low = turn.x;
    high = turn.y;
  }

  __device__ void finish(const LinearDecodeParams& p, float a, float b) const {
    const int row = tile_row * kQ4TileRows + r;
    if (p.epilogue == Epilogue::kNone) {
      float* to = p.y + int64_t(token) * p.n;
      if (row < p.n) to[row] = a + low;
      if (row + 8 < p.n) to[row + 8] = b + high;
    } else if (p.epilogue == Epilogue::kSwiglu) {
      const int hidden = p.n / 2, i = tile_row * 8 + r;
      if (i < hidden) p.y[int64_t(token) * hidden + i] = a / (1 + __expf(-a)) * b;
    } else {
      rotate_and_store(p, row, a, b);
    }
  }

 private:
  __device__ void rotate_and_store(const LinearDecodeParams& p, int row, float a, float b) const {
    const int q_rows = p.heads * p.head_dim, k_rows = p.kv_heads * p.head_dim;
    int first = row, step = 8;  // rows of the file: first, first + step
    float u = a, v = b;
    if (row < q_rows + k_rows) {
      step = p.head_dim / 2;
      first = row / p.head_dim * p.head_dim + row % p.head_dim / 16 * 8 + r;
      u = a * low - b * high;
      v = a * high + b * low;
    }
    if (row < q_rows) {
      p.y[int64_t(token) * q_rows + first] = u;
      p.y[int64_t(token) * q_rows + first + step] = v;
      return;
    }
    const bool is_k = row < q_rows + k_rows;
    void* cache = is_k ? p.kv.k : p.kv.v;
    const int64_t at =
        (__ldcg(p.sequence + token) * p.kv.ctx + position) * k_rows + first - q_rows - (is_k ? 0 : k_rows);
    if (p.kv.type == KvType::kF16) {
      static_cast<__half*>(cache)[at] = __float2half_rn(u);
      static_cast<__half*>(cache)[at + step] = __float2half_rn(v);
    } else {
      static_cast<float*>(cache)[at] = u;
      static_cast<float*>(cache)[at + step] = v;
    }
  }
};

// --- the kernel
// ----------------------------------------------------------------------------------------------

template <class Tile, int kBlocks, class Stream>
__global__ void __launch_bounds__(kMaxDecodeWarps * 32, 3)
    linear_decode_kernel(const __grid_constant__ LinearDecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  pdl_trigger();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int rank = int(blockIdx.x) % p.cluster, owner = int(blockIdx.x) / p.cluster;
  const int owners = int(gridDim.x) / p.cluster, slice = rank * p.warps + warp, slices = p.cluster * p.warps;
  const Share share{int(int64_t(p.n_tiles) * owner / owners), int(int64_t(p.n_tiles) * (owner + 1) / owners),
                    p.k_tiles * slice / slices, p.k_tiles * (slice + 1) / slices};
  const LinearDecodeShared at =
      linear_decode_shared<Stream>(p.warps, p.tokens, p.slice_tiles, p.round, p.gain);
  const int stride =
      p.slice_tiles * 128 + 64;  // of a token of x: an odd multiple of 64 bytes, so no bank is hit twice
  uint8_t* x = shared + at.x + warp * p.tokens * stride;
  float* partial = reinterpret_cast<float*>(shared + at.partial);  // (round, warps, 16, T)
  float* inverse = reinterpret_cast<float*>(shared + at.inverse) + warp * p.tokens;
  float* squares = reinterpret_cast<float*>(shared + at.squares);  // (warps, T, 32)

  Stream stream(p, share, shared + at.ring + warp * Stream::kStages * Stream::kSlot,
                reinterpret_cast<uint64_t*>(shared + at.barriers) + warp * Stream::kStages, lane);
  float* gain = reinterpret_cast<float*>(shared + at.gain) + warp * p.slice_tiles * kQ4TileCols;
  const int padded = (share.k1 - share.k0) * kQ4TileCols, begin = share.k0 * kQ4TileCols;
  const int columns = min(padded, p.k - begin);
  if (p.gain)
    for (int i = lane; i < padded / 4; i += 32)
      reinterpret_cast<float4*>(gain)[i] = load_columns(p.gain + begin, i * 4, columns, p.k % 4 == 0);

  pdl_wait();
  OutputPair output(p, int(threadIdx.x), share.n0, min(p.round, share.n1 - share.n0));
  Staging{p, begin, columns, padded, gain, x, inverse, squares + warp * p.tokens * 32, lane}.run();
  output.prepare(p);
  __syncwarp();

  // This lane's tokens: row lane/4 of B (any token where there is none), columns 2t and 2t+1 of the result.
  const uint8_t* b[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) b[i] = x + min(lane / 4 + 8 * i, p.tokens - 1) * stride + lane % 4 * 16;

  for (int row = share.n0; row < share.n1; ++row) {
    float sum[kBlocks][4] = {};
    for (int column = share.k0; column < share.k1; column += Stream::kChunk) {
      const uint8_t* slot = stream.wait();
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(slot + Stream::kChunk * Tile::kBytes);
      const int first = stream.first_group(column), tiles = min(Stream::kChunk, share.k1 - column);
      const auto add_tile = [&](int i) {
        const int group = stream.first_group(column + i);
        const int second = p.group_shift < 0 && group + 1 < p.groups ? kQ4TileRows : 0;
        uint4 v[kBlocks][2];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          v[n][0] = *reinterpret_cast<const uint4*>(b[n] + (column + i - share.k0) * 128);
          v[n][1] = *reinterpret_cast<const uint4*>(b[n] + (column + i - share.k0) * 128 + 64);
        }
        Tile::add(sum, slot + i * Tile::kBytes, scales + (group - first) * kQ4TileRows, second, v, lane);
      };
      if (tiles == Stream::kChunk) {
#pragma unroll
        for (int i = 0; i < Stream::kChunk; ++i) add_tile(i);
      } else {
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) add_tile(i);
      }
      stream.release();
    }

    const int in_round = (row - share.n0) % p.round;
    float* to = partial + (in_round * p.warps + warp) * kQ4TileRows * p.tokens;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = lane % 4 * 2 + i % 2 + 8 * n;
        if (token < p.tokens) to[(lane / 4 + i / 2 * 8) * p.tokens + token] = sum[n][i] * inverse[token];
      }
    if (in_round + 1 < p.round && row + 1 < share.n1) continue;

    if (p.gain && row - share.n0 == in_round)  // the first round: one sum of squares a warp and token
      for (int t = 0; t < p.tokens; ++t) {
        float* mine = squares + (warp * p.tokens + t) * 32;
        float v = mine[lane];
        for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
        if (lane == 0) mine[0] = v;
      }
    p.cluster > 1 ? cluster_sync() : __syncthreads();
    if (output.active && (p.cluster == 1 || int(threadIdx.x) / 8 % p.cluster == rank)) {
      const int f = output.tile_row - (row - in_round);
      float low = 0, high = 0, square = 0;
      for (int block = 0; block < p.cluster; ++block)
        for (int w = 0; w < p.warps; ++w) {
          const float* from =
              partial + ((f * p.warps + w) * kQ4TileRows + output.r) * p.tokens + output.token;
          const float* sq = squares + (w * p.tokens + output.token) * 32;
          low += p.cluster == 1 ? from[0] : cluster_read(from, block);
          high += p.cluster == 1 ? from[8 * p.tokens] : cluster_read(from + 8 * p.tokens, block);
          if (p.gain) square += p.cluster == 1 ? *sq : cluster_read(sq, block);
        }
      const float norm = p.gain ? rsqrtf(square / float(p.k) + p.eps) : 1.0f;
      output.finish(p, low * norm, high * norm);
    }
    if (p.cluster > 1)
      cluster_sync();  // also before the end: other blocks read this one's memory
    else if (row + 1 < share.n1)
      __syncthreads();
    if (row + 1 < share.n1) {
      output = OutputPair(p, int(threadIdx.x), row + 1, min(p.round, share.n1 - row - 1));
      output.prepare(p);
    }
  }
}

// --- launcher
// ------------------------------------------------------------------------------------------------

template <class Tile, class Stream>
void launch_tile(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl, const LinearDecodeTuning& tune) {
  const Q4Layout& l = a.w.layout;
  const int n_tiles = int(l.n_tiles()), k_tiles = int(l.k_tiles());
  LinearDecodeParams p{};
  p.codes = a.w.codes, p.scales = a.w.scales, p.x = a.x, p.gain = a.gain, p.residual = a.residual, p.y = a.y;
  p.table = a.table, p.position = a.at.position, p.sequence = a.at.sequence, p.kv = a.kv, p.eps = a.eps;
  p.n = int(l.n), p.k = int(l.k), p.n_tiles = n_tiles, p.k_tiles = k_tiles, p.groups = int(l.groups());
  p.group_shift = 31;
  if (l.bits != 16 && l.group < l.k) {
    p.group_shift = -1;
    for (int64_t g = 32; g < l.group; g *= 2) ++p.group_shift;
  }
  p.heads = int(a.heads), p.kv_heads = int(a.kv_heads), p.head_dim = int(l.head_dim), p.epilogue = a.epilogue;
  p.warps = tune.warps;
  int tokens = int(a.tokens);
  p.cluster = tune.cluster ? tune.cluster : 1;
  size_t bytes = 0;
  int blocks = 0;
  for (;;) {
    p.tokens = tokens;
    const int slices = p.warps * p.cluster;
    p.slice_tiles = (k_tiles + slices - 1) / slices;
    const int owners = std::min(n_tiles, device_facts().multiprocessors * tune.per_sm / p.cluster);
    p.round = std::min((n_tiles + owners - 1) / owners, p.warps * 32 / (8 * tokens));
    blocks = owners * p.cluster;
    bytes = size_t(linear_decode_shared<Stream>(p.warps, tokens, p.slice_tiles, p.round, p.gain).total);
    if (bytes <= size_t(device_facts().shared_bytes)) break;
    if (p.cluster < 8 && device_facts().hopper)
      p.cluster *= 2;
    else
      tokens = (tokens + 1) / 2, p.cluster = 1;
  }
  for (int t = 0; t < int(a.tokens); t += tokens) {
    LinearDecodeParams q = p;
    q.tokens = std::min(tokens, int(a.tokens) - t);
    const int64_t y_cols = a.epilogue == Epilogue::kSwiglu   ? l.n / 2
                           : a.epilogue == Epilogue::kRopeKv ? a.heads * l.head_dim
                                                             : l.n;
    q.x += t * l.k, q.y += t * y_cols;
    if (q.residual) q.residual += t * l.n;
    if (q.position) q.position += t, q.sequence += t;
    const auto kernel =
        q.tokens <= 8 ? linear_decode_kernel<Tile, 1, Stream> : linear_decode_kernel<Tile, 2, Stream>;
    launch("linear_decode", kernel, dim3(unsigned(blocks)), p.warps * 32, bytes, p.cluster, pdl, stream, q);
  }
}

}  // namespace q4s
