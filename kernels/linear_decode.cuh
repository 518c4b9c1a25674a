// The kernel of linear_decode.h, over the formats of linear_decode_tiles.cuh, cut by linear_decode_config.h.
//
// One block a multiprocessor, three roles: one warp asks for weights, kDecodeWarps multiply, kDecodeReducers
// add up the rows. The ring of weights runs through all products of the chain: while the blocks hand each
// other the next x and stage it, it fills with the next product's weights, so that the memory never rests.
//
//   producer:    for each stage of all products: wait until it is empty, ask for its codes and scales; before
//                a product whose x is shared attention, for rows of the cache
//   multipliers: for each product: attend, if that makes its x; wait for x, stage it; for each stage:
//                multiply one unit, at the end of a row hand in the sums
//   reducers:    for each row: wait for the sums, add them in the order of their columns, epilogue
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/linear_decode_attention.cuh"
#include "kernels/linear_decode_attention_short.cuh"
#include "kernels/linear_decode_output.cuh"
#include "kernels/linear_decode_pair.cuh"
#include "kernels/linear_decode_tiles.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

// A warp that multiplies, through one phase of a product: unit `warp` of each stage; in a pair, half of them
// each of the two tile rows.
template <class Tile, int kScales, int kTokens, bool kPair, class Params>
struct DecodeMultiplier {
  const Params& p;
  uint8_t* shared;
  uint32_t number;  // of the first product
  int warp, lane;

  __device__ void run(LinearDecodeRing& ring, uint32_t& parities, int product, int phase) const {
    constexpr int kUnitBytes = kQ4TileBytes * Tile::kBits / 4 * kUnitTiles;
    constexpr int kUnitScales = kScales * kQ4TileRows;
    constexpr int kWarps = kPair ? kDecodePairWarps : kDecodeWarps;  // of a tile row
    constexpr int kTogether = kDecodeWarps / kWarps;                 // tile rows
    const LinearDecodeConfig& c = p.config;
    const LinearDecodeProduct& a = p.product[product];
    const LinearDecodePart& part = a.part;
    const int piece = linear_decode_rank<kPair>() * part.phases + phase;
    const int first = part.piece_begin(piece), units = part.piece_begin(piece + 1) - first;
    const int rows = LinearDecodeRows<kPair>(part, product).rows;
    if (rows == 0) return;
    const uint32_t base = shared_address(shared), x = base + c.x, meta = base + c.meta;
    if (phase == 0) linear_decode_prefetch_gain(a, warp, lane);
    warps_sync<kDecodeDone, kDecodeReaders>();  // all have done with the last x and its squares
    DecodeStaging<Tile, kScales>{
        a,        p.tokens, first, units,           x, meta, base + c.squares, number + uint32_t(a.x_from),
        c.stride, lane,     warp,  p.inverse_tokens}
        .run();
    warps_sync<1, kDecodeWarps * 32>();

    DecodeSums<Tile, kScales, kTokens> sums(a, x, c.stride, meta, p.tokens, lane);
    const uint32_t partial = held(base + c.partial), sum_bytes = p.tokens * (kQ4TileRows * 4);
    const int nth = kPair ? warp % kWarps : warp;  // unit of a stage
    const uint32_t tile = kPair ? warp / kWarps : 0;
    const uint32_t codes_at = held(warp * kUnitBytes + lane * 16);  // in a stage
    const uint32_t scales_at = held(c.stage_scales + warp * kUnitScales * 2 + lane / 4 * 2);
    int row = 0, col = nth;
    // On to the next row; hands in this warp's sums of the last one if it has a part of it.
    const auto pass_row = [&](bool mine) {
      const uint32_t m = uint32_t(row) % kDecodeMeetings;
      mbarrier_wait(ring.sums_empty(m), (parities >> m & 1) ^ 1);
      parities ^= 1u << m;
      if (mine) {
        const uint32_t slot = m * kWarps + uint32_t(col) % kWarps;
        sums.store(partial + (slot * kTogether + tile) * sum_bytes, p.tokens, lane);
        sums.clear();
      }
      mbarrier_arrive(ring.sums_full(m));
      ++row;
    };
    for (; col >= units && row < rows; col -= units) pass_row(false);
    const int total = rows * units;
#pragma unroll 1
    for (int left = (total - nth + kWarps - 1) / kWarps; left > 0; --left) {
      ring.wait_full();
      const auto codes = sums.read(ring.stage() + codes_at, ring.stage() + scales_at,
                                   kScales > 1 ? a.groups - (first + col) * kScales : 1);
      mbarrier_arrive(ring.empty());
      ring.next();
      sums.add(codes, col, (first + col) * kUnitTiles + 1 < a.k_tiles);
      col += kWarps;
      if (col < units) continue;
      pass_row(true);
      for (col -= units; col >= units; col -= units)
        if (row < rows) pass_row(false);
    }
    if (total % kWarps != 0 && nth >= total % kWarps) {  // no unit in the last stage
      ring.wait_full();
      mbarrier_arrive(ring.empty());
      ring.next();
    }
    while (row < rows) pass_row(false);
  }
};

