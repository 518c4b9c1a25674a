// attention_prefill.h on Hopper for heads of 64 and 128, after FlashAttention-3 (Shah et al., 2024). A block takes 128
// queries of one head, a warpgroup 64 of them. A producer fills a ring of K and V tiles of 128 positions by TMA.
//   S (64, 128) = Q K^T    Q from registers, which are loaded from shared memory for every tile
//   O (64, hd) = P V       P is S's own registers, V read along its rows
// While one warpgroup is at its softmax, the tensor core works for the other. Sums are f32; the order depends on the
// shapes alone.
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "kernels/attention_prefill_sm90.cuh"
#include "kernels/decode_ptx.cuh"
#include "kernels/hopper.cuh"
#include "kernels/pdl.cuh"
#include "kernels/tensor_map.h"

namespace q4s {
namespace {

constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * 128, kQueries = kConsumers * 64, kKeys = 128;
constexpr float kLog2e = 1.4426950408889634f;

struct Params {
  AttentionPrefillArgs a;
  float scale;  // log2(e) / sqrt(hd): the softmax works in base 2
  int tiles;    // of queries
  int band;     // heads that run beside each other, their keys and values in L2
};

// Queries of a tile that share a sequence: `end` positions are seen, all of them by those at `least` and beyond.
struct Pass {
  int sequence, end, least;
};

// The block's shared memory beside the ring. A pass stands at the index of its first query.
struct Common {
  int position[kQueries], sequence[kQueries], end[kQueries], least[kQueries], count[kQueries];
  uint32_t leaders[kQueries / 32];
};

template <int kHd>
struct Ring {
  static constexpr int kStages = kHd == 64 ? 4 : 2;
  static constexpr int kBoxBytes = kKeys * 128;  // 64 columns
  static constexpr int kTileBytes = kHd / 64 * kBoxBytes;
  static constexpr int kBarriers = 2 * kStages * kTileBytes;  // after K and V tiles
  static constexpr int kQuery = kBarriers + 4 * kStages * 8;  // fragments: (hd / 16, threads) of 16 bytes
  static constexpr int kCommon = kQuery + kQueries * kHd * 2;
  static constexpr int kBytes = kCommon + int(sizeof(Common));
};

#if Q4S_SM90A

using namespace hopper;

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Steps through the passes of a tile.
class Passes {
 public:
  __device__ Passes(const Common& c, int queries) : c_(c), queries_(queries) {}
  __device__ bool next(Pass& pass) {
    while (bits_ == 0) {
      if (word_ == kQueries / 32) return false;
      bits_ = c_.leaders[word_++];
    }
    const int i = (word_ - 1) * 32 + __ffs(int(bits_)) - 1;
    bits_ &= bits_ - 1;
    // Rows of other sequences must be masked in every tile.
    pass = {c_.sequence[i], c_.end[i], c_.count[i] == queries_ ? c_.least[i] : -1};
    return true;
  }

