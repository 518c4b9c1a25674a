// The kernel of linear_decode.h, over the formats of linear_decode_tiles.cuh, cut by linear_decode_config.h.
//
// Each warp streams its units of every tile row through a ring in shared memory of its own; the stream meets
// no barrier within a pass. Weights are the A operand of mma.m16n8, up to 8 tokens (16 with two products) the
// B operand. The warps' partial sums meet in shared memory and are added in the order of the slices.
//
//   ask for the first units -> wait for the predecessor -> stage x, each warp its slice -> launch dependents
//   -> for each tile row: multiply; at the end of a pass: add up, epilogue
#pragma once
#include "kernels/linear_decode_output.cuh"
#include "kernels/linear_decode_tiles.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

// The codes of one warp's units, pass by pass and unit by unit over all rows, kDepth of them on their way in
// a ring of shared memory.
//
// From sm_90 on the copy engine fills the slots, a unit by one request; before, every lane copies its part.
template <class Tile>
class DecodeStream {
 public:
  static constexpr uint32_t kSlot = Tile::kLoads * 512, kDepth = kDecodeRing / kSlot;
  static_assert(kDepth <= kDecodeSlots);

  __device__ DecodeStream(const LinearDecodeBlock& block, uint8_t* ring, uint64_t* barriers, int lane)
      : block_(block), ring_(ring), barriers_(barriers), lane_(lane) {
#if __CUDA_ARCH__ >= 900
    if (lane < int(kDepth)) barrier_init(barriers + lane);
    barrier_init_done();
    __syncwarp();
#endif
#pragma unroll 1
    for (uint32_t d = 0; d < kDepth; ++d) fill(d * kSlot);
  }

  // Waits for the unit at the head of the ring. Returns this lane's part, kLoads times 16 bytes 512 bytes
  // apart.
  __device__ const uint8_t* get() const {
#if __CUDA_ARCH__ >= 900
    barrier_wait(barriers_ + head_ / kSlot, parity_);
#else
    copy_wait<kDepth - 1>();
#endif
    return ring_ + head_ + lane_ * 16;
  }
  // The unit has been used: its slot is for the next one that has not been asked for.
  __device__ void pop() {
    __syncwarp();
    fill(head_);
    head_ += kSlot;
    if (head_ == kDepth * kSlot) head_ = 0, parity_ ^= 1;
  }
  // Waits for copies through L1 that were asked for before the last `units` units.
  __device__ static void wait_for_others(int units) {
#if __CUDA_ARCH__ < 900
    if (units >= int(kDepth)) return copy_wait<kDepth>();
#endif
    copy_wait<0>();
  }

 private:
  __device__ uint32_t row_bytes() const { return uint32_t(block_.p.k_tiles) * (Tile::kBits * 128); }

  // On to the next unit's first row, if there is one.
  __device__ void next_unit() {
    unit_ += block_.p.config.slices;
    if (units_ > 0) --units_;
    if (units_ == 0) {
      if (pass_ == block_.passes) return;
      const LinearDecodePass pass = block_.pass(pass_++);
      unit_ = pass.first, units_ = pass.units, row0_ = pass.row0, rows_ = pass.row1 - pass.row0;
      if (units_ == 0) return;
    }
    const uint32_t column = uint32_t(unit_) * kSlot;
    at_ = block_.p.codes + int64_t(row0_) * row_bytes() + column;
    bytes_ = min(kSlot, row_bytes() - column);  // the last unit of an odd number of tiles has one
    left_ = rows_;
  }

  __device__ void fill(uint32_t slot) {
    if (left_ == 0) next_unit();
    if (left_ > 0) {
#if __CUDA_ARCH__ >= 900
      bulk_copy(ring_ + slot, at_, bytes_, barriers_ + slot / kSlot);
#else
#pragma unroll
      for (uint32_t l = 0; l < kSlot; l += 512)
        if (l < bytes_) copy_async(ring_ + slot + l + lane_ * 16, at_ + l + lane_ * 16);
#endif
      --left_;
      at_ += row_bytes();
    }
#if __CUDA_ARCH__ < 900
    copy_commit();  // groups are counted, so there is always one
#endif
  }

  const LinearDecodeBlock& block_;
  uint8_t* ring_;
  uint64_t* barriers_;
  const uint8_t* at_ = nullptr;  // codes of the unit to ask for next
  int lane_, left_ = 0, unit_ = 0, units_ = 0, row0_ = 0, rows_ = 0, pass_ = 0;  // left_: rows of the unit
  uint32_t bytes_ = 0, head_ = 0, parity_ = 0;
};

