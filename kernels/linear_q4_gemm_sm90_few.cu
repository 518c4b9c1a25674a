// The Hopper kernel of linear_q4_gemm.h for up to 16 tokens, where reading the weights takes the time. One
// block a multiprocessor, small enough that the next product's stands beside it and has its first weights
// when the activations come; Q4FewHalf sees to it that two of one product never do. Each cluster of two owns
// a run of 16-row tiles, each of its blocks half of K. Twelve warps multiply by mma.sync, which waits for no
// other warp: each takes a tile of rows, and every second or third unit of K where there are few tiles. Codes
// enter the tensor core as the integers they are, and the sums of a group are scaled. Parts of a sum are
// pushed to the block that adds them, in a fixed order. The product after it starts when this one has asked
// for nearly all of its weights.
#include "kernels/cuda_check.h"
#include "kernels/linear_q4_gemm_sm90_few_multiply.cuh"
#include "kernels/linear_q4_gemm_sm90_few_sink.cuh"

namespace q4s {
namespace {

// Warps: those that multiply, one that asks for weights, one for activations, those that take sums away which
// the first cannot.
constexpr int kMultiply = kQ4FewMultiply, kSinkWarp = kMultiply + 2;
template <Q4GemmOutput kOutput>
constexpr int kThreads = (kSinkWarp + Q4FewHalf<kOutput>::kSinkWarps) * 32;

struct Params {
  Q4GemmSink sink;
  Q4FewHandover handover;
  Q4Operands operands;
  Q4FewLayout layout;
  int units, tiles, clusters;
  bool scale_sums;  // groups of whole units of integer codes; else weights are scaled one by one
};

#if Q4S_SM90A

using namespace hopper;
constexpr int kWeightWarp = kMultiply, kXWarp = kMultiply + 1;
// Units a block has still to ask for when the next product may start. Its ring fills while this one's last
// sums are made and go to their place, and memory would rest; earlier, the two would only delay each other.
constexpr int kStartNext = 6;

// What a block does, in order: bands of row tiles; of each, units of K. Blocks begin at different places of
// their part: all at once, they would ask the second cache for the same lines of activations.
struct Work {
  int first, end, per_band, bands, begin, units, turn, rank;
  __device__ explicit Work(const Params& p) {
    rank = int(blockIdx.x) % kQ4FewParts;
    const int c = int(blockIdx.x) / kQ4FewParts;
    first = int(int64_t(p.tiles) * c / p.clusters);
    end = int(int64_t(p.tiles) * (c + 1) / p.clusters);
    per_band = p.layout.band, bands = (end - first + per_band - 1) / per_band;
    begin = p.units * rank / kQ4FewParts, units = p.units * (rank + 1) / kQ4FewParts - begin;
    turn = units ? c % units : 0;  // a short K leaves a block without any
  }
  __device__ int unit(int i) const {
    const int at = i + turn;
    return begin + (at < units ? at : at - units);
  }
  __device__ int band(int b) const { return first + per_band * b; }  // its first tile
  __device__ int tiles(int b) const { return min(per_band, end - band(b)); }
};

// The units of all bands in a row, each in the next place of the ring, whose length is not a constant.
struct Cursor {
  int band, i = 0, stage = 0;
  uint32_t parity = 0;
  __device__ explicit Cursor(const Work& work) : band(work.units ? 0 : work.bands) {}
  __device__ void next(const Work& work, int stages) {
    if (++i == work.units) i = 0, ++band;
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// A unit of a whole band, also where the cluster has less: one box each of weights and scales, since time
// goes with the number of boxes.
__device__ void ask_for_weights(const Q4FewShared& sh, const Params& p, const Q4Maps& maps, const Work& work,
                                const Cursor& at) {
  const uint32_t full = sh.full + at.stage * 8;
  barrier_arrive_expect(full, uint32_t(sh.l.w_bytes + sh.l.band * p.operands.box_groups * 32));
  const int k_tile = work.unit(at.i) * kQ4UnitTiles, row = work.band(at.band);
  const int group = p.operands.tile_groups ? int(__umulhi(uint32_t(k_tile), p.operands.tile_groups))
                                           : k_tile * p.operands.fine;
  tma_load(sh.x + sh.l.w + at.stage * sh.l.w_bytes, &maps.w, k_tile * (kQ4TileBytes / 4), row, full);
  tma_load(sh.x + sh.l.s + at.stage * sh.l.s_bytes, &maps.s, group * 16, row, full);
}

__device__ void ask_for_activations(const Q4FewShared& sh, const Q4Maps& maps, const Work& work) {
  for (Cursor at(work); at.band < work.bands; at.next(work, sh.l.stages)) {
    barrier_wait(sh.empty + at.stage * 8, at.parity ^ 1);
    const uint32_t full = sh.full + at.stage * 8;
    barrier_arrive_expect(full, kQ4FewXBytes);
#pragma unroll
    for (int tile = 0; tile < kQ4UnitTiles; ++tile)
      tma_load(sh.x + at.stage * kQ4FewXBytes + tile * kQ4FewXTileBytes, &maps.x,
               (work.unit(at.i) * kQ4UnitTiles + tile) * kQ4TileCols, 0, full);
  }
}

// Sums of eight tokens go to one block of the cluster: [of source][way][row tile][lane] of 16 bytes.
__device__ void multiply(const Q4FewShared& sh, const Params& p, const Work& work) {
  const Q4FewMultiplier me(sh, p.operands);
  uint32_t to[kQ4FewParts], full[kQ4FewParts];
#pragma unroll
  for (int r = 0; r < kQ4FewParts; ++r)
    to[r] = remote_address(sh.sums + me.lane * 16, r), full[r] = remote_address(sh.full_sums, r);
  uint32_t parity = 1, u0 = 0;  // units before this band
  for (int b = 0; b < work.bands; ++b, parity ^= 1, u0 += work.units) {
    // All at the same band: a warp without work in the last one is not a turn of the ring ahead.
    if (b > 0) named_barrier(1, kMultiply * 32);
    const int tiles = work.tiles(b), ways = q4_few_ways(tiles), row = me.warp % tiles, way = me.warp / tiles;
    if (way >= ways) {
      barrier_wait(sh.empty_sums, parity);  // as the others: the sums before have been there
      continue;
    }
    const uint32_t u = u0 + way, turns = u / sh.l.stages, weight = row == 0 ? kQ4FewBand + 1 - tiles : 1;
    float acc[2][4];
    if (p.scale_sums)
      me.tile<true>(row, ways, work.units - way, int(u - turns * sh.l.stages), turns & 1, weight, acc);
    else
      me.tile<false>(row, ways, work.units - way, int(u - turns * sh.l.stages), turns & 1, weight, acc);
    barrier_wait(sh.empty_sums, parity);
    const uint32_t place = ((work.rank * ways + way) * tiles + row) * 512;
#pragma unroll
    for (int j = 0; j < kQ4FewParts; ++j)
      store_async(to[j] + place, make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]), full[j]);
  }
}

// The sums that this block adds, to their place: 16 rows x 8 tokens a warp at a time. Those of the last band
// by the warps that multiplied, which have nothing else to do then; but where there are few rows, all by
// warps that fetch the residual meanwhile.
template <Q4GemmOutput kOutput>
__device__ void take_away(const Q4FewShared& sh, const Params& p, const Work& work, int warp, int lane) {
  using Half = Q4FewHalf<kOutput>;
  const bool multiplied = warp < kMultiply;
  if (warp == kSinkWarp) {
    Q4FewSink<kOutput>::prepare(p.sink, p.handover, sh.state(), lane, work.rank * 8,
                                blockIdx.x < kQ4FewParts);
    barrier_arrive(sh.ready);  // every lane for what it wrote
  }
  barrier_wait(sh.ready, 0);
  const Q4FewSink<kOutput> sink(p.sink, sh.state(), lane, work.rank * 8);
  const int from = multiplied ? warp : warp - kSinkWarp, step = multiplied ? kMultiply : Half::kSinkWarps;
#pragma unroll 1
  for (int b = multiplied ? work.bands - 1 : 0; b < work.bands; ++b) {
    const int first = work.band(b), tiles = work.tiles(b), parts = kQ4FewParts * q4_few_ways(tiles);
    const bool last = b + 1 == work.bands;
    if (warp == kSinkWarp && lane == 0) barrier_arrive_expect(sh.full_sums, parts * tiles * 512);
    if (Half::kMultipliersSink && last && !multiplied) return;
    auto next = sink.fetch(p.sink, p.handover, first + min(from, tiles - 1));
    barrier_wait(sh.full_sums, b & 1);
#pragma unroll 1
    for (int row = from; row < tiles; row += step) {
      const auto ahead = next;
      if (row + step < tiles) next = sink.fetch(p.sink, p.handover, first + row + step);
      float4 sum = make_float4(0, 0, 0, 0);
      for (int part = 0; part < parts; ++part) {
        const uint4 v = load_shared(sh.sums + (part * tiles + row) * 512 + lane * 16);
        sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y);
        sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
      }
      sink.finish(p.sink, p.handover, first + row, ahead, sum);
    }
    if (last) return;
    __syncwarp();
    if (lane < kQ4FewParts) barrier_arrive_remote(sh.empty_sums, lane);
  }
}

#endif  // Q4S_SM90A

template <Q4GemmOutput kOutput>
__global__ void __maxnreg__(kQ4FewRegisters)
    q4_gemm_few_kernel(const __grid_constant__ Q4Maps maps, const __grid_constant__ Params p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  const Q4FewShared sh(p.layout, raw);
  if (threadIdx.x < 32) sh.init(int(threadIdx.x), kQ4FewParts * Q4FewHalf<kOutput>::kSinkWarps);
  __syncthreads();
  cluster_arrive_relaxed();
  const Work work(p);
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const bool first_lane = threadIdx.x % 32 == 0;
  // The first ring full of weights. No warp may wait for the cluster only after something that depends on a
  // warp behind that wait: the sanitizer's racecheck lets none of a block pass before all have come.
  Cursor weights(work);
  int left = work.bands * work.units - kStartNext;
  const auto ask = [&] {
    ask_for_weights(sh, p, maps, work, weights);
    weights.next(work, sh.l.stages);
    if (--left == 0) pdl_trigger();
  };
  if (warp == kXWarp && first_lane) tma_prefetch_map(&maps.x);
  if (warp == kWeightWarp && first_lane) {
    if (left <= 0) pdl_trigger();
    tma_prefetch_map(&maps.w), tma_prefetch_map(&maps.s);
    for (int i = 0; i < sh.l.stages && weights.band < work.bands; ++i) ask();
  }
  __syncwarp();
  cluster_wait();  // the other block's barriers exist
  if (warp < kMultiply || warp >= kSinkWarp) {
    if (warp < kMultiply) multiply(sh, p, work);
    if (warp >= kSinkWarp || Q4FewHalf<kOutput>::kMultipliersSink) {
      pdl_wait();
      take_away<kOutput>(sh, p, work, warp, int(threadIdx.x) % 32);
    }
  } else if (warp == kWeightWarp && first_lane) {
    while (weights.band < work.bands) {
      barrier_wait(sh.empty + weights.stage * 8, weights.parity ^ 1);
      ask();
    }
  } else if (warp == kXWarp && first_lane) {
    pdl_wait();
    ask_for_activations(sh, maps, work);
  }
  // All that the other block sends here has been waited for.
#endif
}

template <Q4GemmOutput kOutput>
void run(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  using Half = Q4FewHalf<kOutput>;
  Params p = {};
  p.sink = q4_gemm_sink(a);
  p.handover = q4_few_handover(a);
  p.units = c.k_blocks, p.tiles = c.row_blocks, p.clusters = c.clusters;
  const int most = int(ceil_div(p.tiles, p.clusters));  // tiles of a cluster
  q4_gemm_maps(a, kQ4TileRows, kQ4FewTokens, kQ4UnitTiles, p.operands);
  p.layout = q4_few_layout(most, p.operands.box_groups, Half::kSharedBytes);
  const Q4Maps maps = q4_gemm_maps(a, p.layout.band * kQ4TileRows, kQ4FewTokens, kQ4UnitTiles, p.operands);
  p.scale_sums = !p.operands.half_grid && p.operands.fine == 0;
  launch("q4_gemm_few", q4_gemm_few_kernel<kOutput>, dim3(unsigned(c.clusters * kQ4FewParts)),
         kThreads<kOutput>, size_t(Half::kSharedBytes), kQ4FewParts, a.pdl, stream, maps, p);
}

template <Q4GemmOutput kOutput>
int resident() {
  constexpr int kBytes = Q4FewHalf<kOutput>::kSharedBytes;
  int blocks = 0;
  cuda_check(
      cudaFuncSetAttribute(q4_gemm_few_kernel<kOutput>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "q4_gemm_few");
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, q4_gemm_few_kernel<kOutput>,
                                                           kThreads<kOutput>, kBytes),
             "q4_gemm_few");
  return blocks;
}

}  // namespace

void q4_gemm_few_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  switch (a.output) {
    case Q4GemmOutput::kStore: return run<Q4GemmOutput::kStore>(a, c, stream);
    case Q4GemmOutput::kSwiglu: return run<Q4GemmOutput::kSwiglu>(a, c, stream);
    case Q4GemmOutput::kRopeKv: return run<Q4GemmOutput::kRopeKv>(a, c, stream);
  }
}

int q4_gemm_few_resident(Q4GemmOutput output) {
  return output == Q4GemmOutput::kStore    ? resident<Q4GemmOutput::kStore>()
         : output == Q4GemmOutput::kSwiglu ? resident<Q4GemmOutput::kSwiglu>()
                                           : resident<Q4GemmOutput::kRopeKv>();
}

}  // namespace q4s