 private:
  const Common& c_;
  int queries_, word_ = 0;
  uint32_t bits_ = 0;
};

// By all threads; a barrier must follow each of the three steps but the last, which ends with one.
__device__ void find_passes(Common& c, const AttentionPrefillArgs& a, int64_t first_query, int queries) {
  const int i = int(threadIdx.x);
  if (i < kQueries) {
    c.position[i] = i < queries ? a.at.position[first_query + i] : -1;
    c.sequence[i] = i < queries ? a.at.sequence[first_query + i] : -1;
    c.end[i] = 0, c.least[i] = INT_MAX, c.count[i] = 0;
  }
  __syncthreads();
  const uint32_t mask = __ballot_sync(~0u, i < queries);
  if (i < queries) {
    int leader = 0;
    while (c.sequence[leader] != c.sequence[i]) ++leader;
    const uint32_t same = __match_any_sync(mask, leader);
    const int most = __reduce_max_sync(same, c.position[i]), least = __reduce_min_sync(same, c.position[i]);
    if (i % 32 == __ffs(int(same)) - 1) {
      atomicMax(&c.end[leader], most + 1);
      atomicMin(&c.least[leader], least);
      atomicAdd(&c.count[leader], __popc(same));
    }
  }
  __syncthreads();
  if (i < kQueries) {
    const uint32_t leaders = __ballot_sync(~0u, c.count[i] > 0);
    if (i % 32 == 0) c.leaders[i / 32] = leaders;
  }
  __syncthreads();
}

template <int kHd>
struct Addresses {
  uint32_t k, v, full_k, full_v, empty_k, empty_v;
  __device__ explicit Addresses(const uint8_t* base) {
    using R = Ring<kHd>;
    k = smem_address(base);
    v = k + R::kStages * R::kTileBytes;
    full_k = k + R::kBarriers;
    full_v = full_k + R::kStages * 8;
    empty_k = full_v + R::kStages * 8;
    empty_v = empty_k + R::kStages * 8;
  }
};

template <int kHd>
__device__ void produce(const CUtensorMap& map_k, const CUtensorMap& map_v, const Addresses<kHd>& at, Passes passes,
                        int column) {
  using R = Ring<kHd>;
  RingPosition<R::kStages> ring;
  Pass pass;
  const auto load = [&](const CUtensorMap& map, uint32_t to, uint32_t full, uint32_t empty, int row) {
    barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
    barrier_arrive_expect(full + ring.stage * 8, R::kTileBytes);
#pragma unroll
    for (int box = 0; box < kHd / 64; ++box)
      tma_load(to + ring.stage * R::kTileBytes + box * R::kBoxBytes, &map, column + box * 64, row, pass.sequence,
               full + ring.stage * 8);
  };
  while (passes.next(pass))
    for (int row = 0; row < pass.end; row += kKeys, ring.next()) {
      load(map_k, at.k, at.full_k, at.empty_k, row);
      load(map_v, at.v, at.full_v, at.empty_v, row);
    }
}

// Rows from `row` on of a V tile become zero: no token is there, and 0 * NaN would reach the sums. Both warpgroups
// write the same.
template <int kHd>
__device__ void clear_rows(uint8_t* tile, int row, int group, int thread) {
  for (int box = 0; box < kHd / 64; ++box)
    for (int i = row * 8 + thread; i < kKeys * 8; i += 128)
      *reinterpret_cast<uint4*>(tile + box * Ring<kHd>::kBoxBytes + i * 16) = make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_barrier(1 + group, 128);
}

template <int kHd>
__device__ void consume(const Params& p, uint8_t* base, const Addresses<kHd>& at, const Common& common, int64_t first_query,
                        int queries, int head) {
  using R = Ring<kHd>;
  const AttentionPrefillArgs& a = p.a;
  const int group = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int rows[2] = {group * 64 + thread / 32 * 16 + g, group * 64 + thread / 32 * 16 + g + 8};
  const int64_t width = a.heads * kHd;
  // A thread's own fragments of Q, in shared memory: kept in registers over the loop, ptxas (13.0) lets the fragments
  // of P overwrite them.
  uint8_t* const fragments = base + R::kQuery + threadIdx.x * 16;
  constexpr int kFragmentStride = kConsumers * 128 * 16;
#pragma unroll
  for (int c = 0; c < kHd / 16; ++c) {
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = rows[i % 2], column = c * 16 + i / 2 * 8 + t * 2;
      float2 v = make_float2(0, 0);
      if (row < queries) v = *reinterpret_cast<const float2*>(a.q + (first_query + row) * width + head * kHd + column);
      q[i] = pack_half2(v.x * p.scale, v.y * p.scale);
    }
    *reinterpret_cast<uint4*>(fragments + c * kFragmentStride) = make_uint4(q[0], q[1], q[2], q[3]);
  }
  const uint32_t my_fragments = smem_address(fragments);
  const int mine[2] = {common.position[rows[0]], common.position[rows[1]]};
  const int my_sequence[2] = {common.sequence[rows[0]], common.sequence[rows[1]]};

  float o[kHd / 2], s[kKeys / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll
  for (int i = 0; i < kHd / 2; ++i) o[i] = 0;
  RingPosition<R::kStages> ring;
  Passes passes(common, queries);
  Pass pass;
  while (passes.next(pass))
    for (int first = 0; first < pass.end; first += kKeys, ring.next()) {
      uint32_t q[kHd / 16][4];
#pragma unroll
      for (int c = 0; c < kHd / 16; ++c) {
        const uint4 v = load_shared(my_fragments + c * kFragmentStride);
        q[c][0] = v.x, q[c][1] = v.y, q[c][2] = v.z, q[c][3] = v.w;
      }
      barrier_wait(at.full_k + ring.stage * 8, ring.parity);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < kHd / 16; ++c)
        WgmmaRs<kKeys, 0>::mma(
            s, q[c], wgmma_k_major(at.k + ring.stage * R::kTileBytes + c / 4 * R::kBoxBytes + c % 4 * 32), c > 0);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(s);
      if (lane == 0) barrier_arrive(at.empty_k + ring.stage * 8);

      if (first + kKeys > pass.least + 1)
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int column = first + i / 4 * 8 + t * 2 + i % 2, r = i % 4 / 2;
          if (column > mine[r] || my_sequence[r] != pass.sequence) s[i] = -INFINITY;
        }
      float shrink[2], less[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = top[r];
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) high = fmaxf(high, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        less[r] = high == -INFINITY ? 0 : high;  // nothing seen yet
        shrink[r] = exp2_fast(top[r] - less[r]);
        top[r] = high;
        total[r] *= shrink[r];
      }
      uint32_t w[kKeys / 16][4];
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        const int r = i % 2;
        const float x = exp2_fast(s[2 * i] - less[r]), y = exp2_fast(s[2 * i + 1] - less[r]);
        total[r] += x + y;
        w[i / 4][i % 4] = pack_half2(x, y);
      }
      if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1))