// kTokens: 1, or as many as 8 or 16. No more registers than half of a multiprocessor's, where that is enough:
// blocks of the smaller kernel that follows start beside.
template <class Tile, int kScales, int kTokens>
__global__ void __launch_bounds__(kDecodeWarps * 32, kTokens <= 8 && Tile::kBits <= 8 ? 2 : 1)
    linear_decode_kernel(const __grid_constant__ LinearDecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kWarps = kDecodeWarps, kBiasStride = (kTokens + 7) / 8 * 8;
  const LinearDecodeConfig& c = p.config;
  const int lane = int(threadIdx.x) % 32, warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const LinearDecodeBlock block(p, warp);

  // Scales of a round's tile rows, two rounds in turn; with phases those of all rows.
  const auto scales_of = [&](int i) {
    return reinterpret_cast<uint16_t*>(shared + c.scales) +
           (c.phases == 1 ? i % 2 : 0) * (c.round * p.groups * kQ4TileRows);
  };
  const auto copy_scales = [&](int i) {
    const LinearDecodePass pass = block.pass(i);
    const int count = (pass.row1 - pass.row0) * p.groups * kQ4TileRows;
    const uint16_t* from = p.scales + int64_t(pass.row0) * p.groups * kQ4TileRows;
#pragma unroll 1
    for (int j = int(threadIdx.x) * 8; kScales && j < count; j += kWarps * 32 * 8)
      copy_async(scales_of(i) + j, from + j);
    copy_commit();
  };
  copy_scales(0);
  DecodeStream<Tile> stream(block, shared + warp * kDecodeRing,
                            reinterpret_cast<uint64_t*>(shared + c.barriers) + warp * kDecodeSlots, lane);
  const int stride = c.slice_units * kUnitColumns * 2 + 64;
  uint8_t* const x = shared + c.x + warp * c.tokens * stride;
  int32_t* const bias =
      reinterpret_cast<int32_t*>(shared + c.bias) + warp * c.slice_units * kScales * kBiasStride;
  float* const partial = reinterpret_cast<float*>(shared + c.partial);  // (round, slices, 16, T)
  float* const gain = reinterpret_cast<float*>(shared + c.gain) + warp * c.slice_units * kUnitColumns;
  float* const x_scale = reinterpret_cast<float*>(shared + c.x_scale) + warp * c.slice_units * kBiasStride;
  float* const squares = reinterpret_cast<float*>(shared + c.squares);  // (warps, T)
  float3* const early = reinterpret_cast<float3*>(shared + c.early);    // (threads)
  const auto staging = [&](int i) {
    return Staging<Tile, kScales>{
        p,      block.pass(i), gain,        x,   bias, x_scale, squares + warp * c.tokens,
        i == 0, stride,        kBiasStride, lane};
  };
  const int row_scales = p.groups * kQ4TileRows, row_sums = c.slices * kQ4TileRows * p.tokens;
  staging(0).load_gain();
  pdl_wait();

#pragma unroll 1
  for (int i = 0; i < block.passes; ++i) {
    const LinearDecodePass pass = block.pass(i);
    const int rows = pass.row1 - pass.row0;
    OutputPair<kTokens> output(p, int(threadIdx.x), pass.row0, rows);
    if (i == 0 || c.phases > 1) {
      __syncwarp();
      if (i > 0) staging(i).load_gain();
      staging(i).run();
      __syncwarp();
    }
    // Only now: what the successor asks for at once would stand before x in the memory's queues, for about 3
    // us.
    if (i == 0) pdl_trigger();
    output.prepare(p);
    early[threadIdx.x] = output.early();
    stream.wait_for_others(pass.units * rows);  // scales
    __syncthreads();                            // everyone's scales
    if (c.phases == 1 && i + 1 < block.passes) copy_scales(i + 1);

#pragma unroll 1
    for (int u = 0; u < pass.units; ++u) {
      UnitX<Tile, kScales, kTokens> unit_x;
      unit_x.load(x + u * (kUnitColumns * 2), stride, p.tokens, bias + u * (kScales * kBiasStride),
                  x_scale + u * kBiasStride, lane);
      const int at = pass.first + u * c.slices, group = kScales == 1 ? at >> p.group_shift : at * kScales;
      const uint16_t* unit_scales = scales_of(i) + group * kQ4TileRows + lane / 4;
      float* to = partial + (warp * kQ4TileRows + lane / 4) * p.tokens + lane % 4 * 2;
      const bool add = u > 0 || (c.phases > 1 && i > 0);
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        float sum[UnitX<Tile, kScales, kTokens>::kBlocks][4];
        unit_x.multiply(sum, stream.get(), unit_scales, p.groups - group, at * kUnitTiles + 1 < p.k_tiles);
        stream.pop();
        unit_scales += row_scales;
        // Rows lane/4 and that + 8, tokens 2t and 2t+1 of t = lane % 4.
#pragma unroll
        for (int n = 0; n < UnitX<Tile, kScales, kTokens>::kBlocks; ++n)
#pragma unroll
          for (int j = 0; j < 4; j += kTokens == 1 ? 2 : 1) {
            float* result = to + j / 2 * 8 * p.tokens + j % 2 + 8 * n;
            if (lane % 4 * 2 + j % 2 + 8 * n < p.tokens) *result = add ? *result + sum[n][j] : sum[n][j];
          }
        to += row_sums;
      }
    }

    if (c.phases > 1 && i + 1 < block.passes) continue;
    __syncthreads();
    // Four threads to a pair of outputs.
    const int items = rows * 8 * p.tokens, part = lane % 4;
#pragma unroll 1
    for (int first = 0; first < items; first += kWarps * 8) {
      const int item = first + int(threadIdx.x) / 4;
      OutputPair<kTokens> pair(p, item, pass.row0, rows, item < kWarps * 32 ? early + item : nullptr);
      const float* from =
          partial + ((pair.tile_row - pass.row0) * c.slices * kQ4TileRows + pair.r) * p.tokens + pair.token;
      float low = 0, high = 0, square = 0;
      if (pair.active)
#pragma unroll 4
        for (int w = part; w < c.slices; w += 4) {
          low += from[w * kQ4TileRows * p.tokens];
          high += from[(w * kQ4TileRows + 8) * p.tokens];
          if (p.gain) square += squares[w * c.tokens + pair.token];
        }
#pragma unroll
      for (int d = 1; d < 4; d *= 2) {
        low += __shfl_xor_sync(0xffffffffu, low, d);
        high += __shfl_xor_sync(0xffffffffu, high, d);
        square += __shfl_xor_sync(0xffffffffu, square, d);
      }
      if (!pair.active || part != 0) continue;
      const float norm = p.gain ? rsqrtf(square * p.inverse_k + p.eps) : 1.0f;
      pair.finish(p, low * norm, high * norm);
    }
    if (i + 1 < block.passes) __syncthreads();  // before others write what this pass reads
  }
}

