// The kernel of linear_decode.h, over the formats of linear_decode_tiles.cuh, cut by linear_decode_config.h.
//
// One block a multiprocessor, three roles: one warp asks for weights, kDecodeWarps multiply, kDecodeReducers
// add up the rows. The ring of weights runs through all products of the chain: while the blocks hand each
// other the next x and stage it, it fills with the next product's weights, so that the memory never rests.
//
//   producer:    for each stage of all products: wait until it is empty, ask for its codes and scales
//   multipliers: for each product: wait for its x, stage it; for each stage: multiply one unit, at the end of
//                a row hand in the sums
//   reducers:    for each row: wait for the sums, add them in the order of their columns, epilogue
#pragma once
#include "kernels/linear_decode_output.cuh"
#include "kernels/linear_decode_tiles.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

// A warp that multiplies, through one phase of a product: unit `warp` of each stage.
template <class Tile, int kScales, int kTokens>
struct DecodeMultiplier {
  const LinearDecodeParams& p;
  uint8_t* shared;
  uint32_t launch;
  int warp, lane;

  __device__ void run(LinearDecodeRing& ring, uint32_t& parities, int product, int phase) const {
    constexpr int kUnitBytes = kQ4TileBytes * Tile::kBits / 4 * kUnitTiles;
    constexpr int kUnitScales = kScales * kQ4TileRows;
    const LinearDecodeConfig& c = p.config;
    const LinearDecodeProduct& a = p.product[product];
    const LinearDecodePart& part = c.part[product];
    const int first = part.phase_begin(phase), units = part.phase_begin(phase + 1) - first;
    const int rows = LinearDecodeRows(c, product).rows;
    uint8_t* const x = shared + c.x;
    uint32_t* const meta = reinterpret_cast<uint32_t*>(shared + c.meta);
    float* const partial = reinterpret_cast<float*>(shared + c.partial);
    const DecodeStaging<Tile, kScales> staging{
        a,      p.tokens, first, units, x, meta, reinterpret_cast<float*>(shared + c.squares),
        launch, c.stride, lane,  warp};
    if (rows == 0) return;
    if (phase == 0) staging.prefetch_gain();
    warps_sync<1, kDecodeWarps * 32>();  // all have done with the last x
    staging.run();
    warps_sync<1, kDecodeWarps * 32>();

    DecodeSums<Tile, kScales, kTokens> sums(a, x, c.stride, meta, p.tokens, lane);
    int row = 0, col = warp;
    // On to the next row; hands in this warp's sums of the last one if it has a part of it.
    const auto pass_row = [&](bool mine, int slot = 0) {
      const int m = row % kDecodeMeetings;
      barrier_wait(ring.sums_empty(m), (parities >> m & 1) ^ 1);
      parities ^= 1u << m;
      if (mine) {
        sums.store(partial + (m * kDecodeWarps + slot) * p.tokens * kQ4TileRows, lane);
        sums.clear();
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.sums_full(m));
      ++row;
    };
    for (; col >= units && row < rows; col -= units) pass_row(false);
#pragma unroll 1
    for (int stages = (rows * units + kDecodeWarps - 1) / kDecodeWarps; stages > 0; --stages) {
      ring.wait_full();
      if (row >= rows) {  // the last stage has no unit for this warp
        if (lane == 0) barrier_arrive(ring.empty());
        ring.next();
        continue;
      }
      const uint8_t* stage = ring.stage();
      const int unit = first + col;
      const auto codes =
          sums.read(stage + warp * kUnitBytes,
                    reinterpret_cast<const uint16_t*>(stage + c.stage_scales) + warp * kUnitScales,
                    kScales > 1 ? a.groups - unit * kScales : 1, lane);
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty());
      ring.next();
      sums.add(codes, col, unit * kUnitTiles + 1 < a.k_tiles);
      col += kDecodeWarps;
      if (col < units) continue;
      pass_row(true, col % kDecodeWarps);
      for (col -= units; col >= units; col -= units)
        if (row < rows) pass_row(false);
    }
    while (row < rows) pass_row(false);
  }
};

// kTokens: up to 4, 8 or 16. Chains leave registers for the attention that runs between them.
template <class Tile, int kTokens>
__global__ void __launch_bounds__((kDecodeWarps + kDecodeReducers + 1) * 32, 1)
    linear_decode_kernel(const __grid_constant__ LinearDecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const LinearDecodeConfig& c = p.config;
  const int lane = int(threadIdx.x) % 32, warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  LinearDecodeRing ring(c, shared);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();

  if (warp == kDecodeWarps + kDecodeReducers) {
    linear_decode_produce<Tile>(p, ring, lane);
    return;
  }
  if (p.count == 1) pdl_trigger();
  if (warp < kDecodeWarps)
    DecodeStaging<Tile, 1>{p.product[0], 0, 0, 0, nullptr, nullptr, nullptr, 0, 0, lane, warp}
        .prefetch_gain();
  pdl_wait();
  constexpr int kReaders = (kDecodeWarps + kDecodeReducers) * 32;  // of the number of launches
  const uint32_t launch = p.launches ? __ldcg(p.launches + blockIdx.x) + 1 : 0;
  if (warp >= kDecodeWarps) {
    warps_arrive<2, kReaders>();
    const int j = warp - kDecodeWarps;
    const auto at = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
    linear_decode_reduce<kTokens>(
        p, ring, {at(c.partial), at(c.sums), at(c.norm) + j * p.tokens, at(c.squares)}, launch, j, lane);
    return;
  }
  uint32_t parities = 0;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i)
#pragma unroll 1
    for (int phase = 0; phase < c.part[i].phases; ++phase) {
      if constexpr (Tile::kBits == 16) {
        DecodeMultiplier<Tile, 0, kTokens>{p, shared, launch, warp, lane}.run(ring, parities, i, phase);
      } else {
        const int groups = p.product[i].unit_groups;
        if (groups == 1)
          DecodeMultiplier<Tile, 1, kTokens>{p, shared, launch, warp, lane}.run(ring, parities, i, phase);
        else if (groups == 2)
          DecodeMultiplier<Tile, 2, kTokens>{p, shared, launch, warp, lane}.run(ring, parities, i, phase);
        else
          DecodeMultiplier<Tile, 4, kTokens>{p, shared, launch, warp, lane}.run(ring, parities, i, phase);
      }
    }
  warps_sync<2, kReaders>();
  if (p.launches && threadIdx.x == 0) p.launches[blockIdx.x] = launch;
}

template <class Tile>
void launch_linear_decode(LinearDecodeParams& p, cudaStream_t stream, bool pdl) {
  const int tokens = p.config.tokens;
  const auto kernel = tokens <= 4   ? linear_decode_kernel<Tile, 4>
                      : tokens <= 8 ? linear_decode_kernel<Tile, 8>
                                    : linear_decode_kernel<Tile, 16>;
  launch("linear_decode", kernel, dim3(unsigned(p.config.blocks)), (kDecodeWarps + kDecodeReducers + 1) * 32,
         size_t(p.config.shared), 1, pdl, stream, p);
}

// int4: linear_q4_decode.cu. int8 and fp16: linear_q8_decode.cu.
void launch_linear_decode_wide(LinearDecodeParams&, int bits, cudaStream_t, bool pdl);

}  // namespace q4s
