// The Hopper kernel of linear_q4_gemm.h for up to 16 tokens, where reading the weights takes the time: all
// products of a chain in one launch, one block a multiprocessor. One warp of a block asks for its weights
// of all products through one ring; some warps bring activations, of the first product from where they are,
// of the others as soon as blocks have made them (linear_q4_gemm_sm90_few.cuh). Each cluster of two owns a
// run of 16-row tiles of a product, each of its blocks half of K. Twelve warps multiply by mma.sync: each
// takes two tiles of rows, which share the fragments of activations, and some units of K. Codes enter the
// tensor core as they lie in a word; sums start with what their offset is too much, and those of a group are
// scaled. Parts of a sum are pushed to the block that adds them, in a fixed order, and whoever multiplied
// takes the sums to their place.
//
// A chain holds all multiprocessors until it ends, and needs all of them at once.
#include "kernels/cuda_check.h"
#include "kernels/linear_q4_gemm_sm90_few_load.cuh"
#include "kernels/linear_q4_gemm_sm90_few_multiply.cuh"
#include "kernels/linear_q4_gemm_sm90_few_sink.cuh"

namespace q4s {
namespace {

// Warps: those that multiply, those that bring activations, one for weights, one for what epilogues need.
constexpr int kWeightWarp = kQ4FewMultiply + kQ4FewLoad, kPrepareWarp = kWeightWarp + 1,
              kThreads = (kPrepareWarp + 1) * 32;

#if Q4S_SM90A

using namespace hopper;

// Of a thread. Nothing may be spilled: all of L1 is shared memory, and a spill would go to L2.
constexpr int kMultiplyRegisters = 104, kOtherRegisters = 80;

// Sums of eight tokens go to one block of the cluster: [of source][way][row tile][lane] of 16 bytes.
__device__ void multiply(const Q4FewShared& sh, const Q4FewParams& p, int warp) {
  const int rank = int(blockIdx.x) % kQ4FewParts, token0 = rank * 8;
  Q4FewPlace at;
  uint32_t parity = 0;
  int last = p.count - 1;  // product that this cluster has a part of
  while (last >= 0 && sh.state->work[last].bands == 0) --last;
#pragma unroll 1
  for (int i = 0; i <= last; ++i) {
    const Q4FewProduct& a = p.product[i];
    const Q4FewWork& work = sh.state->work[i];
    if (a.sink.output == Q4GemmOutput::kRopeKv) barrier_wait(sh.begun(), 0);  // positions are there
#pragma unroll 1
    for (int b = 0; b < work.bands; ++b, parity ^= 1) {
      const int tiles = work.tiles(b), first = work.band(b), parts = kQ4FewParts * a.ways;
      const Q4FewPart part(tiles, a.ways, warp);
      const int lane = lane_again();
      const Q4FewSink sink{a, *sh.state, lane, token0};
      const auto ahead = sink.fetch(first + min(warp, tiles - 1));
      float acc[2][2][4];
      if (a.scale_sums)
        q4_few_multiply<true>(sh, p, a, work.units, part, lane, at, acc);
      else
        q4_few_multiply<false>(sh, p, a, work.units, part, lane, at, acc);
      if (warp == 0 && lane == 0) barrier_arrive_expect(sh.full_sums(), parts * tiles * 512);
      barrier_wait(sh.empty_sums(), parity ^ 1);  // the sums before have been read
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        if (tile < part.count) {
          const uint32_t place = ((rank * a.ways + part.way) * tiles + part.pair * 2 + tile) * 512;
#pragma unroll
          for (int r = 0; r < kQ4FewParts; ++r)
            store_async(remote_address(sh.sums() + place + lane * 16, r),
                        make_float4(acc[tile][r][0], acc[tile][r][1], acc[tile][r][2], acc[tile][r][3]),
                        remote_address(sh.full_sums(), r));
        }
      if (b == 0) barrier_wait(sh.ready(i), 0);
      // All of them: who came to the next band before others were done with this one could mistake a slot's
      // turn.
      barrier_wait(sh.full_sums(), parity);
#pragma unroll 1
      for (int row = warp; row < tiles; row += kQ4FewMultiply) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 2
        for (int source = 0; source < parts; ++source) {
          const uint4 v = load_shared(sh.sums() + (source * tiles + row) * 512 + lane * 16);
          sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y);
          sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
        }
        sink.finish(i, p.exchange + sh.state->set, first + row, row == warp ? ahead : sink.fetch(first + row),
                    sum);
      }
      // Not after the last: the other block may have ended. All that it sends here has been waited for.
      if (i == last && b + 1 == work.bands) return;
      __syncwarp();
      if (lane < kQ4FewParts) barrier_arrive_remote(sh.empty_sums(), lane);
    }
  }
}

#endif  // Q4S_SM90A

__global__ void __launch_bounds__(kThreads, 1) q4_gemm_few_kernel(const __grid_constant__ Q4FewParams p) {
#if Q4S_SM90A
  extern __shared__ __align__(1024) uint8_t raw[];
  const Q4FewShared sh(p, raw);
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  sh.init(p, warp, lane, kThreads / 32);
  __syncthreads();
  cluster_arrive_relaxed();
  if (warp < kQ4FewMultiply) {
    take_registers<kMultiplyRegisters>();
    cluster_wait();  // the other block's barriers exist
    pdl_wait();
    return multiply(sh, p, warp);
  }
  give_registers<kOtherRegisters>();
  if (warp == kWeightWarp) return q4_few_weights(sh, p, lane);
  cluster_wait();
  pdl_wait();
  if (warp < kWeightWarp)
    Q4FewActivations(sh, p, warp - kQ4FewMultiply).run();
  else
    q4_few_prepare(sh, p, lane, int(blockIdx.x) % kQ4FewParts * 8);
#endif
}

