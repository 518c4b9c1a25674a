// What the kernel for up to 16 tokens works on (linear_q4_gemm_sm90_few.cu): its products, how a block's
// shared memory is laid out, and which part of a product is whose.
#pragma once
#include <algorithm>

#include "kernels/linear_q4_gemm_sm90_loop.cuh"

namespace q4s {

constexpr int kQ4FewTokens = kQ4GemmFewTokens;
constexpr int kQ4FewMultiply = 12;  // warps that do, two tiles of rows each
constexpr int kQ4FewLoad = 6;       // warps that bring activations
constexpr int kQ4FewParts = 2;      // of K: blocks of a cluster
constexpr int kQ4FewBand = 24;      // most tiles of 16 rows that a block works on at a time
constexpr int kQ4FewStepBytes = kQ4FewTokens * kQ4TileRows * 2;  // of activations, 16 columns
constexpr int kQ4FewSquareBytes = kQ4FewTokens * 4;              // of 16 columns of a stream
constexpr int kQ4FewUnitSteps = kQ4GemmUnit / kQ4TileRows;
constexpr int kQ4FewXBytes = kQ4FewStepBytes * kQ4FewUnitSteps;
constexpr int kQ4FewRowBytes = kQ4TileBytes * kQ4UnitTiles;  // of one tile of rows, a unit

// A stage of the ring is some units of K for a band of tiles, and each warp has two tiles of one of them.
constexpr int q4_few_ways(int tiles) {
  int ways = 12;
  for (const int fewer : {6, 4, 3, 2, 1})
    if (ways * ((tiles + 1) / 2) > kQ4FewMultiply) ways = fewer;
  return ways;
}

// One product of a chain. What products make for the next one is in a set of the exchange, at these offsets.
struct Q4FewProduct {
  CUtensorMap w, s;
  Q4GemmSink sink;
  Q4Operands operands;
  const __half* x;    // (T, pitch) given, or null: made by the product before this
  const float* gain;  // of the norm between this product and the next one, or null
  uint32_t x_at, squares_at, next_x_at, next_squares_at;
  int pitch, steps;                  // of K: elements of a row of x; sixteens
  int units, tiles;                  // of K, of rows
  int band, ways, w_bytes, s_bytes;  // tiles and units of a box, and what it takes of a stage
  float inverse_k, eps;              // of the norm of this product's x
  bool normalises, makes;            // x made is to be normalised; the next one's x is made
  bool scale_sums;                   // groups of whole units; else weights are scaled one by one
  float offset;                      // that codes have
};

// Head of the exchange: chains so far, and bytes that chains have left in its two sets.
struct Q4FewHead {
  uint32_t chains, left[2], arrived;
};
constexpr size_t kQ4FewHeadBytes = kQ4GemmExchange - 2 * kQ4GemmExchangeSet;  // guesses too

struct Q4FewParams {
  Q4FewProduct product[kQ4GemmChain];
  std::byte* exchange;
  float* guess;
  const int32_t *position, *sequence;  // of a product with a rotation
  uint32_t set_bytes;                  // that this chain uses
  int count, tokens, clusters;
  int stages, s_bytes;  // of the ring; scales of a stage
};

// What a block does of a product, in order: bands of row tiles; of each, units of K. Blocks begin at
// different places of their part: all at once, they would ask the second cache for the same lines of
// activations.
struct Q4FewWork {
  int first, count, bands, begin, units, turn;
  Q4FewWork() = default;
  __device__ Q4FewWork(const Q4FewParams& p, const Q4FewProduct& a) {
    const int rank = int(blockIdx.x) % kQ4FewParts, c = int(blockIdx.x) / kQ4FewParts;
    first = a.tiles * c / p.clusters;
    count = a.tiles * (c + 1) / p.clusters - first;
    bands = (count + a.band - 1) / a.band;
    begin = a.units * rank / kQ4FewParts, units = a.units * (rank + 1) / kQ4FewParts - begin;
    turn = units ? c % units : 0;  // a short K leaves a block without any
  }
  // The i-th of all bands.
  __device__ int unit(int i) const {
    for (i += turn; i >= units;) i -= units;
    return begin + i;
  }
  __device__ int band(int b) const { return first + count * b / bands; }  // its first tile
  __device__ int tiles(int b) const { return band(b + 1) - band(b); }
};

// Of a block's 8 tokens, for those who take sums to their place.
struct Q4FewState {
  float factor[kQ4GemmChain][8], guess[kQ4GemmChain][8];
  int position[8], sequence[8];
  uint32_t set;  // offset of this chain's in the exchange
  Q4FewWork work[kQ4GemmChain];
};

// Codes enter the tensor core as they lie in a word: in fp16, below its normal range, the low nibble of a
// byte counts in these units (rows g of a tile), the high one in those (rows g + 8).
constexpr float kQ4FewLowCode = 0x1p-24f, kQ4FewHighCode = 0x1p-20f;
constexpr int kQ4FewStages = 8;  // most of the ring
// Units of activations. A multiple of the warps: each slot is filled by one, which cannot mistake an earlier
// turn for the one before its own.
constexpr int kQ4FewXSlots = 2 * kQ4FewLoad;
constexpr int kQ4FewWBytes = kQ4FewBand * kQ4FewRowBytes;
constexpr int kQ4FewSumBytes = kQ4FewParts * kQ4FewBand * 512;
constexpr int kQ4FewOffsetBytes = 128;  // of a slot: what offsets of codes add to sums
constexpr int kQ4FewBarriers = 2 * kQ4FewStages + 3 * kQ4FewXSlots + 3 + int(kQ4GemmChain);
constexpr int kQ4FewSumsAt = kQ4FewXSlots * kQ4FewXBytes, kQ4FewOffsetsAt = kQ4FewSumsAt + kQ4FewSumBytes,
              kQ4FewBarriersAt = kQ4FewOffsetsAt + kQ4FewXSlots * kQ4FewOffsetBytes,
              kQ4FewStateAt = kQ4FewBarriersAt + kQ4FewBarriers * 8,
              kQ4FewRingAt = (kQ4FewStateAt + int(sizeof(Q4FewState)) + 127) / 128 * 128;
inline int q4_few_stages(int s_bytes) {
  return std::min((int(kQ4SharedBytes) - kQ4FewRingAt) / (kQ4FewWBytes + s_bytes), kQ4FewStages);
}

#if Q4S_SM90A

// A block's shared memory: units of activations, parts of sums, offsets, barriers, Q4FewState; the ring,
// weights before scales.
struct Q4FewShared {
  uint32_t base;
  Q4FewState* state;
  int stages;
  __device__ Q4FewShared(const Q4FewParams& p, uint8_t* shared)
      : base(shared_address(shared)),
        state(reinterpret_cast<Q4FewState*>(shared + kQ4FewStateAt)),
        stages(p.stages) {}
  __device__ uint32_t x(int slot) const { return base + slot * kQ4FewXBytes; }
  __device__ uint32_t sums() const { return base + kQ4FewSumsAt; }
  __device__ uint32_t offsets(int slot) const { return base + kQ4FewOffsetsAt + slot * kQ4FewOffsetBytes; }
  __device__ uint32_t full(int stage) const { return base + kQ4FewBarriersAt + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(kQ4FewStages + stage); }
  __device__ uint32_t x_full(int slot) const { return full(2 * kQ4FewStages + slot); }
  __device__ uint32_t x_empty(int slot) const { return x_full(kQ4FewXSlots + slot); }
  __device__ uint32_t x_come(int slot) const { return x_full(2 * kQ4FewXSlots + slot); }
  __device__ uint32_t full_sums() const { return x_full(3 * kQ4FewXSlots); }
  __device__ uint32_t empty_sums() const { return full_sums() + 8; }
  __device__ uint32_t begun() const { return full_sums() + 16; }
  __device__ uint32_t ready(int product) const { return full_sums() + 24 + product * 8; }
  __device__ uint32_t w(int stage) const { return base + kQ4FewRingAt + stage * kQ4FewWBytes; }
  __device__ uint32_t s(int stage, int s_bytes) const { return w(stages) + stage * s_bytes; }
  // By all warps; a barrier of all must follow. One lane of each: more would go one after another.
  __device__ void init(const Q4FewParams& p, int warp, int lane, int warps) const {
    if (warp == warps - 1 && lane < p.count) state->work[lane] = Q4FewWork(p, p.product[lane]);
    if (lane > 0) return;
    for (int i = warp; i < kQ4FewBarriers; i += warps) {
      const uint32_t at = full(i);
      const int arrivals = at < empty(0)        ? 1
                           : at < x_full(0)     ? kQ4FewMultiply
                           : at < x_empty(0)    ? 32
                           : at < x_come(0)     ? kQ4FewMultiply * 32
                           : at <= full_sums()  ? 1
                           : at == empty_sums() ? kQ4FewParts * kQ4FewMultiply
                                                : 32;
      hopper::barrier_init(at, arrivals);
    }
    hopper::barrier_init_fence();
  }
};

// A place in the ring, whose length is not a constant.
struct Q4FewCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Values that blocks of a chain make for each other, two in fp16 or a float a word. Zero says that there is
// none yet, and a value of zero has a sign. Each word stands for itself: no order among them is needed, nor a
// fence.
constexpr uint32_t kQ4FewZero = 0x80000000u;
__device__ inline uint2 load_made(const std::byte* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ inline bool made(const uint2& v) { return min(v.x, v.y) != 0; }
__device__ inline void store_made(std::byte* p, uint32_t a) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(a ? a : kQ4FewZero) : "memory");
}
__device__ inline void store_made(std::byte* p, uint32_t a, uint32_t b) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(a ? a : kQ4FewZero),
               "r"(b ? b : kQ4FewZero)
               : "memory");
}

#endif  // Q4S_SM90A

}  // namespace q4s
