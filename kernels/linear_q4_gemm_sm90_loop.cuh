// The main loop of the Hopper kernels of linear_q4_gemm.h. A producer warp fills a ring of stages by TMA (64 columns
// of activations, packed weights, scales); two warpgroups turn weights into register A fragments and issue wgmma
// against the activations. A warpgroup converts block i+1 while the tensor core works on block i.
#pragma once
#include <cuda.h>

#include "kernels/hopper.cuh"
#include "kernels/linear_q4_gemm.h"
#include "kernels/linear_q4_gemm_epilogue.cuh"
#include "kernels/linear_q4_gemm_fragment.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

constexpr int kQ4Consumers = 2;                          // warpgroups
constexpr int kQ4UnitStages = kQ4GemmUnit / kQ4TileCols;  // stages of a unit of K
constexpr size_t kQ4SharedBytes = 227 * 1024;            // of one block; two blocks: a KB each is reserved
constexpr size_t kQ4SharedBytesOfTwo = 113 * 1024;

// What both kernels need to load and convert.
struct Q4Operands {
  uint32_t stage_groups;  // groups a stage moves on, in 2^-32, rounded up; 0: a stage has box_groups of its own
  int box_groups;         // scale rows of a stage
  bool half_grid;
};

// kPerSm blocks share a multiprocessor; kReserved bytes of shared memory are for the epilogue.
template <int kRows_, int kColumns_, int kCluster_, int kPerSm_, int kReserved_>
struct Q4Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kCluster = kCluster_, kPerSm = kPerSm_;
  static constexpr int kBlocks = kRows / (64 * kQ4Consumers);  // of 64 rows a warpgroup
  static constexpr int kRegs = kColumns / 2;                   // accumulators of one block a thread
  static constexpr int kXBytes = kColumns * 128;
  static constexpr int kWBytes = kRows / 16 * kQ4TileBytes;
  static constexpr int kSBytes = kRows / 16 * 2 * 32;  // at most a scale every 32 columns
  static constexpr int kStageBytes = kXBytes + kWBytes + kSBytes;
  static constexpr int kSteps = kPerSm == 1 ? 4 : 2;  // of 16 columns, converted at a time: few registers, few steps
  static constexpr int kReserved = kReserved_;
  // And the producer, one thread: of a warpgroup where registers are to be moved to the consumers, else of a warp.
  static constexpr bool kMoveRegisters = kPerSm == 1;
  static constexpr int kThreads = kQ4Consumers * 128 + (kMoveRegisters ? 128 : 32);
  static constexpr int kLimit = int(kPerSm == 1 ? kQ4SharedBytes : kQ4SharedBytesOfTwo) - kReserved - 256;
  static constexpr int kStages = kLimit / kStageBytes < 12 ? kLimit / kStageBytes : 12;
  static constexpr int kBarriers = kStages * kStageBytes;  // offsets
  static constexpr int kRest = kBarriers + 256;
  static constexpr int kBytes = kRest + kReserved;
  static_assert(kStages >= 4 && kBlocks * kRegs <= 128 && kStages * 16 + 8 <= 256);
};

// Sums pass through shared memory: 64 rows x some tokens in f32, a token's rows together, 76 floats a token, and 8 of
// them between rows 31 and 32, so that neither a warp's accumulators nor four rows of one token, or of 16 rows apart,
// meet in a bank.
constexpr int kQ4TokenFloats = 76;
constexpr int kQ4TokenBytes = kQ4TokenFloats * 4;

#if Q4S_SM90A

// Addresses of a block's shared memory.
template <class T>
struct Q4Shared {
  uint32_t x, w, s, full, empty, lead;
  const uint8_t* w_data;
  const uint8_t* s_data;

  __device__ explicit Q4Shared(const uint8_t* base) {
    x = hopper::smem_address(base);
    w_data = base + T::kStages * T::kXBytes;
    s_data = w_data + T::kStages * T::kWBytes;
    w = hopper::smem_address(w_data);
    s = hopper::smem_address(s_data);
    full = x + T::kBarriers;
    empty = full + T::kStages * 8;
    lead = empty + T::kStages * 8;
  }
  // By one thread; a barrier of all must follow.
  __device__ void init() const {
    for (int i = 0; i < T::kStages; ++i) {
      hopper::barrier_init(full + i * 8, 1);
      hopper::barrier_init(empty + i * 8, kQ4Consumers * 4 * T::kCluster);
    }
    hopper::barrier_init(lead, 1);
    hopper::barrier_init_fence();
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
    hopper::barrier_arrive_expect(full, T::kXBytes + T::kWBytes + T::kRows / 16 * p.box_groups * 32);
    hopper::tma_load(sh.w + stage * T::kWBytes, &map_w, k_tile * (kQ4TileBytes / 4), n_tile, full);
    const int group = p.stage_groups ? int(__umulhi(uint32_t(k_tile), p.stage_groups)) : k_tile * p.box_groups;
    hopper::tma_load(sh.s + stage * T::kSBytes, &map_s, group * 16, n_tile, full);
  }
  __device__ void activations(int stage, int token0, int k_tile) const {
    constexpr int kSlice = T::kColumns / T::kCluster;
    const uint32_t full = sh.full + stage * 8, to = sh.x + stage * T::kXBytes + rank * kSlice * 128;
    if constexpr (T::kCluster == 1)
      hopper::tma_load(to, &map_x, k_tile * kQ4TileCols, token0, full);
    else
      hopper::tma_load_multicast(to, &map_x, k_tile * kQ4TileCols, token0 + rank * kSlice, full,
                                 uint16_t((1 << T::kCluster) - 1));
  }
};

