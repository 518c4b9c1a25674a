// attention_prefill.h on Hopper for heads of 64 and 128, after FlashAttention-3 (Shah et al., 2024). A tile
// is 64 queries for each consumer warpgroup, of one head or of some that share keys. A producer warp fills a
// ring of K and V tiles of 128 positions by TMA, and the next tile's queries while this one is computed:
// blocks are persistent.
//   S (64, 128) = Q K^T    both from shared memory
//   O (64, hd) = P V       P is S's own registers, V read along its rows
// A warpgroup asks for the scores of the next 128 positions and the values of the last ones at once, and is
// at its softmax while the tensor core works for the others. Sums are f32; the order depends on the shapes
// alone.
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "kernels/attention_prefill_sm90.cuh"
#include "kernels/attention_prefill_sm90_fetch.cuh"
#include "kernels/pdl.cuh"
#include "kernels/tensor_map.h"

namespace q4s {
namespace {

using namespace prefill_attention;

constexpr float kLog2e = 1.4426950408889634f;
#if Q4S_SM90A

using namespace hopper;

// What a thread's weights of a row sum to at most in a tile, within fp16; a base before any score.
constexpr float kMost = 1 << 15, kLowest = -1e30f;

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rows from `row` on of the V tile at `tile` become zero: no token is there, and 0 * NaN would reach the
// sums. All warpgroups write the same.
template <class S>
__device__ void clear_rows(uint32_t tile, int row, int group, int thread) {
#pragma unroll 1
  for (int i = row * 8 + thread; i < kKeys * 8; i += 128)
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box) store_shared(tile + box * S::kBoxBytes + i * 16, uint4{});
  proxy_fence();
  named_barrier(1 + group, 128);
}

// Whose turn it is to ask the tensor core for work.
template <class S>
struct Turns {
  int group;
  __device__ void begin() const {
    if (group == S::kConsumers - 1) named_barrier_arrive(8, 256);
  }
  __device__ void take() const { named_barrier(8 + group, 256); }
  __device__ void pass() const {
    named_barrier_arrive(8 + (group + 1 == S::kConsumers ? 0 : group + 1), 256);
  }
};

template <class S>
__device__ void consume(const Maps& maps, const Params& p, const Addresses<S>& at,
                        const typename S::Common* commons) {
  constexpr int kHd = S::kHd;
  const AttentionPrefillArgs& a = p.a;
  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128,
            lane = thread % 32;
  const int row = group * 64 + thread / 32 * 16 + lane / 4;  // and row + 8
  const int t = lane % 4;
  const Turns<S> turns{group};
  turns.begin();
  float o[kHd / 2], s[kKeys / 2];
  uint32_t w[kKeys / 16][4];
  RingPosition<S::kStages> of_k, of_v;
  int stored = -1;  // slot of queries that TMA may still read the outputs from
  Tile tile;
  for (int n = 0; tile.find<S>(p, n); ++n) {
    const int slot = n % 2;
    const typename S::Common& common = commons[slot];
    const uint32_t q = at.q + slot * S::kQueryBytes + group * 64 * 128, q_low = wgmma_address(q);
    barrier_wait(at.full_q + slot * 8, n / 2 % 2);
    // A weight is two to the power of a score's distance from the row's base, which is the largest score of
    // some tile.
    float base[2] = {kLowest, kLowest}, total[2] = {};
#pragma unroll
    for (int i = 0; i < kHd / 2; ++i) o[i] = 0;

    const auto scores = [&] {
      const uint32_t k_low = wgmma_address(at.k) + of_k.stage * (S::kTileBytes / 16);
      barrier_wait(at.full_k + of_k.stage * 8, of_k.parity);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < kHd / 16; ++c)
        WgmmaSs<kKeys>::mma(s, wgmma_k_major_at(q_low + (c / 4 * S::kQueryBox + c % 4 * 32) / 16),
                            wgmma_k_major_at(k_low + (c / 4 * S::kBoxBytes + c % 4 * 32) / 16), c > 0);
      wgmma_commit();
    };
    const auto scores_done = [&] {
      wgmma_pin(s);
      if (lane == 0) barrier_arrive(at.empty_k + of_k.stage * 8);
      of_k.next();
    };
    const auto values = [&](int rows) {
      barrier_wait(at.full_v + of_v.stage * 8, of_v.parity);
      if (rows < kKeys) clear_rows<S>(at.v + of_v.stage * S::kTileBytes, rows, group, thread);
      const uint32_t v_low = wgmma_n_address(at.v, S::kBoxBytes) + of_v.stage * (S::kTileBytes / 16);
      wgmma_fence();
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n)
        WgmmaRs<kHd, 1>::mma(o, w[n], wgmma_k_major_at(v_low + n * 2048 / 16), 1);
      wgmma_commit();
    };
    const auto values_done = [&] {
      wgmma_wait<0>();
      wgmma_pin(o);
      if (lane == 0) barrier_arrive(at.empty_v + of_v.stage * 8);
      of_v.next();
    };
    const auto mask = [&](const Walk<S>& walk) {
      if (walk.first + kKeys <= walk.pass.least + 1) return;
      int last[2];  // of what a row sees, from this thread's first column on
#pragma unroll
      for (int r = 0; r < 2; ++r)
        last[r] = common.sequence[row + 8 * r] == walk.pass.sequence
                      ? common.position[row + 8 * r] - walk.first - t * 2
                      : -1;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 4 * 8 + i % 2 > last[i % 4 / 2]) s[i] = -INFINITY;
    };
    // Bases of the rows that are low to the largest scores so far; sums so far shrink with them.
    const auto raise = [&](bool low_0, bool low_1) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
        for (int i = 1; i < kKeys / 8; ++i) most = fmaxf(most, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        most = (r ? low_1 : low_0) ? fmaxf(most * p.scale, base[r]) : base[r];
        const float shrink = exp2_fast(base[r] - most);
        base[r] = most, total[r] *= shrink;
#pragma unroll
        for (int i = 0; i < kHd / 4; ++i) o[i / 2 * 4 + i % 2 + 2 * r] *= shrink;
      }
    };
    // Scores to weights. That a base is too low is seen from the weights: to look for the largest score of
    // every tile first cost 7 % of the time with heads of 64.
    const auto soften = [&] {
      float sum[4];
#pragma unroll 1
      for (bool raised = false;; raised = true) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
          float x[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            x[c] = exp2_fast(s[4 * i + c] * p.scale - base[c / 2]);
            sum[c] = i ? sum[c] + x[c] : x[c];
          }
#pragma unroll
          for (int c = 0; c < 2; ++c) w[i / 2][i % 2 * 2 + c] = pack_half2(x[2 * c], x[2 * c + 1]);
        }
        sum[0] += sum[1], sum[2] += sum[3];
        if (raised || !__any_sync(~0u, fmaxf(sum[0], sum[2]) > kMost)) break;
        // Of four threads' row by their own scores alone: its sums do not depend on its neighbours.
        const uint32_t quad = 15u << (lane & 28);
        raise(__ballot_sync(~0u, sum[0] > kMost) & quad, __ballot_sync(~0u, sum[2] > kMost) & quad);
      }
      total[0] += sum[0], total[1] += sum[2];
    };

    Walk<S> walk(common, S::kSkips ? common.last_end[group] : INT_MAX);
    scores();
    wgmma_wait<0>();
    scores_done();
    mask(walk);
    raise(true, true);
    soften();
    if (stored >= 0 && thread == 0) {
      bulk_wait_read();
      barrier_arrive(at.empty_q + stored * 8);
    }
    while (true) {
      const int rows = walk.pass.end - walk.first;
      if (!walk.next()) {
        values(rows);
        break;
      }
      turns.take();
      scores();
      values(rows);
      turns.pass();
      wgmma_wait<1>();
      scores_done();
      mask(walk);
      values_done();
      soften();
    }
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      inverse[r] = 1 / total[r];
    }
    values_done();
    if constexpr (S::kSkips) {
#pragma unroll 1
      for (; walk.first < walk.pass.end; walk.first += kKeys) {  // what only others see
        turns.take(), turns.pass();
        barrier_wait(at.full_k + of_k.stage * 8, of_k.parity);
        barrier_wait(at.full_v + of_v.stage * 8, of_v.parity);
        if (lane == 0)
          barrier_arrive(at.empty_k + of_k.stage * 8), barrier_arrive(at.empty_v + of_v.stage * 8);
        of_k.next(), of_v.next();
      }
    }
    if (a.y_half) {
      // Through the place of this warpgroup's queries, which are done with.
      named_barrier(1 + group, 128);
#pragma unroll
      for (int d = 0; d < kHd / 8; d += 2) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v[i] = pack_half2(o[4 * d + 2 * i] * inverse[i % 2], o[4 * d + 2 * i + 1] * inverse[i % 2]);
        const int to = thread / 32 * 16 + lane % 16, piece = d % 8 + lane / 16;
        store_matrices(q + d / 8 * S::kQueryBox + to * 128 + (piece ^ to % 8) * 16, v);
      }
      proxy_fence();
      named_barrier(1 + group, 128);
      if (thread == 0) {
        if (tile.queries > group * 64)
#pragma unroll
          for (int box = 0; box < S::kBoxes; ++box)
            tma_store(&maps.y, q + box * S::kQueryBox, box * 64, tile.head,
                      tile.first + (group * 64 >> p.pack));
        bulk_commit();
      }
      stored = slot;
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int mine = row + 8 * r;
        if (mine < tile.queries) {
          float* y = static_cast<float*>(a.y) + row_of(p, tile, mine) * kHd + t * 2;
#pragma unroll
          for (int d = 0; d < kHd / 8; ++d)
            *reinterpret_cast<float2*>(y + d * 8) =
                make_float2(o[4 * d + 2 * r] * inverse[r], o[4 * d + 2 * r + 1] * inverse[r]);
        }
      }
      named_barrier(1 + group, 128);
      if (thread == 0) barrier_arrive(at.empty_q + slot * 8);
    }
  }
  if (thread == 0) bulk_wait_read();
}

