// The producer's side of attention_prefill_sm90.cu: which tiles a block computes, what its warpgroups have to
// know of each, and the loads.
#pragma once
#include <cuda.h>
#include <cuda_fp16.h>

#include <climits>

#include "kernels/attention_prefill.h"
#include "kernels/hopper.cuh"

namespace q4s::prefill_attention {

constexpr int kKeys = 128;
constexpr int kMaxPack = 4;  // 16 heads
// Where a block's dynamic shared memory begins, after the driver's own. A number, since the compiler forms an
// address that it does not know anew at each use.
constexpr uint32_t kSharedStart = 1024;

struct Params {
  AttentionPrefillArgs a;
  float scale;  // log2(e) / sqrt(hd): the softmax works in base 2
  int pack;     // log2 of the heads of a tile, which share keys and values
  int tiles;    // of queries, for such heads
  int band;     // packs of heads that run beside each other, their keys and values in L2
};
struct Maps {
  CUtensorMap k, v, q, y;  // q and y where they are fp16
};

// Queries of a tile that share a sequence: `end` positions are seen, all of them by those at `least` and
// beyond.
struct Pass {
  int sequence, end, least;
};

template <int kHd_, int kConsumers_>
struct Shape {
  static constexpr int kHd = kHd_, kConsumers = kConsumers_, kQueries = kConsumers * 64,
                       kThreads = (kConsumers + 1) * 128;
  static constexpr int kStages = kHd == 64 ? 4 : 2, kBoxes = kHd / 64;
  static constexpr int kBoxBytes = kKeys * 128;  // 64 columns
  static constexpr int kTileBytes = kBoxes * kBoxBytes;
  static constexpr int kQueryBox = kQueries * 128, kQueryBytes = kBoxes * kQueryBox;
  static constexpr int kQuery = 2 * kStages * kTileBytes;  // two, after the K and V tiles
  static constexpr int kBarriers = kQuery + 2 * kQueryBytes;
  static constexpr int kCommon = kBarriers + (4 * kStages + 4) * 8;
  // What the producer tells the consumers of a tile. At least one pass.
  struct Common {
    int count, position[kQueries], sequence[kQueries];
    int last_end[kConsumers];  // what a warpgroup sees of the last pass, where kSkips
    Pass pass[kQueries];
  };
  static constexpr int kBytes = kCommon + 2 * int(sizeof(Common));
  // Whether a warpgroup leaves out what only others see. With heads of 128 the turns' order wins less than it
  // costs.
  static constexpr bool kSkips = kHd == 64;
  // Whether heads that share keys share tiles, which are of fewer tokens then: it wins where tiles would else
  // end within 128 positions.
  static constexpr bool kPacks = kQueries % kKeys != 0;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160,
                       kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static_assert(kBytes <= 227 * 1024);
};

#if Q4S_SM90A

using namespace hopper;

// The n-th tile of this block. Its rows are queries of `pack` heads: tokens from `first` on, of each the
// heads from `head` on. Bands of heads; within one the tiles with most positions first. Rounds of tiles go
// over the blocks forwards and backwards in turn, which evens them out.
struct Tile {
  int head, first, queries;  // rows that are there
  template <class S>
  __device__ bool find(const Params& p, int n) {
    const int grid = int(gridDim.x), i = n * grid + (n % 2 ? grid - 1 - int(blockIdx.x) : int(blockIdx.x));
    const int packs = int(p.a.heads) >> p.pack;
    if (i >= p.tiles * packs) return false;
    const int of_band = p.band * p.tiles, first_pack = i / of_band * p.band, in_band = i % of_band;
    const int band = min(p.band, packs - first_pack);
    head = (first_pack + in_band % band) << p.pack;
    first = (p.tiles - 1 - in_band / band) * (S::kQueries >> p.pack);
    queries = int(min((p.a.tokens - first) << p.pack, int64_t(S::kQueries)));
    return true;
  }
};

// Where a row of a tile stands among the queries of all tokens and heads.
__device__ inline int64_t row_of(const Params& p, const Tile& tile, int row) {
  return int64_t(tile.first + (row >> p.pack)) * p.a.heads + tile.head + (row & ((1 << p.pack) - 1));
}

template <class S>
struct Addresses {
  uint32_t k, v, q, full_k, full_v, empty_k, empty_v, full_q, empty_q;
  __device__ Addresses() {
    k = kSharedStart;
    v = k + S::kStages * S::kTileBytes;
    q = k + S::kQuery;
    full_k = k + S::kBarriers;
    full_v = full_k + S::kStages * 8;
    empty_k = full_v + S::kStages * 8;
    empty_v = empty_k + S::kStages * 8;
    full_q = empty_v + S::kStages * 8;
    empty_q = full_q + 2 * 8;
  }
};

// By one warp.
template <class S>
__device__ void find_passes(typename S::Common& c, const Params& p, const Tile& tile, int lane) {
  constexpr int kEach = S::kQueries / 32;  // rows of a lane, a warpgroup's two by two
  int position[kEach], sequence[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = i * 32 + lane;
    const int token = tile.first + (row >> p.pack);
    position[i] = row < tile.queries ? p.a.at.position[token] : -1;
    sequence[i] = row < tile.queries ? p.a.at.sequence[token] : -1;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    c.position[i * 32 + lane] = position[i], c.sequence[i * 32 + lane] = sequence[i];
  int count = 0;
  while (true) {
    int mine = INT_MAX;  // the least sequence that has no pass
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (sequence[i] >= 0) mine = min(mine, sequence[i]);
    const int s = __reduce_min_sync(~0u, mine);
    if (s == INT_MAX) break;
    int most = 0, least = INT_MAX, rows = 0, end[S::kConsumers] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (sequence[i] == s) {
        end[i / 2] = max(end[i / 2], position[i] + 1), least = min(least, position[i]);
        ++rows, sequence[i] = -1;
      }
#pragma unroll
    for (int group = 0; group < S::kConsumers; ++group) {
      most = max(most, end[group]);
      if constexpr (S::kSkips) {
        end[group] = __reduce_max_sync(~0u, end[group]);
        if (lane == 0) c.last_end[group] = end[group];
      }
    }
    most = __reduce_max_sync(~0u, most);
    least = __reduce_min_sync(~0u, least), rows = __reduce_add_sync(~0u, rows);
    // Rows of other sequences must be masked in every tile.
    if (lane == 0) c.pass[count] = {s, most, rows == tile.queries ? least : -1};
    ++count;
  }
  if (lane == 0) c.count = count;
}

// The units of a tile: 128 positions of a pass each, for one who sees `last_end` positions of the last pass.
template <class S>
struct Walk {
  const Pass* more;  // passes after this one
  int left, first = 0, last_end, end;
  Pass pass;
  __device__ explicit Walk(const typename S::Common& common, int last_end_ = INT_MAX)
      : more(common.pass), left(common.count), last_end(last_end_) {
    turn();
  }
  __device__ bool next() {
    first += kKeys;
    if (first < end) return true;
    if (left == 0) return false;
    turn();
    return true;
  }
  __device__ void turn() {
    pass = *more++;
    end = --left ? pass.end : min(pass.end, last_end);
    first = 0;
  }
};

// By the warps of the producer's warpgroup but the first: queries in f32 become what TMA would have brought.
template <class S>
__device__ void convert_queries(const Params& p, uint8_t* base, const Addresses<S>& at) {
  const int thread = int(threadIdx.x) % 128 - 32;
  const float* q = static_cast<const float*>(p.a.q);
  Tile tile;
  for (int n = 0; tile.find<S>(p, n); ++n) {
    barrier_wait(at.empty_q + n % 2 * 8, n / 2 % 2 ^ 1);
    uint8_t* to = base + S::kQuery + n % 2 * S::kQueryBytes;
#pragma unroll 2
    for (int i = thread; i < S::kQueries * S::kHd / 8; i += 96) {
      const int row = i / (S::kHd / 8), piece = i % (S::kHd / 8);
      float4 low = make_float4(0, 0, 0, 0), high = low;
      if (row < tile.queries) {
        const float4* from = reinterpret_cast<const float4*>(q + row_of(p, tile, row) * S::kHd + piece * 8);
        low = from[0], high = from[1];
      }
      *reinterpret_cast<uint4*>(to + piece / 8 * S::kQueryBox + row * 128 + (piece % 8 ^ row % 8) * 16) =
          make_uint4(pack_half2(low.x, low.y), pack_half2(low.z, low.w), pack_half2(high.x, high.y),
                     pack_half2(high.z, high.w));
    }
    proxy_fence();
    barrier_arrive(at.full_q + n % 2 * 8);
  }
}

template <class S>
__device__ void produce(const Maps& maps, const Params& p, const Addresses<S>& at, typename S::Common* common,
                        int lane) {
  RingPosition<S::kStages> ring;
  Tile tile;
  for (int n = 0; tile.find<S>(p, n); ++n) {
    const int slot = n % 2;
    const uint32_t full_q = at.full_q + slot * 8;
    barrier_wait(at.empty_q + slot * 8, n / 2 % 2 ^ 1);
    if (lane == 0 && p.a.q_half) {
      barrier_arrive_expect(full_q, S::kQueryBytes);
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box)
        tma_load(at.q + slot * S::kQueryBytes + box * S::kQueryBox, &maps.q, box * 64, tile.head, tile.first,
                 full_q);
    }
    find_passes<S>(common[slot], p, tile, lane);
    barrier_arrive(full_q);  // of every lane: all have written
    if (lane == 0) {
      const int column = tile.head / int(p.a.heads / p.a.kv_heads) * S::kHd;
      Walk<S> walk(common[slot]);
      const auto load = [&](const CUtensorMap& map, uint32_t to, uint32_t full, uint32_t empty) {
        barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
        barrier_arrive_expect(full + ring.stage * 8, S::kTileBytes);
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box)
          tma_load(to + ring.stage * S::kTileBytes + box * S::kBoxBytes, &map, column + box * 64, walk.first,
                   walk.pass.sequence, full + ring.stage * 8);
      };
      do {
        load(maps.k, at.k, at.full_k, at.empty_k);
        load(maps.v, at.v, at.full_v, at.empty_v);
        ring.next();
      } while (walk.next());
    }
    __syncwarp();
  }
}

#endif  // Q4S_SM90A

}  // namespace q4s::prefill_attention
