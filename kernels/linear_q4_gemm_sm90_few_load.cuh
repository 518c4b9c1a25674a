// What warps of linear_q4_gemm_sm90_few.cu bring into a block: weights and activations by TMA, and the
// factors of norms.
#pragma once
#include "kernels/linear_q4_gemm_sm90_few.cuh"

namespace q4s {

#if Q4S_SM90A

// Stages on their way while a product's activations are awaited, which come behind them.
constexpr int kQ4FewAhead = 2;

// By one warp, which waits for the cluster too, but asks for the first before: weights of all products, as
// far ahead of their use as the ring is long. A lane asks for one unit of a stage.
__device__ inline void q4_few_weights(const Q4FewShared& sh, const Q4FewParams& p, int lane) {
  using namespace hopper;
  Q4FewCursor ring;
  bool met = false;
  const uint64_t policy = read_once();
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const Q4FewProduct& a = p.product[i];
    const Q4FewWork& work = sh.state->work[i];
    if (lane == 0) tma_prefetch_map(&a.w), tma_prefetch_map(&a.s);
    const Q4Operands o = a.operands;
    const Q4FewCursor first = ring;
    Q4FewCursor arriving = ring;
    int asked = 0;
    bool begun = false;  // the first stage has been read: x is there
#pragma unroll 1
    for (int b = 0; b < work.bands; ++b) {
      const int row = work.band(b);
#pragma unroll 1
      for (int u = 0; u < work.units; u += a.ways, ++asked) {
        if (asked >= kQ4FewAhead && !met) cluster_wait(), met = true;
        barrier_wait(sh.empty(ring.stage), ring.parity ^ 1);
        if (!begun) begun = __any_sync(0xffffffffu, mbarrier_done(sh.empty(first.stage), first.parity));
        if (!begun && asked >= kQ4FewAhead)
          barrier_wait(sh.full(arriving.stage), arriving.parity), arriving.next(p.stages);
        const uint32_t full = sh.full(ring.stage);
        const int left = min(a.ways, work.units - u);
        if (lane == 0) barrier_arrive_expect(full, uint32_t(left * (a.w_bytes + a.band * o.box_groups * 32)));
        __syncwarp();
        if (lane < left) {
          const int k_tile = work.unit(u + lane) * kQ4UnitTiles;
          const int group = o.tile_groups ? int(__umulhi(uint32_t(k_tile), o.tile_groups)) : k_tile * o.fine;
          tma_load(sh.w(ring.stage) + lane * a.w_bytes, &a.w, k_tile * (kQ4TileBytes / 4), row, full, policy);
          tma_load(sh.s(ring.stage, p.s_bytes) + lane * a.s_bytes, &a.s, group * 16, row, full, policy);
        }
        ring.next(p.stages);
      }
    }
  }
  if (!met) cluster_wait();
  pdl_trigger();
}

// Activations of all products, units of K dealt over the warps, each of which has its own slots: in shared
// memory each 16 columns are the B fragments of mma.m16n8k16 for tokens 0..7 and 8..15, 16 bytes a lane.
class Q4FewActivations {
 public:
  __device__ Q4FewActivations(const Q4FewShared& sh, const Q4FewParams& p, int warp)
      : sh_(sh), p_(p), warp_(warp) {}
  __device__ void run() {
    given(p_.product[0], sh_.state->work[0]);
    if (p_.count == 1) return;
    hopper::barrier_wait(sh_.begun(), 0);
#pragma unroll 1
    for (int i = 1; i < p_.count; ++i) {
      const Q4FewWork& before = sh_.state->work[i - 1];
      before_ += uint32_t(before.bands * before.units);
      made(p_.product[i], sh_.state->work[i], p_.exchange + sh_.state->set + p_.product[i].x_at);
    }
  }

 private:
  // The warp's first unit of a product.
  __device__ int first() const {
    return int((uint32_t(warp_) + kQ4FewLoad - before_ % kQ4FewLoad) % kQ4FewLoad);
  }
  __device__ void wait_empty(uint32_t at) const {
    hopper::barrier_wait(sh_.x_empty(at % kQ4FewXSlots), (at / kQ4FewXSlots & 1) ^ 1);
  }