template <class Tile, int kScales>
void launch_linear_decode(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl) {
  const Q4Layout& l = a.w.layout;
  LinearDecodeParams p{};
  p.codes = a.w.codes, p.scales = a.w.scales, p.x = a.x, p.gain = a.gain, p.residual = a.residual, p.y = a.y;
  p.table = a.table, p.position = a.at.position, p.sequence = a.at.sequence, p.kv = a.kv;
  p.eps = a.eps, p.inverse_k = 1 / float(l.k);
  p.n = int(l.n), p.k = int(l.k), p.n_tiles = int(l.n_tiles()), p.k_tiles = int(l.k_tiles());
  p.groups = int(l.groups());
  p.heads = int(a.heads), p.kv_heads = int(a.kv_heads), p.head_dim = int(l.head_dim), p.epilogue = a.epilogue;
  p.group_shift = 31;
  if (l.bits != 16 && l.group < l.k) {
    p.group_shift = 0;
    for (int64_t g = kUnitColumns; g < l.group; g *= 2) ++p.group_shift;
  }
  p.config = linear_decode_config(l, int(a.tokens), a.gain, device_facts().multiprocessors,
                                  device_facts().shared_bytes);
  // More than half of a multiprocessor's: where two blocks fit one, any smaller kernel between makes some get
  // two and others none, for the rest of the step.
  const size_t shared = size_t(std::max(p.config.shared, device_facts().shared_bytes / 2 + 1));
  for (int t = 0; t < int(a.tokens); t += p.config.tokens) {
    LinearDecodeParams q = p;
    q.tokens = std::min(p.config.tokens, int(a.tokens) - t);
    const int64_t y_cols = a.epilogue == Epilogue::kSwiglu   ? l.n / 2
                           : a.epilogue == Epilogue::kRopeKv ? a.heads * l.head_dim
                                                             : l.n;
    q.x += t * l.k, q.y += t * y_cols;
    if (q.residual) q.residual += t * l.n;
    if (q.position) q.position += t, q.sequence += t;
    const auto kernel = q.tokens == 1   ? linear_decode_kernel<Tile, kScales, 1>
                        : q.tokens <= 8 ? linear_decode_kernel<Tile, kScales, 8>
                                        : linear_decode_kernel<Tile, kScales, 16>;
    launch("linear_decode", kernel, dim3(unsigned(q.config.blocks)), kDecodeWarps * 32, shared, 1, pdl,
           stream, q);
  }
}

}  // namespace q4s