// The producer's thread. Cursor: next() steps to the next stage; n_tile(), token0(), k_tile() say what it holds.
// Weights depend on no kernel before this one: the whole ring of them is on its way before the wait.
template <class T, class Cursor>
__device__ void q4_produce(const Q4Loader<T>& load, Cursor weights) {
  hopper::tma_prefetch_map(&load.map_w);
  hopper::tma_prefetch_map(&load.map_s);
  hopper::tma_prefetch_map(&load.map_x);
  Cursor activations = weights;
  int filled = 0;
  for (; filled < T::kStages && weights.next(); ++filled) load.weights(filled, weights.n_tile(), weights.k_tile());
  pdl_wait();
  for (int i = 0; i < filled; ++i) {
    activations.next();
    load.activations(i, activations.token0(), activations.k_tile());
  }
  hopper::RingPosition<T::kStages> at;
  at.parity = 1;
  while (filled == T::kStages && weights.next()) {
    hopper::barrier_wait(load.sh.empty + at.stage * 8, at.parity ^ 1);
    load.weights(at.stage, weights.n_tile(), weights.k_tile());
    load.activations(at.stage, weights.token0(), weights.k_tile());
    at.next();
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

  __device__ void release() const {
    if constexpr (T::kCluster == 1) {
      if (lane == 0) hopper::barrier_arrive(sh.empty + last * 8);
    } else {  // the peers' producers write here as well
      if (lane < T::kCluster) hopper::barrier_arrive_remote(sh.empty + last * 8, lane);
    }
  }
  // Sums over `units` units of K, still in flight at return. Thread 0 arrives at sh.lead before stage `lead`.
  __device__ void multiply(int units, int lead, float (&acc)[T::kBlocks][T::kRegs]) {
    uint32_t a[2][T::kSteps][4];  // fragments of 64 rows, double buffered
    for (int unit = 0; unit < units; ++unit) {
#pragma unroll
      for (int kk = 0; kk < kQ4UnitStages; ++kk) {
        const bool first = kk == 0 && unit == 0;
        if (unit * kQ4UnitStages + kk == lead && thread == 0) hopper::barrier_arrive(sh.lead);
        hopper::barrier_wait(sh.full + at.stage * 8, at.parity);
#pragma unroll
        for (int block = 0; block < T::kBlocks; ++block) {
          const int row_tile = (group * T::kBlocks + block) * 4 + warp;
          const uint4 lane_words = *reinterpret_cast<const uint4*>(sh.w_data + at.stage * T::kWBytes +
                                                                   row_tile * kQ4TileBytes + lane * 16);
          const uint32_t words[4] = {lane_words.x, lane_words.y, lane_words.z, lane_words.w};
          const __half* scales = reinterpret_cast<const __half*>(sh.s_data + at.stage * T::kSBytes) +
                                 row_tile * p.box_groups * 16 + lane / 4;
          const uint32_t x = sh.x + at.stage * T::kXBytes;
          Q4Fragment f;
          f.set(scales, p.half_grid);
#pragma unroll
          for (int step = 0; step < 4; step += T::kSteps) {
            const int buffer = ((kk * T::kBlocks + block) * 4 + step) / T::kSteps % 2;
#pragma unroll
            for (int j = 0; j < T::kSteps; ++j) {
              if (step + j == 2 && p.box_groups > 1) f.set(scales + 16, p.half_grid);
              f.unpack(words[step + j], a[buffer][j]);
            }
            hopper::wgmma_fence();
#pragma unroll
            for (int j = 0; j < T::kSteps; ++j)
              hopper::WgmmaRs<T::kColumns, 0>::mma(acc[block], a[buffer][j], hopper::wgmma_k_major(x + 32 * (step + j)),
                                                   !first || step + j > 0);
            hopper::wgmma_commit();
            hopper::wgmma_wait<1>();  // the step before is done: its fragments are free, and its stage if it was the last
            if (block == 0 && step == 0 && !first) release();
          }
        }
        last = at.stage;
        at.next();
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

__device__ inline int q4_row_offset(int row) { return row + row / 32 * 8; }

// One warp's accumulators of 8 tokens: c[4] = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ inline void q4_stage_sums(float* tokens, int warp, int lane, const float* c) {
  float* to = tokens + lane % 4 * 2 * kQ4TokenFloats + q4_row_offset(warp * 16) + lane / 4;
  to[0] = c[0], to[kQ4TokenFloats] = c[1], to[8] = c[2], to[kQ4TokenFloats + 8] = c[3];
}

#endif  // Q4S_SM90A

// ---- host ----------------------------------------------------------------------------------------------------------
struct Q4Maps {
  CUtensorMap x, w, s;
};
// For tiles of `rows` rows; a block loads x_columns tokens at a time.
Q4Maps q4_gemm_maps(const Q4GemmArgs&, int rows, int x_columns, Q4Operands&);

void q4_gemm_stream_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);
void q4_gemm_split_cuda(const Q4GemmArgs&, const Q4GemmConfig&, cudaStream_t);

}  // namespace q4s
