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
#include "kernels/linear_decode_tiles.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

// A warp that multiplies, through one phase of a product: unit `warp` of each stage.
template <class Tile, int kScales, int kTokens, class Params>
struct DecodeMultiplier {
  const Params& p;
  uint8_t* shared;
  uint32_t number;  // of the first product
  int warp, lane;

  __device__ void run(LinearDecodeRing& ring, uint32_t& parities, int product, int phase) const {
    constexpr int kUnitBytes = kQ4TileBytes * Tile::kBits / 4 * kUnitTiles;
    constexpr int kUnitScales = kScales * kQ4TileRows;
    const LinearDecodeConfig& c = p.config;
    const LinearDecodeProduct& a = p.product[product];
    const LinearDecodePart& part = a.part;
    const int first = part.phase_begin(phase), units = part.phase_begin(phase + 1) - first;
    const int rows = LinearDecodeRows(part, product).rows;
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
    const uint32_t codes_at = held(warp * kUnitBytes + lane * 16);  // in a stage
    const uint32_t scales_at = held(c.stage_scales + warp * kUnitScales * 2 + lane / 4 * 2);
    int row = 0, col = warp;
    // On to the next row; hands in this warp's sums of the last one if it has a part of it.
    const auto pass_row = [&](bool mine) {
      const uint32_t m = uint32_t(row) % kDecodeMeetings;
      mbarrier_wait(ring.sums_empty(m), (parities >> m & 1) ^ 1);
      parities ^= 1u << m;
      if (mine) {
        sums.store(partial + (m * kDecodeWarps + uint32_t(col) % kDecodeWarps) * sum_bytes, p.tokens, lane);
        sums.clear();
      }
      mbarrier_arrive(ring.sums_full(m));
      ++row;
    };
    for (; col >= units && row < rows; col -= units) pass_row(false);
    const int total = rows * units;
#pragma unroll 1
    for (int left = (total - warp + kDecodeWarps - 1) / kDecodeWarps; left > 0; --left) {
      ring.wait_full();
      const auto codes = sums.read(ring.stage() + codes_at, ring.stage() + scales_at,
                                   kScales > 1 ? a.groups - (first + col) * kScales : 1);
      mbarrier_arrive(ring.empty());
      ring.next();
      sums.add(codes, col, (first + col) * kUnitTiles + 1 < a.k_tiles);
      col += kDecodeWarps;
      if (col < units) continue;
      pass_row(true);
      for (col -= units; col >= units; col -= units)
        if (row < rows) pass_row(false);
    }
    if (total % kDecodeWarps != 0 && warp >= total % kDecodeWarps) {  // no unit in the last stage
      ring.wait_full();
      mbarrier_arrive(ring.empty());
      ring.next();
    }
    while (row < rows) pass_row(false);
  }
};

// kTokens: up to 4, 8 or 16. kShared: blocks share out the caches of a chain's attention; else each makes
// that of one head, over a short context, in a kernel that is quicker throughout for having less in it.
template <class Tile, int kTokens, int kProducts, bool kShared>
__global__ void __launch_bounds__((kDecodeWarps + kDecodeReducers + 1) * 32, 1)
    linear_decode_kernel(const __grid_constant__ LinearDecodeParams<kProducts> p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const LinearDecodeConfig& c = p.config;
  const int lane = int(threadIdx.x) % 32, warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  LinearDecodeRing ring(c, shared);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();

  if (warp == kDecodeWarps + kDecodeReducers) {
    linear_decode_produce<Tile, kShared>(p, ring, lane);
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
    linear_decode_reduce<kTokens>(
        p, ring, {at(c.partial), at(c.sums), at(c.norm) + j * p.tokens, at(c.squares)}, first, j, lane);
    return;
  }
  constexpr bool kAttends = kProducts > 1;  // chains
  using Place = std::conditional_t<kShared, DecodePlace, DecodeHead>;
  Place* const place = reinterpret_cast<Place*>(shared + c.place);
  const bool attends =
      kAttends && int(blockIdx.x) < p.attention.pairs * (kShared ? p.attention.sharers : p.attention.queries);
  if constexpr (kAttends) {
    if (attends && threadIdx.x == 0) *place = Place(p.attention);
    warps_sync<1, kDecodeWarps * 32>();
  }
  uint32_t parities = 0;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    if constexpr (kShared) {
      if (attends && place->parts > 0 && p.product[i].attends)
        DecodeAttention<LinearDecodeParams<kProducts>>(p, i, *place, shared + c.x, first, warp).run(ring);
    } else if constexpr (kAttends) {
      if (attends && i + 1 < p.count && p.product[i + 1].attends)
        linear_decode_prefetch_short(p.product[i], *place, warp, lane);
      if (attends && p.product[i].attends)
        linear_decode_attend_short(p.product[i - 1], *place, const_cast<Packet*>(p.product[i].x_packets),
                                   first + uint32_t(i), reinterpret_cast<float*>(shared + c.x), warp, lane);
    }
#pragma unroll 1
    for (int phase = 0; phase < p.product[i].part.phases; ++phase) {
      const auto run = [&](auto scales) {
        DecodeMultiplier<Tile, decltype(scales)::value, kTokens, LinearDecodeParams<kProducts>>{
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
         size_t(l.config.shared), 1, pdl, stream, p);
}
// Parameters of a long chain take longer to reach the device.
template <class Tile>
void launch_linear_decode(const LinearDecodeLaunch& l, const std::vector<LinearDecodeProduct>& products,
                          cudaStream_t stream, bool pdl) {
  constexpr int kShort = 4;
  static_assert(kLinearDecodeChainTokens <= 4, "the tokens of the kernels of chains");
  const int tokens = l.config.tokens;
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