// kTokens: up to 4, 8 or 16. kShared: blocks share out the caches of a chain's attention; else each makes
// that of one head, over a short context, in a kernel that is quicker throughout for having less in it.
template <class Tile, int kTokens, int kProducts, bool kShared, bool kPair>
__device__ __forceinline__ void linear_decode_block(const LinearDecodeParams<kProducts>& p, uint8_t* shared) {
  const LinearDecodeConfig& c = p.config;
  const int lane = int(threadIdx.x) % 32, warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  LinearDecodeRing ring(c, shared);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
#if Q4S_SM90A
  // The other block's barriers exist. All warps meet here: racecheck holds a block's warps at a wait for the
  // cluster until the last of them is there.
  if constexpr (kPair) hopper::cluster_meet();
#endif

  DecodePlace* const places = reinterpret_cast<DecodePlace*>(shared + c.place);
  if (warp == kDecodeWarps + kDecodeReducers) {
    linear_decode_produce<Tile, kShared, kPair>(p, ring, places, lane);
    return;
  }
  if (p.count == 1) pdl_trigger();
  if (warp < kDecodeWarps) linear_decode_prefetch_gain(p.product[0], warp, lane);
  pdl_wait();
  const uint32_t first = p.done ? __ldcg(p.done + blockIdx.x) + 1 : 0;
  if (warp >= kDecodeWarps) {
    warps_arrive<2, kDecodeReaders>();  // the number of products is read
    const int j = warp - kDecodeWarps;
    const auto at = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
    const DecodeSumPlaces sums{at(c.partial), at(c.sums), at(c.norm) + j * p.tokens, at(c.squares)};
    if constexpr (kPair) {
#if Q4S_SM90A
      linear_decode_reduce_pair<kTokens>(p, ring, sums, at(c.inbox), first, j, lane);
#endif
    } else {
      linear_decode_reduce<kTokens>(p, ring, sums, first, j, lane);
    }
    return;
  }
  constexpr bool kAttends = kProducts > 1;  // chains
  using Place = std::conditional_t<kShared, DecodePlace, DecodeHead>;
  Place* const place = reinterpret_cast<Place*>(places + kDecodeRounds);
  const int sharers = kShared ? p.attention.sharers : p.attention.queries;  // blocks of a pair
  const bool attends = kAttends && p.attention.block() < p.attention.pairs * sharers;
  if constexpr (kAttends) {
    if (attends && int(threadIdx.x) < p.attention.rounds)
      place[threadIdx.x] = Place(p.attention, int(threadIdx.x));
    warps_sync<1, kDecodeWarps * 32>();
  }
  uint32_t parities = 0;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    if constexpr (kShared) {
      if (attends && p.product[i].attends)
#pragma unroll 1
        for (int round = 0; round < p.attention.rounds; ++round)
          if (place[round].parts > 0)
            DecodeAttention<LinearDecodeParams<kProducts>>(p, i, place[round], shared + c.x, first, warp)
                .run(ring);
    } else if constexpr (kAttends) {
      if (attends && p.product[i].attends)
        linear_decode_attend_short(p.product[i - 1], *place, const_cast<Packet*>(p.product[i].x_packets),
                                   first + uint32_t(i), reinterpret_cast<float*>(shared + c.x), warp, lane);
    }
#pragma unroll 1
    for (int phase = 0; phase < p.product[i].part.phases; ++phase) {
      const auto run = [&](auto scales) {
        DecodeMultiplier<Tile, decltype(scales)::value, kTokens, kPair, LinearDecodeParams<kProducts>>{
            p, shared, first, warp, kShared ? lane_again() : lane}
            .run(ring, parities, i, phase);
      };
      if constexpr (Tile::kBits == 16) {
        run(std::integral_constant<int, 0>());
      } else {
        const int groups = p.product[i].unit_groups;
        if (groups == 1)
          run(std::integral_constant<int, 1>());
        else if (groups == 2)
          run(std::integral_constant<int, 2>());
        else
          run(std::integral_constant<int, 4>());
      }
    }
  }
  warps_sync<2, kDecodeReaders>();
  if (p.done && threadIdx.x == 0) p.done[blockIdx.x] = first + uint32_t(p.count) - 1;
}

