// attention_decode.h. A block takes a part of the cache for a token and up to 8 query heads of one kv head;
// its warps take tiles of 16 positions in turn, each through a ring in shared memory of its own and with its
// own online softmax.
//
// Both products run on mma.m16n8k16 with the heads as columns:
//   S^T (16 positions, 8 heads) = K (16, hd) Q^T        K by ldmatrix
//   O^T (hd, 8 heads)           = V^T (hd, 16) P^T      V by a transposing ldmatrix, P^T by movmatrix from
//   S^T
// The warps' results meet in shared memory, the blocks' in scratch, where the last block to end adds them in
// order.
//
// Rows of earlier steps are asked for before the predecessor has ended.
//
// Where contexts are short and there are more rows of work than multiprocessors, a warp takes a row alone: a
// block for each row would cost more than its row. While one block a multiprocessor holds them all, the next
// product's has its place beside it.
//
// A second, plain kernel serves caches in f32 and head sizes that are no multiple of 8.
#include <algorithm>
#include <climits>
#include <cmath>

#include "kernels/attention_decode.h"
#include "kernels/attention_decode_combine.cuh"
#include "kernels/pdl.cuh"
#include "kernels/shared_halves.cuh"

namespace q4s {
namespace {

constexpr int kTile = 16, kPlainWarps = 4;
constexpr float kLog2e = 1.4426950408889634f;

using Params = AttentionDecodeParams;
template <int kWarps>
using Partials = AttentionDecodePartials<kWarps>;

// The ring of a warp: planes of K and V of a tile in turn. kChunks: head_dim in units of 32, rounded up.
// Pieces of 16 bytes of a row are permuted by its number, or rows are padded, so that eight rows meet eight
// different banks.
template <int kChunks>
struct Ring {
  // Of a block: the rings of two fit a multiprocessor, or nearly so.
  static constexpr int kWarps = kChunks <= 2 ? 8 : 4;
  static constexpr int kSlots = kChunks > 4 ? 3 : kChunks == 2 ? 4 : 6;
  static constexpr int kDims = 32 * kChunks, kPieces = kDims / 8;
  static constexpr bool kPermuted = kChunks % 2 == 0;
  static constexpr int kPitch = kDims * 2 + (kPermuted ? 0 : 16), kPlane = kTile * kPitch;
  static constexpr int kBytes = kSlots * kPlane;