#endif  // Q4S_SM90A

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_prefill_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  pdl_trigger();
  const Addresses<S> at;
  if (shared_address(raw) != kSharedStart) asm volatile("trap;");
  typename S::Common* common = reinterpret_cast<typename S::Common*>(raw + S::kCommon);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(at.full_k + i * 8, 1), barrier_init(at.full_v + i * 8, 1);
      barrier_init(at.empty_k + i * 8, S::kConsumers * 4),
          barrier_init(at.empty_v + i * 8, S::kConsumers * 4);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(at.full_q + i * 8, 32 + (p.a.q_half ? 1 : 96));  // positions; queries
      barrier_init(at.empty_q + i * 8, S::kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  pdl_wait();
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
  if (warp >= S::kConsumers * 4) {
    give_registers<S::kProducerRegisters>();
    if (warp == S::kConsumers * 4)
      produce<S>(maps, p, at, common, int(threadIdx.x) % 32);
    else if (!p.a.q_half)
      convert_queries<S>(p, raw, at);
  } else {
    take_registers<S::kConsumerRegisters>();
    consume<S>(maps, p, at, common);
  }
#endif
}

template <class S>
void start(const AttentionPrefillArgs& a, cudaStream_t stream) {
  // The cache does not say how many sequences it has: coordinates stay within it.
  constexpr int64_t kManySequences = 1 << 16;
  const int64_t width = a.kv_heads * S::kHd, group = a.heads / a.kv_heads;
  // As many heads a tile as share keys and are a power of two: its queries are of fewer tokens, whose
  // positions differ less.
  int pack = 0;
  while (S::kPacks && pack < kMaxPack && group % (2 << pack) == 0) ++pack;
  const auto cache_map = [&](const void* data) {
    return tensor_map({CU_TENSOR_MAP_DATA_TYPE_FLOAT16, data, width, a.kv.ctx, width * 2, 64, kKeys,
                       CU_TENSOR_MAP_SWIZZLE_128B, kManySequences, a.kv.ctx * width * 2});
  };
  const auto token_map = [&](const void* data, int rows) {
    return tensor_map({CU_TENSOR_MAP_DATA_TYPE_FLOAT16, data, S::kHd, a.heads, S::kHd * 2, 64, 1 << pack,
                       CU_TENSOR_MAP_SWIZZLE_128B, a.tokens, a.heads * S::kHd * 2, rows >> pack});
  };
  Maps maps = {cache_map(a.kv.k), cache_map(a.kv.v), {}, {}};
  if (a.q_half) maps.q = token_map(a.q, S::kQueries);
  if (a.y_half) maps.y = token_map(a.y, 64);
  constexpr int64_t kBandBytes = 32 << 20;
  const int64_t packs = a.heads >> pack, tiles = ceil_div(a.tokens << pack, S::kQueries),
                pack_bytes = a.kv.ctx * S::kHd * 4 * (1 << pack) / group;
  const int64_t band = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(pack_bytes, 1), 1, packs);
  const Params p{a, kLog2e / sqrtf(float(S::kHd)), pack, int(tiles), int(band)};
  // With bands the lengths of tiles do not fall from round to round: there the device deals them out.
  const int64_t all = tiles * packs,
                grid = band == packs ? std::min<int64_t>(all, device_facts().multiprocessors) : all;
  launch("attention_prefill_sm90", attention_prefill_sm90_kernel<S>, dim3(unsigned(grid)), S::kThreads,
         S::kBytes, 1, true, stream, maps, p);
}

}  // namespace

bool attention_prefill_sm90_supported() {
  static const bool supported = [] {
    int device = 0, reserved = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device),
               "shared memory");
    return device_facts().hopper && uint32_t(reserved) == kSharedStart;
  }();
  return supported;
}

void attention_prefill_sm90_cuda(const AttentionPrefillArgs& a, cudaStream_t stream) {
  if (a.head_dim == 128)
    start<Shape<128, 2>>(a, stream);
  else if (a.tokens < 1536)
    start<Shape<64, 2>>(a, stream);
  else
    start<Shape<64, 3>>(a, stream);
}

}  // namespace q4s