template <class Tile, int kTokens, int kProducts, bool kShared>
__global__ void __launch_bounds__((kDecodeWarps + kDecodeReducers + 1) * 32, 1)
    linear_decode_kernel(const __grid_constant__ LinearDecodeParams<kProducts> p) {
  extern __shared__ __align__(128) uint8_t shared[];
  linear_decode_block<Tile, kTokens, kProducts, kShared, false>(p, shared);
}

// For blocks in clusters of two, on sm_90.
template <class Tile, int kTokens, int kProducts>
__global__ void __launch_bounds__((kDecodeWarps + kDecodeReducers + 1) * 32, 1)
    linear_decode_pair_kernel(const __grid_constant__ LinearDecodeParams<kProducts> p) {
#if Q4S_SM90A
  extern __shared__ __align__(128) uint8_t shared[];
  linear_decode_block<Tile, kTokens, kProducts, true, true>(p, shared);
  __syncwarp();
  hopper::cluster_meet();  // the other block still sends to this one's memory
#endif
}

// What all products of a launch share.
struct LinearDecodeLaunch {
  LinearDecodeConfig config;
  int tokens, ahead, ahead_next;
  uint32_t* done;
  LinearDecodeAttention attention;
};

template <int kProducts, class Kernel>
void launch_linear_decode(Kernel kernel, const LinearDecodeLaunch& l,
                          const std::vector<LinearDecodeProduct>& products, cudaStream_t stream, bool pdl) {
  LinearDecodeParams<kProducts> p{};
  static_assert(sizeof p <= 32764, "what a kernel takes");
  std::copy(products.begin(), products.end(), p.product);
  p.count = int(products.size()), p.tokens = l.tokens, p.inverse_tokens = linear_decode_inverse(l.tokens);
  p.ahead = l.ahead, p.ahead_next = l.ahead_next;
  p.done = l.done, p.config = l.config, p.attention = l.attention;
  launch("linear_decode", kernel, dim3(unsigned(l.config.blocks)), (kDecodeWarps + kDecodeReducers + 1) * 32,
         size_t(l.config.shared), l.config.pair ? kDecodePair : 1, pdl, stream, p);
}
// Parameters of a long chain take longer to reach the device.
template <class Tile>
void launch_linear_decode(const LinearDecodeLaunch& l, const std::vector<LinearDecodeProduct>& products,
                          cudaStream_t stream, bool pdl) {
  constexpr int kShort = 4;
  const int tokens = l.config.tokens;
  if constexpr (Tile::kBits == 4) {
    if (l.config.pair)
      return products.size() > kShort
                 ? launch_linear_decode<kLinearDecodeChain>(
                       linear_decode_pair_kernel<Tile, kLinearDecodeChainTokens, kLinearDecodeChain>, l,
                       products, stream, pdl)
                 : launch_linear_decode<kShort>(
                       linear_decode_pair_kernel<Tile, kLinearDecodeChainTokens, kShort>, l, products, stream,
                       pdl);
  }
  if (l.attention.sharers > 0)
    launch_linear_decode<kLinearDecodeChain>(linear_decode_kernel<Tile, 4, kLinearDecodeChain, true>, l,
                                             products, stream, pdl);
  else if (products.size() > kShort)
    launch_linear_decode<kLinearDecodeChain>(linear_decode_kernel<Tile, 4, kLinearDecodeChain, false>, l,
                                             products, stream, pdl);
  else if (tokens <= 4)
    launch_linear_decode<kShort>(linear_decode_kernel<Tile, 4, kShort, false>, l, products, stream, pdl);
  else
    launch_linear_decode<1>(
        tokens <= 8 ? linear_decode_kernel<Tile, 8, 1, false> : linear_decode_kernel<Tile, 16, 1, false>, l,
        products, stream, pdl);
}

// int4: linear_q4_decode.cu. int8 and fp16: linear_q8_decode.cu.
void launch_linear_decode_wide(int bits, const LinearDecodeLaunch&, const std::vector<LinearDecodeProduct>&,
                               cudaStream_t, bool pdl);

}  // namespace q4s
