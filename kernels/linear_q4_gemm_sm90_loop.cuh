// The main loop of the Hopper kernels of linear_q4_gemm.h. A producer warp fills a ring of stages by TMA (64
// columns of activations, packed weights, scales); two or three warpgroups turn weights into register A
// fragments and issue wgmma against the activations. A warpgroup converts block i+1 while the tensor core
// works on block i. Either weights are scaled, or, in narrow tiles whose units of K are of one group each,
// the sums of a unit, which is exact but for fp32 sums.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "kernels/hopper.cuh"
#include "kernels/linear_q4_gemm.h"
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_fragment.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

constexpr int kQ4Consumers = 2;                          // warpgroups, where nothing else is said
constexpr int kQ4UnitTiles = kQ4GemmUnit / kQ4TileCols;  // tiles of K of a unit
constexpr size_t kQ4SharedBytes = 227 * 1024;            // of one block

// What the kernels need to load and convert.
struct Q4Operands {
  uint32_t tile_groups;  // groups of a tile of K, in 2^-32, rounded up; 0: it has `fine` of its own
  int fine;              // 2: groups of 32; 1: of 64; 0: of a unit or more
  int box_groups;        // scale rows of a stage
  int row_tiles;         // of 16 rows a block
  bool half_grid;
};

struct Q4Maps {
  CUtensorMap x, w, s;
};

// A stage is kStageTiles tiles of K: two where it is small, so that waiting and bookkeeping cost half as
// much. kReserved bytes of shared memory are for the epilogue. A block may have fewer rows than kRows:
// Q4Operands::row_tiles.
template <int kRows_, int kColumns_, int kCluster_, int kStageTiles_, int kReserved_,
          int kConsumers_ = kQ4Consumers, bool kMoveRegisters_ = true, bool kScaleSums_ = false>
struct Q4Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kCluster = kCluster_;
  static constexpr int kStageTiles = kStageTiles_, kUnitStages = kQ4UnitTiles / kStageTiles;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kBlocks = kRows / (64 * kConsumers);  // of 64 rows a warpgroup
  static constexpr int kRegs = kColumns / 2;                 // accumulators of one block a thread
  static constexpr int kXTileBytes = kColumns * 128, kXBytes = kXTileBytes * kStageTiles;
  static constexpr int kWRowBytes = kQ4TileBytes * kStageTiles, kWBytes = kRows / 16 * kWRowBytes;
  static constexpr int kSBytes = kRows / 16 * 2 * 32 * kStageTiles;  // at most a scale every 32 columns
  static constexpr int kStageBytes = kXBytes + kWBytes + kSBytes;
  static constexpr int kReserved = kReserved_;
  // And the producer, one thread: of a warpgroup where registers are to be moved to the consumers, else of a
  // warp.
  static constexpr bool kMoveRegisters = kMoveRegisters_;
  static constexpr bool kScaleSums = kScaleSums_;  // of units of one group; else weights
  static constexpr int kThreads = kConsumers * 128 + (kMoveRegisters ? 128 : 32);
  static constexpr int kBarrierBytes = 256;
  static constexpr int kLimit = int(kQ4SharedBytes) - kReserved - kBarrierBytes;
  static constexpr int kStages = kLimit / kStageBytes < 12 ? kLimit / kStageBytes : 12;
  // Stages whose weights are asked for before an earlier kernel's end, where blocks start together. More of
  // them are in each other's way: the first of a block then lands behind the last of the others.
  static constexpr int kEarlyStages = kColumns < 64 ? 2 : 1;
  static constexpr int kBarriers = kStages * kStageBytes;  // offsets
  static constexpr int kRest = kBarriers + kBarrierBytes;
  static constexpr int kBytes = kRest + kReserved;
  static_assert(kStages * kStageTiles >= 4 && kBlocks * kRegs <= 128 && kStages * 16 <= kBarrierBytes);
};

#if Q4S_SM90A

// Addresses of a block's shared memory.
template <class T>
struct Q4Shared {
  uint32_t x, w, s, full, empty;
  const uint8_t* w_data;
  const uint8_t* s_data;