  __device__ static uint32_t piece(int row, int i) {
    return row * kPitch + (kPermuted ? i ^ (row & 7) : i) * 16;
  }
  // From the address of piece 0 or 1 of a row to that of 2c on.
  __device__ static uint32_t step(uint32_t at, int c) {
    return kPermuted ? (at ^ (c % 4 * 32)) + c / 4 * 128 : at + c * 32;
  }
};

template <int kChunks, bool kAlone>
__global__ void __launch_bounds__(Ring<kChunks>::kWarps * 32, kChunks <= 4 ? 2 : 1)
    attention_mma_kernel(const __grid_constant__ Params p) {
  using R = Ring<kChunks>;
  constexpr int kWarps = R::kWarps, kSlots = R::kSlots, kSteps = 2 * kChunks;  // steps: of 16 dims
  constexpr int kNext = kAlone ? 1 : kWarps;                                   // from a tile to a warp's next
  extern __shared__ __align__(128) uint8_t shared[];
  Partials<kWarps>& partials = *reinterpret_cast<Partials<kWarps>*>(shared + kWarps * R::kBytes);
  pdl_trigger();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int of_token = p.kv_heads * p.head_blocks;
  const int row =
      kAlone ? int(blockIdx.x * blockDim.x + threadIdx.x) / 32 : int(blockIdx.z) * of_token + int(blockIdx.y);
  if (kAlone && row >= p.rows) {
    pdl_wait();
    return;
  }
  const int part = kAlone ? 0 : int(blockIdx.x), token = row / of_token;
  const int kv_head = row % of_token / p.head_blocks, block = row % p.head_blocks;
  const int group = p.heads / p.kv_heads, heads = min(kMaxHeads, group - block * kMaxHeads);
  const int head = kv_head * group + block * kMaxHeads, hd = p.head_dim, width = p.kv_heads * hd;

  const int length = __ldcg(p.at.position + token) + 1, old = length - p.fresh;
  const int64_t base = __ldcg(p.at.sequence + token) * p.kv.ctx * width + kv_head * hd;
  const __half* keys = static_cast<const __half*>(p.kv.k) + base;
  const __half* values = static_cast<const __half*>(p.kv.v) + base;
  const int tiles = (length + kTile - 1) / kTile;
  const int parts = kAlone ? 1 : max(1, min(int(gridDim.x), tiles / p.part_tiles));
  const int end = part < parts ? int(int64_t(tiles) * (part + 1) / parts) : 0;
  int tile = part < parts ? int(int64_t(tiles) * part / parts) + (kAlone ? 0 : warp) : 0;

  // Asks for plane n of the warp's tiles, K and V in turn, but for rows at positions in [without, length);
  // rows from `length` on become zero.
  const uint32_t ring = shared_address(shared) + warp * R::kBytes;
  const auto fill = [&](uint32_t to, int n, int without) {
    const int first = (tile + n / 2 * kNext) * kTile;
    if (first >= end * kTile) return;
    const __half* rows = (n % 2 ? values : keys) + int64_t(first) * width;
#pragma unroll
    for (int j = 0; j < kTile * R::kPieces / 32; ++j) {
      const int i = lane + 32 * j, row = i / R::kPieces, piece = i % R::kPieces, position = first + row;
      const bool there = position < length && piece * 8 < hd;
      if (position < without || position >= length || piece * 8 >= hd)
        copy_or_zero(to + R::piece(row, piece), there ? rows + int64_t(row) * width + piece * 8 : rows,
                     there);
    }
  };
#pragma unroll 1
  for (int n = 0; n < kSlots; ++n) {
    fill(ring + n * R::kPlane, n, old);
    copy_commit();
  }
  pdl_wait();
  if (part >= parts) return;

  float2 queries[kSteps][2];
  const float* const q_row = p.q + (int64_t(token) * p.heads + head + g) * hd + 2 * t;
#pragma unroll
  for (int c = 0; c < kSteps; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      queries[c][i] = make_float2(0, 0);
      if (g < heads && 16 * c + 8 * i < hd)
        queries[c][i] = __ldcg(reinterpret_cast<const float2*>(q_row + 16 * c + 8 * i));
    }
  // Fresh rows of tiles that have been asked for.
  const bool late = tile < end && (min(tile + (kSlots - 1) / 2 * kNext, end - 1) + 1) * kTile > old;
  if (late) {
#pragma unroll 1
    for (int n = 0; n < kSlots; ++n) {
      const int first = (tile + n / 2 * kNext) * kTile, row0 = max(0, old - first);
      const int rows = first < end * kTile ? min(kTile, length - first) - row0 : 0;
      const __half* from = (n % 2 ? values : keys) + int64_t(first) * width;
#pragma unroll 1
      for (int i = lane; i < rows * R::kPieces; i += 32) {
        const int row = row0 + i / R::kPieces, piece = i % R::kPieces;
        if (piece * 8 < hd)
          copy_or_zero(ring + n * R::kPlane + R::piece(row, piece), from + int64_t(row) * width + piece * 8,
                       true);
      }
    }
    copy_commit();
  }
  // Waits for the plane that is next; a tile with fresh rows is the last or nearly so.
  const auto wait = [&] {
    if ((tile + 1) * kTile > old)
      copy_wait<0>();
    else if (late)
      copy_wait<kSlots>();
    else
      copy_wait<kSlots - 1>();
    __syncwarp();
  };

  uint32_t q[kSteps][2];
#pragma unroll
  for (int c = 0; c < kSteps; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) q[c][i] = pack_half2(queries[c][i].x * p.scale, queries[c][i].y * p.scale);

  // Heads 2t and 2t+1 of this lane; of O dims 16c + g and that + 8.
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {}, o[kSteps][4] = {};
  const uint32_t k_lane = ring + R::piece(lane % 16, lane / 16);
  const uint32_t v_lane = ring + R::piece(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  int slot = 0;
  const auto refill = [&](int n) {
    __syncwarp();
    fill(ring + slot * R::kPlane, n, INT_MAX);
    copy_commit();
    if (++slot == kSlots) slot = 0;
  };
#pragma unroll 1
  for (; tile < end; tile += kNext) {
    wait();
    float s[4] = {}, s2[4] = {};  // two chains, for latency
#pragma unroll
    for (int c = 0; c < kSteps; c += 2) {
      uint32_t a[4];
      load_matrices<false>(a, R::step(k_lane + slot * R::kPlane, c));
      mma_16816(s, a, q[c][0], q[c][1]);
      load_matrices<false>(a, R::step(k_lane + slot * R::kPlane, c + 1));
      mma_16816(s2, a, q[c + 1][0], q[c + 1][1]);
    }
    refill(kSlots);
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& low = s[h];       // position g
      float& high = s[h + 2];  // position g + 8
      low = tile * kTile + g < length ? low + s2[h] : -INFINITY;
      high = tile * kTile + g + 8 < length ? high + s2[h + 2] : -INFINITY;
      float top = fmaxf(low, high);
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
      top = fmaxf(top, m[h]);
      shrink[h] = exp2f(m[h] - top);
      m[h] = top;
      low = exp2f(low - top);
      high = exp2f(high - top);
      l[h] = l[h] * shrink[h] + (low + high);
    }
    const uint32_t b0 = transpose_8x8(pack_half2(s[0], s[1])), b1 = transpose_8x8(pack_half2(s[2], s[3]));
    wait();
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      uint32_t a[4];
      load_matrices<true>(a, R::step(v_lane + slot * R::kPlane, c));
      o[c][0] *= shrink[0], o[c][1] *= shrink[1], o[c][2] *= shrink[0], o[c][3] *= shrink[1];
      mma_16816(o[c], a, b0, b1);
    }
    refill(kSlots + 1);
  }