  // From rows of x, of which a lane takes 8 columns of a token at a time.
  __device__ void given(const Q4FewProduct& a, const Q4FewWork& work) const {
    const int count = work.bands * work.units, lane = lane_again(), token = lane / 2;
#pragma unroll 1
    for (int j = first(); j < count; j += kQ4FewLoad) {
      const int column = work.unit(j) * kQ4GemmUnit + lane % 2 * 8;
      const __half* const from = a.x + (int64_t(token) * a.pitch + column);
      uint4 v[kQ4FewUnitSteps];
#pragma unroll
      for (int s = 0; s < kQ4FewUnitSteps; ++s) {
        v[s] = make_uint4(0, 0, 0, 0);
        if (token < p_.tokens && column + s * kQ4TileRows < a.pitch)
          v[s] = *reinterpret_cast<const uint4*>(from + s * kQ4TileRows);
      }
      const uint32_t at = before_ + uint32_t(j), slot = at % kQ4FewXSlots,
                     to = sh_.x(slot) + token % 8 * 64 + token / 8 * 8 + lane % 2 * 4;
      wait_empty(at);
#pragma unroll
      for (int s = 0; s < kQ4FewUnitSteps; ++s) {
        store_shared(to + s * kQ4FewStepBytes, v[s].x);
        store_shared(to + s * kQ4FewStepBytes + 16, v[s].y);
        store_shared(to + s * kQ4FewStepBytes + 32, v[s].z);
        store_shared(to + s * kQ4FewStepBytes + 48, v[s].w);
      }
      __syncwarp();
      finish(slot, kQ4FewUnitSteps, a);
    }
  }

  // From the exchange, where they lie as they are to: copied until all are there, the next unit's while one
  // is looked at. The copies read L2, where the words of other blocks appear one by one: a word that is not
  // zero is the one that was stored.
  __device__ void made(const Q4FewProduct& a, const Q4FewWork& work, const std::byte* from) {
    const int count = work.bands * work.units;
    const auto steps = [&](int j) { return min(kQ4FewUnitSteps, a.steps - work.unit(j) * kQ4FewUnitSteps); };
    const auto ask = [&](int j) {
      const uint32_t slot = (before_ + uint32_t(j)) % kQ4FewXSlots,
                     bytes = uint32_t(steps(j) * kQ4FewStepBytes);
      __syncwarp();  // what was copied before has been read
      if (lane_again() == 0) {
        hopper::barrier_arrive_expect(sh_.x_come(slot), bytes);
        hopper::bulk_load(sh_.x(slot), from + int64_t(work.unit(j)) * kQ4FewXBytes, bytes, sh_.x_come(slot));
      }
      __syncwarp();
    };
    int asked = first();
    const auto ask_next = [&] {
      if (asked >= count) return;
      wait_empty(before_ + uint32_t(asked)), ask(asked);
      asked += kQ4FewLoad;
    };
    ask_next();
#pragma unroll 1
    for (int j = first(); j < count; j += kQ4FewLoad) {
      const uint32_t slot = (before_ + uint32_t(j)) % kQ4FewXSlots, turn = slot >= kQ4FewLoad ? 2 : 1;
      // As long as nothing is there, one at a time.
      if (j != first()) ask_next();
      for (;;) {
        hopper::barrier_wait(sh_.x_come(slot), (come_ & turn) != 0);
        come_ ^= turn;
        if (finish(slot, steps(j), a)) break;
        ask(j);
      }
      if (j == first()) ask_next();
    }
  }

  // Of a slot with so many steps: false where some are not there. Else what sums of codes are too large by,
  // which are taken as they are, of rows g and of rows g + 8; and the slot is full.
  __device__ bool finish(uint32_t slot, int steps, const Q4FewProduct& a) const {
    const int lane = lane_again();
    const uint32_t at = sh_.x(slot) + lane * 16;
    constexpr uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    float sum[2][4] = {};
    uint32_t least = ~0u;
#pragma unroll
    for (int s = 0; s < kQ4FewUnitSteps; ++s) {
      if (s >= steps)
        hopper::store_shared(at + s * kQ4FewStepBytes,
                             make_uint4(kQ4FewZero, kQ4FewZero, kQ4FewZero, kQ4FewZero));
      const uint4 v = hopper::load_shared(at + s * kQ4FewStepBytes);
      mma_16816(sum[0], kOnes, v.x, v.y), mma_16816(sum[1], kOnes, v.z, v.w);
      least = min(min(least, min(v.x, v.y)), min(v.z, v.w));
    }
    if (!a.x && !__all_sync(0xffffffffu, least != 0)) return false;
    if (lane < 4)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float low = sum[j][0] * a.offset, high = sum[j][1] * a.offset;
        hopper::store_shared(sh_.offsets(slot) + j * 64 + lane * 16,
                             make_float4(low * kQ4FewLowCode, high * kQ4FewLowCode, low * kQ4FewHighCode,
                                         high * kQ4FewHighCode));
      }
    hopper::barrier_arrive(sh_.x_full(slot));  // every lane for what it wrote
    return true;
  }

  const Q4FewShared& sh_;
  const Q4FewParams& p_;
  int warp_;
  uint32_t before_ = 0, come_ = 0;  // units of the products before; parities of this warp's slots
};