#pragma unroll
        for (int i = 0; i < kHd / 2; ++i) o[i] *= shrink[i % 4 / 2];

      barrier_wait(at.full_v + ring.stage * 8, ring.parity);
      if (first + kKeys > pass.end)
        clear_rows<kHd>(base + (R::kStages + ring.stage) * R::kTileBytes, pass.end - first, group, thread);
      wgmma_fence();
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n)
        WgmmaRs<kHd, 1>::mma(o, w[n], wgmma_n_major(at.v + ring.stage * R::kTileBytes + n * 2048, R::kBoxBytes), 1);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(o);
      if (lane == 0) barrier_arrive(at.empty_v + ring.stage * 8);
    }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    if (rows[r] >= queries) continue;
    const int64_t to = (first_query + rows[r]) * width + head * kHd + t * 2;
    const float inverse = 1 / total[r];
#pragma unroll
    for (int d = 0; d < kHd / 8; ++d) {
      const float x = o[4 * d + 2 * r] * inverse, y = o[4 * d + 2 * r + 1] * inverse;
      if (a.y_half)
        *reinterpret_cast<uint32_t*>(static_cast<__half*>(a.y) + to + d * 8) = pack_half2(x, y);
      else
        *reinterpret_cast<float2*>(static_cast<float*>(a.y) + to + d * 8) = make_float2(x, y);
    }
  }
}

#endif  // Q4S_SM90A

template <int kHd>
__global__ void __launch_bounds__(kThreads, 1)
    attention_prefill_sm90_kernel(const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                                  const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  pdl_trigger();
  using R = Ring<kHd>;
  Common& common = *reinterpret_cast<Common*>(raw + R::kCommon);
  const Addresses<kHd> at(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * R::kStages; ++i) {
      barrier_init(at.full_k + i * 8, 1);  // and full_v
      barrier_init(at.empty_k + i * 8, kConsumers * 4);
    }
    barrier_init_fence();
  }
  // Bands of heads; within one the tiles with most positions first, so that the last to start are short.
  const int of_band = p.band * p.tiles, head0 = int(blockIdx.x) / of_band * p.band, in_band = int(blockIdx.x) % of_band;
  const int band = min(p.band, int(p.a.heads) - head0), head = head0 + in_band % band;
  const int64_t first_query = int64_t(p.tiles - 1 - in_band / band) * kQueries;
  const int queries = int(min(p.a.tokens - first_query, int64_t(kQueries)));
  pdl_wait();
  find_passes(common, p.a, first_query, queries);
  if (__shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0) == kConsumers) {
    give_registers<40>();
    if (threadIdx.x == kConsumers * 128)
      produce<kHd>(map_k, map_v, at, Passes(common, queries), head / int(p.a.heads / p.a.kv_heads) * kHd);
  } else {
    take_registers<232>();
    consume<kHd>(p, raw, at, common, first_query, queries, head);
  }
#endif
}

template <int kHd>
void start(const AttentionPrefillArgs& a, cudaStream_t stream) {
  // The cache does not say how many sequences it has: coordinates stay within it.
  constexpr int64_t kManySequences = 1 << 16;
  const int64_t width = a.kv_heads * kHd;
  const auto map = [&](const void* data) {
    return tensor_map({CU_TENSOR_MAP_DATA_TYPE_FLOAT16, data, width, a.kv.ctx, width * 2, 64, kKeys,
                       CU_TENSOR_MAP_SWIZZLE_128B, kManySequences, a.kv.ctx * width * 2});
  };
  constexpr int64_t kBandBytes = 24 << 20;
  const int64_t tiles = ceil_div(a.tokens, kQueries), head_bytes = a.kv.ctx * kHd * 4 * a.kv_heads / a.heads;
  const int64_t band = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(head_bytes, 1), 1, a.heads);
  const Params p{a, kLog2e / sqrtf(float(kHd)), int(tiles), int(band)};
  launch("attention_prefill_sm90", attention_prefill_sm90_kernel<kHd>, dim3(unsigned(tiles * a.heads)), kThreads, Ring<kHd>::kBytes, 1, true, stream,
         map(a.kv.k), map(a.kv.v), p);
}

}  // namespace

void attention_prefill_sm90_cuda(const AttentionPrefillArgs& a, cudaStream_t stream) {
  if (a.head_dim == 64)
    start<64>(a, stream);
  else
    start<128>(a, stream);
}

}  // namespace q4s