void run(const Q4GemmArgs* all, size_t count, int clusters, std::byte* exchange, cudaStream_t stream) {
  if (count == 0 || count > kQ4GemmChain) throw std::logic_error("q4_gemm: a chain of so many products");
  Q4FewParams p = {};
  p.count = int(count), p.tokens = int(all[0].tokens), p.clusters = clusters;
  p.exchange = exchange;
  if (exchange) p.guess = q4_gemm_guess(exchange);
  uint32_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    const Q4GemmArgs& a = all[i];
    Q4FewProduct& to = p.product[i];
    const bool last = i + 1 == count;
    if (a.tokens > kQ4FewTokens || (i > 0) != !a.x || (i > 0 && !q4_gemm_follows(a, all[i - 1])))
      throw std::logic_error("q4_gemm: no chain of such products");
    to.sink = q4_gemm_sink(a);
    if (a.output == Q4GemmOutput::kRopeKv) p.position = a.at.position, p.sequence = a.at.sequence;
    to.x = reinterpret_cast<const __half*>(a.x);
    to.pitch = int(q4_gemm_pitch(a.w.k)), to.steps = int(a.w.k / kQ4TileRows);
    to.units = int(ceil_div(a.w.k, kQ4GemmUnit)), to.tiles = int(a.w.n_tiles());
    to.normalises = i > 0 && a.gain;
    to.inverse_k = 1.f / float(a.w.k), to.eps = a.eps;
    to.makes = !last, to.gain = last ? nullptr : all[i + 1].gain;
    if (!last) {
      const auto take = [&](int64_t bytes) {
        const uint32_t at = used;
        used += uint32_t(round_up(bytes, int64_t(512)));
        return at;
      };
      p.product[i + 1].x_at = to.next_x_at = take(all[i + 1].w.k / kQ4TileRows * kQ4FewStepBytes);
      p.product[i + 1].squares_at = to.next_squares_at =
          take(to.gain ? all[i + 1].w.k / kQ4TileRows * kQ4FewSquareBytes : 0);
    }
    const int most = int(ceil_div(to.tiles, clusters)), bands = int(ceil_div(most, kQ4FewBand));
    to.band = int(ceil_div(most, bands)), to.ways = q4_few_ways(to.band);
    q4_gemm_weight_maps(a, to.band * kQ4TileRows, kQ4UnitTiles, to.operands, to.w, to.s);
    to.w_bytes = to.band * kQ4FewRowBytes;
    to.s_bytes = int(round_up(int64_t(to.band * to.operands.box_groups * 32), int64_t(128)));
    to.scale_sums = to.operands.fine == 0, to.offset = to.operands.half_grid ? -7.5f : -8.f;
    p.s_bytes = std::max(p.s_bytes, to.ways * to.s_bytes);
  }
  if (used > kQ4GemmExchangeSet) throw std::logic_error("q4_gemm: a chain too large for its exchange");
  p.set_bytes = used;
  p.stages = q4_few_stages(p.s_bytes);
  const size_t bytes = kQ4FewRingAt + size_t(p.stages) * (kQ4FewWBytes + p.s_bytes);
  launch("q4_gemm_few", q4_gemm_few_kernel, dim3(unsigned(clusters * kQ4FewParts)), kThreads, bytes,
         kQ4FewParts, all[0].pdl, stream, p);
}

}  // namespace

bool q4_gemm_follows(const Q4GemmArgs& a, const Q4GemmArgs& before) {
  const bool store = before.output == Q4GemmOutput::kStore, swiglu = before.output == Q4GemmOutput::kSwiglu;
  constexpr int64_t kMost = kQ4GemmExchangeSet / (kQ4GemmChain - 1) - 1024;
  return a.w.k % kQ4TileCols == 0 && a.tokens == before.tokens && q4_gemm_simple_groups(a.w) &&
         a.w.k / kQ4TileRows * (kQ4FewStepBytes + (a.gain ? kQ4FewSquareBytes : 0)) <= kMost &&
         ((store && !before.y_half && a.gain && a.w.k == before.w.n) ||
          (swiglu && !a.gain && a.w.k == before.w.n / 2));
}

void q4_gemm_few_cuda(const Q4GemmArgs& a, const Q4GemmConfig& c, cudaStream_t stream) {
  run(&a, 1, c.clusters, nullptr, stream);
}

void q4_gemm_chain_cuda(const Q4GemmArgs* all, size_t count, std::byte* exchange, cudaStream_t stream) {
  // All blocks wait for each other.
  static const int at_once =
      clusters_fit("q4_gemm_few", q4_gemm_few_kernel, kThreads, kQ4SharedBytes, kQ4FewParts);
  int clusters = 1;
  for (size_t i = 0; i < count; ++i)
    clusters = std::max(
        clusters,
        q4_gemm_config_few({all[i].tokens, all[i].w, device_facts().multiprocessors, true}).clusters);
  run(all, count, std::clamp(at_once, 1, clusters), exchange, stream);
}

}  // namespace q4s