  __device__ explicit Q4Shared(const uint8_t* base) {
    x = shared_address(base);
    w_data = base + T::kStages * T::kXBytes;
    s_data = w_data + T::kStages * T::kWBytes;
    w = shared_address(w_data);
    s = shared_address(s_data);
    full = x + T::kBarriers;
    empty = full + T::kStages * 8;
  }
  // By `threads` threads; their barrier_init_fence() and a barrier of all must follow.
  __device__ void init(int thread, int threads) const {
    for (int i = thread; i < T::kStages; i += threads) {
      hopper::barrier_init(full + i * 8, 1);
      hopper::barrier_init(empty + i * 8, T::kConsumers * 4 * T::kCluster);
    }
  }
};

// Loads of one stage. Activations: a block loads a slice of the columns for its whole cluster.
template <class T>
struct Q4Loader {
  const Q4Shared<T>& sh;
  const Q4Operands& p;
  const CUtensorMap &map_x, &map_w, &map_s;
  int rank;

  __device__ void weights(int stage, int n_tile, int k_tile) const {
    const uint32_t full = sh.full + stage * 8;
    hopper::barrier_arrive_expect(full, T::kXBytes + p.row_tiles * (T::kWRowBytes + p.box_groups * 32));
    hopper::tma_load(sh.w + stage * T::kWBytes, &map_w, k_tile * (kQ4TileBytes / 4), n_tile, full);
    const int group = p.tile_groups ? int(__umulhi(uint32_t(k_tile), p.tile_groups)) : k_tile * p.fine;
    hopper::tma_load(sh.s + stage * T::kSBytes, &map_s, group * 16, n_tile, full);
  }
  __device__ void activations(int stage, int token0, int k_tile) const {
    constexpr int kSlice = T::kColumns / T::kCluster;
    const uint32_t full = sh.full + stage * 8;
#pragma unroll
    for (int tile = 0; tile < T::kStageTiles; ++tile) {
      const uint32_t to = sh.x + stage * T::kXBytes + tile * T::kXTileBytes + rank * kSlice * 128;
      const int column = (k_tile + tile) * kQ4TileCols;
      if constexpr (T::kCluster == 1)
        hopper::tma_load(to, &map_x, column, token0, full);
      else
        hopper::tma_load_multicast(to, &map_x, column, token0 + rank * kSlice, full,
                                   uint16_t((1 << T::kCluster) - 1));
    }
  }
};

__device__ inline void q4_prefetch_maps(const Q4Maps& maps) {
  hopper::tma_prefetch_map(&maps.w);
  hopper::tma_prefetch_map(&maps.s);
  hopper::tma_prefetch_map(&maps.x);
}

// The producer's thread. Cursor: next() steps to the next stage; n_tile(), token0(), k_tile() say what it
// holds. Weights depend on no kernel before this one: those of `early` stages, at most the ring, are on their
// way before `wait()`, which ends when activations may be read.
template <class T, class Cursor, class Wait>
__device__ void q4_produce(const Q4Loader<T>& load, Cursor weights, int early, const Wait& wait) {
  Cursor activations = weights;
  hopper::RingPosition<T::kStages> at;
  int filled = 0;
  for (; filled < early && weights.next(); ++filled, at.next())
    load.weights(filled, weights.n_tile(), weights.k_tile());
  wait();
  for (int i = 0; i < filled; ++i) {
    activations.next();
    load.activations(i, activations.token0(), activations.k_tile());
  }
  for (; weights.next(); at.next()) {
    hopper::barrier_wait(load.sh.empty + at.stage * 8, at.parity ^ 1);  // at once in the first turn
    load.weights(at.stage, weights.n_tile(), weights.k_tile());
    load.activations(at.stage, weights.token0(), weights.k_tile());
  }
}

// A warpgroup's place in the ring and in its rows.
template <class T>
struct Q4Consumer {
  const Q4Shared<T>& sh;
  const Q4Operands& p;
  int group = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32;
  hopper::RingPosition<T::kStages> at = {};
  int last = 0;  // stage whose last wgmma may still run
  Q4Fragment fragment[T::kBlocks];