// Sums over g = lane / 4, the same in all lanes of a token.
__device__ inline void q4_few_add_rows(float (&v)[2]) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2)
#pragma unroll
    for (int e = 0; e < 2; ++e) v[e] += __shfl_xor_sync(0xffffffffu, v[e], offset);
}

// The set of the exchange that the chain before this used.
struct Q4FewOther {
  std::byte* set = nullptr;
  uint32_t bytes = 0;  // that it left there
  // By one warp of each block.
  __device__ void clear(int lane) const {
    const uint32_t share = (bytes / 512 / gridDim.x + 1) * 512, begin = blockIdx.x * share;
    for (uint32_t at = begin + lane * 16; at < min(begin + share, bytes); at += 512)
      *reinterpret_cast<uint4*>(set + at) = make_uint4(0, 0, 0, 0);
  }
};

// Finds which set is this chain's, by one warp of each block.
__device__ inline Q4FewOther q4_few_begin(const Q4FewParams& p, Q4FewState& state, int lane) {
  Q4FewOther other;
  if (p.count <= 1) return other;
  Q4FewHead* const head = reinterpret_cast<Q4FewHead*>(p.exchange);
  const uint32_t chains = __ldcg(&head->chains), which = chains & 1;
  other.bytes = __ldcg(&head->left[which ^ 1]);
  other.set = p.exchange + kQ4FewHeadBytes + (which ^ 1) * kQ4GemmExchangeSet;
  if (lane == 0) {
    state.set = uint32_t(kQ4FewHeadBytes + which * kQ4GemmExchangeSet);
    // All blocks have read the head when the last comes here.
    uint32_t arrived;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(arrived)
                 : "l"(&head->arrived)
                 : "memory");
    if (arrived + 1 == gridDim.x) {
      head->chains = chains + 1, head->arrived = 0;
      head->left[which] = p.set_bytes, head->left[which ^ 1] = 0;
    }
  }
  return other;
}

// The factor of the norm of token token0 + lane % 8, from sums of squares as soon as blocks have made them.
// By one warp. A stream that is not finite stays so, though its fp16 values are clamped.
__device__ inline float q4_few_factor(const Q4FewProduct& a, const std::byte* squares, int lane, int token0) {
  const std::byte* const from = squares + (token0 + lane % 4 * 2) * 4;
  float sum[2] = {};
  constexpr int kTogether = 8;
#pragma unroll 1
  for (int tile = lane / 4; tile - lane / 4 < a.steps; tile += 8 * kTogether) {
    uint2 v[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      v[j] = tile + 8 * j < a.steps ? load_made(from + (tile + 8 * j) * kQ4FewSquareBytes)
                                    : make_uint2(kQ4FewZero, kQ4FewZero);
    for (;;) {
      bool all = true;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) all = all && made(v[j]);
      if (__all_sync(0xffffffffu, all)) break;
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (!made(v[j])) v[j] = load_made(from + (tile + 8 * j) * kQ4FewSquareBytes);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) sum[0] += __uint_as_float(v[j].x), sum[1] += __uint_as_float(v[j].y);
  }
  q4_few_add_rows(sum);
  const float even = __shfl_sync(0xffffffffu, sum[0], lane % 8 / 2),
              odd = __shfl_sync(0xffffffffu, sum[1], lane % 8 / 2);
  const float mean = (lane % 2 ? odd : even) * a.inverse_k;
  return mean < INFINITY ? 1.f / sqrtf(mean + a.eps) : NAN;
}

// By one warp: what this block's epilogues need of their 8 tokens, from token0 on.
__device__ inline void q4_few_prepare(const Q4FewShared& sh, const Q4FewParams& p, int lane, int token0) {
  Q4FewState& state = *sh.state;
  const bool mine = lane < 8 && token0 + lane < p.tokens;
  const Q4FewOther other = q4_few_begin(p, state, lane);
  if (mine && p.position)
    state.position[lane] = p.position[token0 + lane], state.sequence[lane] = p.sequence[token0 + lane];
  float guess = mine && p.guess ? __ldcg(p.guess + token0 + lane) : 0;
  __syncwarp();
  hopper::barrier_arrive(sh.begun());  // every lane for what it wrote
  other.clear(lane);
  bool found = false;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const Q4FewProduct& a = p.product[i];
    if (a.normalises) {
      const float factor = q4_few_factor(a, p.exchange + state.set + a.squares_at, lane, token0);
      if (lane < 8) state.factor[i][lane] = factor / guess;
      guess = factor * kQ4GemmHeadroom, found = true;
    }
    if (lane < 8) state.guess[i][lane] = guess;
    hopper::barrier_arrive(sh.ready(i));  // every lane for what it wrote
  }
  if (found && mine && blockIdx.x < kQ4FewParts) p.guess[token0 + lane] = guess;
}

#endif  // Q4S_SM90A

}  // namespace q4s