  if constexpr (kAlone) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int d = 4; d < 32; d *= 2) l[h] += __shfl_xor_sync(0xffffffffu, l[h], d);
      if (2 * t + h >= heads) continue;
      const int64_t to = (int64_t(token) * p.heads + head + 2 * t + h) * hd + g;
#pragma unroll
      for (int c = 0; c < kSteps; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (16 * c + 8 * i < hd) store(p, to + 16 * c + 8 * i, o[c][h + 2 * i] / l[h]);
    }
    return;
  }
  // Rings are empty.
  const auto sums_of = [&](int w) { return reinterpret_cast<float*>(shared + w * R::kBytes); };
  __syncwarp();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int d = 4; d < 32; d *= 2) l[h] += __shfl_xor_sync(0xffffffffu, l[h], d);
    if (g == 0) partials.m[warp][2 * t + h] = m[h], partials.l[warp][2 * t + h] = l[h];
    if (2 * t + h >= heads) continue;
    float* const to = sums_of(warp) + (2 * t + h) * hd + g;
#pragma unroll
    for (int c = 0; c < kSteps; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (16 * c + 8 * i < hd) to[16 * c + 8 * i] = o[c][h + 2 * i];
  }
  combine<kWarps>(p, partials, sums_of, (int64_t(token) * p.heads + head) * hd, heads, part, parts);
}

__device__ float load(const void* cache, KvType type, int64_t i) {
  return type == KvType::kF32
             ? __ldcg(static_cast<const float*>(cache) + i)
             : __half2float(__ushort_as_half(__ldcg(static_cast<const uint16_t*>(cache) + i)));
}

// One head a block; a warp takes every fourth position, a lane every 32nd dim (head_dim <= 256).
__global__ void __launch_bounds__(kPlainWarps * 32) attention_plain_kernel(const __grid_constant__ Params p) {
  constexpr int kDims = 8;
  __shared__ Partials<kPlainWarps> partials;
  __shared__ float o_warps[kPlainWarps][32 * kDims];
  pdl_trigger();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, hd = p.head_dim;
  const int head = int(blockIdx.y), token = int(blockIdx.z), width = p.kv_heads * hd;
  pdl_wait();
  const int length = __ldcg(p.at.position + token) + 1;
  const int64_t base = __ldcg(p.at.sequence + token) * p.kv.ctx * width + head / (p.heads / p.kv_heads) * hd;
  const int64_t row = (int64_t(token) * p.heads + head) * hd;
  float q[kDims], o[kDims] = {}, m = -INFINITY, l = 0;
#pragma unroll
  for (int i = 0; i < kDims; ++i) q[i] = 32 * i + lane < hd ? __ldcg(p.q + row + 32 * i + lane) * p.scale : 0;
  for (int j = warp; j < length; j += kPlainWarps) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < kDims; ++i)
      if (32 * i + lane < hd) s += q[i] * load(p.kv.k, p.kv.type, base + int64_t(j) * width + 32 * i + lane);
    for (int d = 1; d < 32; d *= 2) s += __shfl_xor_sync(0xffffffffu, s, d);
    const float top = fmaxf(m, s), shrink = exp2f(m - top), weight = exp2f(s - top);
    m = top;
    l = l * shrink + weight;