  __device__ void release() const {
    if constexpr (T::kCluster == 1) {
      if (lane == 0) hopper::barrier_arrive(sh.empty + last * 8);
    } else {  // the peers' producers write here as well
      if (lane < T::kCluster) hopper::barrier_arrive_remote(sh.empty + last * 8, lane);
    }
  }
  // Sums over `units` units of K, still in flight at return.
  __device__ void multiply(int units, float (&acc)[T::kBlocks][T::kRegs]) {
    if constexpr (T::kScaleSums) {
      multiply_units(units, acc[0]);
    } else if constexpr (T::kStageTiles == kQ4UnitTiles) {
      if (p.fine > 0)
        multiply_stages<true>(units, acc);
      else
        multiply_stages<false>(units, acc);
    } else {
      multiply_tiles(units, acc);
    }
  }
  // Where sums are scaled: of a unit there are two sets of them, so that one is scaled while the tensor core
  // makes the other.
  __device__ void multiply_units(int units, float (&acc)[T::kRegs]) {
    float part[2][T::kRegs], scale[2][2];
    uint32_t a[kQ4UnitTiles][4][4];
    const uint32_t x0 = hopper::wgmma_address(sh.x);
    const int row_tile = group * 4 + warp;
    const uint32_t words_at = held(sh.w + row_tile * T::kWRowBytes + lane * 16),
                   scales_at = held(sh.s + row_tile * 32 + lane / 4 * 2);
    const Q4Codes codes(p.half_grid);
    const auto add = [&](int set) {
      hopper::wgmma_pin(part[set]);
#pragma unroll
      for (int i = 0; i < T::kRegs; ++i) acc[i] += scale[set][i % 4 / 2] * part[set][i];
    };
    const auto multiply = [&](auto which, bool first) {
      constexpr int kSet = decltype(which)::value;
      hopper::barrier_wait(sh.full + at.stage * 8, at.parity);
      const uint32_t words_from = words_at + at.stage * T::kWBytes,
                     scales_from = scales_at + at.stage * T::kSBytes;
      const uint4 words[kQ4UnitTiles] = {load_shared_16(words_from),
                                         load_shared_16(words_from + kQ4TileBytes)};
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scale[kSet][i] = __half2float(__ushort_as_half(load_shared_2(scales_from + i * 16))) * Q4Codes::kUnit;
#pragma unroll
      for (int tile = 0; tile < kQ4UnitTiles; ++tile) {
        const uint32_t word[4] = {words[tile].x, words[tile].y, words[tile].z, words[tile].w};
        const uint32_t x = x0 + (at.stage * T::kXBytes + tile * T::kXTileBytes) / 16;
#pragma unroll
        for (int step = 0; step < 4; ++step) codes.unpack(word[step], a[tile][step]);
        hopper::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
          hopper::WgmmaRs<T::kColumns, 0>::mma(part[kSet], a[tile][step],
                                               hopper::wgmma_k_major_at(x + 2 * step), tile > 0 || step > 0);
        hopper::wgmma_commit();
        hopper::wgmma_wait<1>();  // the tile before is done: its fragments are free, and its unit's sums
        if (tile == 0 && !first) release(), add(kSet ^ 1);
      }
      last = at.stage;
      at.next();
    };
    constexpr std::integral_constant<int, 0> kEven;
    constexpr std::integral_constant<int, 1> kOdd;
#pragma unroll
    for (int i = 0; i < T::kRegs; ++i) acc[i] = 0;
    int i = 0;
#pragma unroll 1
    for (; i + 1 < units; i += 2) multiply(kEven, i == 0), multiply(kOdd, false);
    // What is in flight is waited for where it is known which set it is: else ptxas lets each product wait
    // for the one before.
    if (i < units) {
      multiply(kEven, i == 0);
      hopper::wgmma_wait<0>();
      add(0);
    } else {
      hopper::wgmma_wait<0>();
      add(1);
    }
  }
  // Where a unit is a stage, its words are read together; where it is in one group, the loop knows that.
  template <bool kFine>
  __device__ void multiply_stages(int units, float (&acc)[1][T::kRegs]) {
    static_assert(T::kBlocks == 1);
    uint32_t a[kQ4UnitTiles][4][4];
    const uint32_t x0 = hopper::wgmma_address(sh.x);
    const int row_tile = group * 4 + warp;
    Q4Fragment& f = fragment[0];
    for (int unit = 0; unit < units; ++unit) {
      hopper::barrier_wait(sh.full + at.stage * 8, at.parity);
      const uint4* const from = reinterpret_cast<const uint4*>(sh.w_data + at.stage * T::kWBytes +
                                                               row_tile * T::kWRowBytes + lane * 16);
      const uint4 words[kQ4UnitTiles] = {from[0], from[kQ4TileBytes / 16]};
      const __half* const scales = reinterpret_cast<const __half*>(sh.s_data + at.stage * T::kSBytes) +
                                   row_tile * p.box_groups * 16 + lane / 4;
      f.set(scales, p.half_grid);
#pragma unroll
      for (int tile = 0; tile < kQ4UnitTiles; ++tile) {
        const uint32_t word[4] = {words[tile].x, words[tile].y, words[tile].z, words[tile].w};
        const uint32_t x = x0 + (at.stage * T::kXBytes + tile * T::kXTileBytes) / 16;
        if (kFine && tile > 0) f.set(scales + tile * p.fine * 16, p.half_grid);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          if (kFine && step == 2 && p.fine > 1) f.set(scales + (tile * 2 + 1) * 16, p.half_grid);
          f.unpack(word[step], a[tile][step]);
        }
        hopper::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
          hopper::WgmmaRs<T::kColumns, 0>::mma(acc[0], a[tile][step], hopper::wgmma_k_major_at(x + 2 * step),
                                               tile > 0 || unit > 0 || step > 0);
        hopper::wgmma_commit();
        hopper::wgmma_wait<1>();  // as in multiply_tiles()
        if (tile == 0 && unit > 0) release();
      }
      last = at.stage;
      at.next();
    }
  }
  // Stages of one tile of K, or blocks of more rows.
  __device__ void multiply_tiles(int units, float (&acc)[T::kBlocks][T::kRegs]) {
    uint32_t a[2][4][4];  // fragments of 64 rows x 64 columns, double buffered
    const uint32_t x0 = hopper::wgmma_address(sh.x);
    for (int unit = 0; unit < units; ++unit) {
#pragma unroll
      for (int in_unit = 0; in_unit < kQ4UnitTiles; ++in_unit) {
        const int tile = in_unit % T::kStageTiles;  // of the stage
        const bool first = in_unit == 0 && unit == 0;
        if (tile == 0) hopper::barrier_wait(sh.full + at.stage * 8, at.parity);
#pragma unroll
        for (int block = 0; block < T::kBlocks; ++block) {
          const int row_tile = (group * T::kBlocks + block) * 4 + warp;
          const uint4 lane_words = *reinterpret_cast<const uint4*>(
              sh.w_data + at.stage * T::kWBytes + row_tile * T::kWRowBytes + tile * kQ4TileBytes + lane * 16);
          const uint32_t words[4] = {lane_words.x, lane_words.y, lane_words.z, lane_words.w};
          const __half* scales = reinterpret_cast<const __half*>(sh.s_data + at.stage * T::kSBytes) +
                                 row_tile * p.box_groups * 16 + lane / 4;
          Q4Fragment& f = fragment[block];
          if (tile == 0) f.set(scales, p.half_grid);
          if (tile > 0 && p.fine > 0) f.set(scales + tile * p.fine * 16, p.half_grid);
          const uint32_t x = x0 + (at.stage * T::kXBytes + tile * T::kXTileBytes) / 16;
          const int buffer = (in_unit * T::kBlocks + block) % 2;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            if (step == 2 && p.fine > 1) f.set(scales + (tile * p.fine + 1) * 16, p.half_grid);
            f.unpack(words[step], a[buffer][step]);
          }
          hopper::wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step)
            hopper::WgmmaRs<T::kColumns, 0>::mma(acc[block], a[buffer][step],
                                                 hopper::wgmma_k_major_at(x + 2 * step), !first || step > 0);
          hopper::wgmma_commit();
          hopper::wgmma_wait<1>();  // the step before is done: its fragments are free, and its stage if it
                                    // was the last
          if (block == 0 && tile == 0 && !first) release();
        }
        if (tile == T::kStageTiles - 1) {
          last = at.stage;
          at.next();
        }
      }
    }
  }
  // Waits for the sums.
  __device__ void finish(float (&acc)[T::kBlocks][T::kRegs]) const {
    hopper::wgmma_wait<0>();
    release();
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) hopper::wgmma_pin(acc[b]);
  }
};

#endif  // Q4S_SM90A

// ---- host
// ----------------------------------------------------------------------------------------------------------
// For tiles of `rows` rows and stages of `stage_tiles` tiles of K; a block loads x_columns tokens at a time.
void q4_gemm_weight_maps(const Q4GemmArgs&, int rows, int stage_tiles, Q4Operands&, CUtensorMap& w,
                         CUtensorMap& s);
Q4Maps q4_gemm_maps(const Q4GemmArgs&, int rows, int x_columns, int stage_tiles, Q4Operands&);

void q4_gemm_stream_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);
void q4_gemm_split_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);
void q4_gemm_few_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);

}  // namespace q4s