#pragma unroll
    for (int i = 0; i < kDims; ++i)
      if (32 * i + lane < hd)
        o[i] = o[i] * shrink + weight * load(p.kv.v, p.kv.type, base + int64_t(j) * width + 32 * i + lane);
  }
  if (lane == 0) partials.m[warp][0] = m, partials.l[warp][0] = l;
#pragma unroll
  for (int i = 0; i < kDims; ++i)
    if (32 * i + lane < hd) o_warps[warp][32 * i + lane] = o[i];
  combine<kPlainWarps>(
      p, partials, [&](int w) { return o_warps[w]; }, row, 1, 0, 1);
}

constexpr int64_t kAloneLongest = 256;  // up to where a warp is to take a row alone

template <int kChunks>
void launch_mma(const Params& p, int parts, const AttentionDecodeArgs& a, bool pdl, cudaStream_t stream) {
  using R = Ring<kChunks>;
  const int most = device_facts().multiprocessors;
  const int alone = std::min(int(ceil_div(p.rows, most)), R::kWarps);  // warps a block
  if (parts == 1 && a.longest <= kAloneLongest && alone > 1)
    launch("attention_decode", attention_mma_kernel<kChunks, true>, dim3(unsigned(ceil_div(p.rows, alone))),
           alone * 32, size_t(alone * R::kBytes), 1, pdl, stream, p);
  else
    launch("attention_decode", attention_mma_kernel<kChunks, false>,
           dim3(unsigned(parts), unsigned(p.kv_heads * p.head_blocks), unsigned(a.tokens)), R::kWarps * 32,
           R::kWarps * R::kBytes + sizeof(Partials<R::kWarps>), 1, pdl, stream, p);
}

constexpr int kPartTiles = 16;  // a part has this many tiles or more
constexpr int kFill = 2;        // blocks for each multiprocessor, at most, where there are parts
constexpr size_t kPartBytes = (2 * kMaxHeads + kMaxHeads * kMaxDim) * sizeof(float);

}  // namespace

int attention_decode_parts(int64_t rows, int64_t longest, int multiprocessors) {
  const int64_t tiles = ceil_div(longest, int64_t(kTile));
  return int(std::clamp<int64_t>(std::min(kFill * multiprocessors / rows, tiles / kPartTiles), 1, kMaxParts));
}

size_t attention_decode_scratch_bytes(int multiprocessors) {
  return kAttentionDecodeCounters + size_t(kFill * multiprocessors) * kPartBytes;
}

void attention_decode_cuda(const AttentionDecodeArgs& a, cudaStream_t stream, bool pdl) {
  Params p{};
  p.q = a.q, p.y = a.y, p.y_half = a.y_half, p.at = a.at, p.kv = a.kv;
  p.heads = int(a.heads), p.kv_heads = int(a.kv_heads), p.head_dim = int(a.head_dim), p.head_blocks = 1;
  p.fresh = int(a.fresh);
  p.scale = kLog2e / std::sqrt(float(a.head_dim));
  if (a.kv.type == KvType::kF32 || a.head_dim % 8 != 0) {
    launch("attention_decode", attention_plain_kernel, dim3(1, unsigned(a.heads), unsigned(a.tokens)),
           kPlainWarps * 32, 0, 1, pdl, stream, p);
    return;
  }
  p.head_blocks = int(ceil_div(a.heads / a.kv_heads, int64_t(kMaxHeads)));
  const int multiprocessors = device_facts().multiprocessors;
  p.rows = int(a.tokens) * p.kv_heads * p.head_blocks;
  const int parts = attention_decode_parts(p.rows, a.longest, multiprocessors);
  p.part_tiles = kPartTiles;
  p.counters = reinterpret_cast<unsigned*>(a.scratch);
  p.unfinished = reinterpret_cast<float2*>(a.scratch + kAttentionDecodeCounters);
  p.sums = reinterpret_cast<float*>(p.unfinished + kFill * multiprocessors * kMaxHeads);
  const auto run = [&](auto chunks) { launch_mma<decltype(chunks)::value>(p, parts, a, pdl, stream); };
  switch ((p.head_dim + 31) / 32) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    case 4: return run(std::integral_constant<int, 4>{});
    case 5:
    case 6: return run(std::integral_constant<int, 6>{});
    default: return run(std::integral_constant<int, 8>{});
  }
}

}  // namespace q4s
