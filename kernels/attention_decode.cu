// attention_decode.h. One cluster for a token and up to 8 query heads of one kv head; its blocks and their
// warps share out the cache in tiles of 16 positions, each warp with its own online softmax.
//
// Both products run on mma.m16n8k16 with the heads as columns, straight from global memory without shared
// memory:
//   S^T (16 positions, 8 heads) = K (16, hd) Q^T: the order of hd is free, so a lane takes 8 neighbouring
//   values O^T (16 dims, 8 heads)      = V^T (16, 16 positions) P^T: the order of dims is free likewise;
//   pairs of positions
//                                 are made by byte permutation, P^T by a transposition in registers
// The partial results of warps, then of blocks, meet in shared memory and are added in their order.
//
// A second, plain kernel serves caches in f32 and head sizes that are no multiple of 8.
#include <algorithm>
#include <cmath>

#include "kernels/attention_decode.h"
#include "kernels/decode_ptx.cuh"
#include "kernels/pdl.cuh"

namespace q4s {
namespace {

constexpr int kWarps = 4, kTile = 16, kMaxHeads = 8, kMaxCluster = 8;
constexpr float kLog2e = 1.4426950408889634f;

struct Params {
  const float* q;  // (T, H * hd)
  float* y;        // (T, H * hd)
  Placement at;
  KvLayer kv;
  int heads, kv_heads, head_dim;
  int head_blocks;  // blocks of 8 query heads to one kv head
  float scale;      // log2(e) / sqrt(hd)
};

// Shared memory, in floats: per warp m and l of 8 heads, O (heads, hd); then the block's own.
struct Partials {
  float *m, *l, *o;                    // (warps, 8), (warps, 8), (warps, heads, hd)
  float *block_m, *block_l, *block_o;  // (8), (8), (heads, hd)
};
__device__ Partials partials(float* shared, int heads, int head_dim) {
  Partials s;
  s.m = shared;
  s.l = s.m + kWarps * kMaxHeads;
  s.block_m = s.l + kWarps * kMaxHeads;
  s.block_l = s.block_m + kMaxHeads;
  s.block_o = s.block_l + kMaxHeads;
  s.o = s.block_o + heads * head_dim;
  return s;
}
int shared_bytes(int heads, int head_dim) {
  return 4 * (2 * kWarps * kMaxHeads + 2 * kMaxHeads + (kWarps + 1) * heads * head_dim);
}

// Adds the warps' results, then the blocks', and writes y (heads, hd). All threads of the cluster.
__device__ void combine(const Partials& s, float* y, int heads, int head_dim, int rank, int cluster) {
  __syncthreads();
  const int count = heads * head_dim;
  for (int i = int(threadIdx.x); i < count; i += kWarps * 32) {
    const int h = i / head_dim;
    float top = -INFINITY, sum = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, s.m[w * kMaxHeads + h]);
    for (int w = 0; w < kWarps; ++w) {
      const float m = s.m[w * kMaxHeads + h], weight = m == -INFINITY ? 0.0f : exp2f(m - top);
      sum += weight * s.o[w * count + i];
      total += weight * s.l[w * kMaxHeads + h];
    }
    if (cluster == 1) {
      y[i] = sum / total;
    } else {
      s.block_o[i] = sum;
      if (i % head_dim == 0) {
        s.block_m[h] = top;
        s.block_l[h] = total;
      }
    }
  }
  if (cluster == 1) return;
  cluster_sync();
  for (int i = count * rank / cluster + int(threadIdx.x); i < count * (rank + 1) / cluster;
       i += kWarps * 32) {
    const int h = i / head_dim;
    float m[kMaxCluster], top = -INFINITY, sum = 0, total = 0;
#pragma unroll
    for (int b = 0; b < kMaxCluster; ++b) {
      m[b] = b < cluster ? cluster_read(s.block_m + h, b) : -INFINITY;
      top = fmaxf(top, m[b]);
    }
#pragma unroll
    for (int b = 0; b < kMaxCluster; ++b)
      if (b < cluster) {
        const float weight = m[b] == -INFINITY ? 0.0f : exp2f(m[b] - top);
        sum += weight * cluster_read(s.block_o + i, b);
        total += weight * cluster_read(s.block_l + h, b);
      }
    y[i] = sum / total;
  }
  cluster_sync();  // the other blocks may still read this one's memory
}

// kChunks: head_dim in units of 32, rounded up.
template <int kChunks>
__global__ void __launch_bounds__(kWarps * 32, kChunks <= 2 ? 2 : 1)
    attention_mma_kernel(const __grid_constant__ Params p) {
  constexpr int kWide = (kChunks + 1) / 2;  // head_dim in units of 64
  extern __shared__ __align__(16) float shared[];
  pdl_trigger();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int rank = int(blockIdx.x), cluster = int(gridDim.x), token = int(blockIdx.z);
  const int kv_head = int(blockIdx.y) / p.head_blocks, block = int(blockIdx.y) % p.head_blocks;
  const int group = p.heads / p.kv_heads, heads = min(kMaxHeads, group - block * kMaxHeads);
  const int head = kv_head * group + block * kMaxHeads, hd = p.head_dim, width = p.kv_heads * hd;

  pdl_wait();
  const int length = __ldcg(p.at.position + token) + 1;
  const int64_t base = __ldcg(p.at.sequence + token) * p.kv.ctx * width + kv_head * hd;
  const __half* keys = static_cast<const __half*>(p.kv.k) + base;
  const __half* values = static_cast<const __half*>(p.kv.v) + base;
  const int tiles = (length + kTile - 1) / kTile;
  const int end = int(int64_t(tiles) * (rank + 1) / cluster);
  int tile = int(int64_t(tiles) * rank / cluster) + warp;

  // Rows g and g+8 of K at dims 32c + 8t..; rows 2t, 2t+1, 2t+8, 2t+9 of V at dims 64c + 8g... Beyond the end
  // the last row is read again, its weight will be 0.
  uint4 k[kChunks][2], v[kWide][4];
  const auto row = [&](int r) { return int64_t(min(tile * kTile + r, length - 1)) * width; };
  const auto load_k = [&] {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        k[c][i] = 32 * c + 8 * t < hd
                      ? __ldcg(reinterpret_cast<const uint4*>(keys + row(g + 8 * i) + 32 * c + 8 * t))
                      : make_uint4(0, 0, 0, 0);
  };
  const auto load_v = [&] {
#pragma unroll
    for (int c = 0; c < kWide; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[c][i] = 64 * c + 8 * g < hd ? __ldcg(reinterpret_cast<const uint4*>(
                                            values + row(2 * t + i % 2 + i / 2 * 8) + 64 * c + 8 * g))
                                      : make_uint4(0, 0, 0, 0);
  };
  if (tile < end) {
    load_k();
    load_v();
  }

  uint32_t q[kChunks][4];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float4 a = make_float4(0, 0, 0, 0), b = a;
    if (g < heads && 32 * c + 8 * t < hd) {
      const float4* from =
          reinterpret_cast<const float4*>(p.q + (int64_t(token) * p.heads + head + g) * hd + 32 * c + 8 * t);
      a = __ldcg(from);
      b = __ldcg(from + 1);
    }
    q[c][0] = pack_half2(a.x * p.scale, a.y * p.scale);
    q[c][1] = pack_half2(a.z * p.scale, a.w * p.scale);
    q[c][2] = pack_half2(b.x * p.scale, b.y * p.scale);
    q[c][3] = pack_half2(b.z * p.scale, b.w * p.scale);
  }

  // Heads 2t and 2t+1 of this lane.
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {}, o[kWide][4][4] = {};
  while (tile < end) {
    float s[4] = {}, s2[4] = {};  // two chains, for latency
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t first[4] = {k[c][0].x, k[c][1].x, k[c][0].y, k[c][1].y};
      const uint32_t second[4] = {k[c][0].z, k[c][1].z, k[c][0].w, k[c][1].w};
      mma_16816(s, first, q[c][0], q[c][1]);
      mma_16816(s2, second, q[c][2], q[c][3]);
    }
    const int here = tile;
    tile += kWarps;
    if (tile < end) load_k();

    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& low = s[h];       // position g
      float& high = s[h + 2];  // position g + 8
      low = here * kTile + g < length ? low + s2[h] : -INFINITY;
      high = here * kTile + g + 8 < length ? high + s2[h + 2] : -INFINITY;
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
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      const uint32_t w[4][4] = {{v[c][0].x, v[c][0].y, v[c][0].z, v[c][0].w},
                                {v[c][1].x, v[c][1].y, v[c][1].z, v[c][1].w},
                                {v[c][2].x, v[c][2].y, v[c][2].z, v[c][2].w},
                                {v[c][3].x, v[c][3].y, v[c][3].z, v[c][3].w}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        o[c][i][0] *= shrink[0];
        o[c][i][1] *= shrink[1];
        o[c][i][2] *= shrink[0];
        o[c][i][3] *= shrink[1];
        const uint32_t a[4] = {__byte_perm(w[0][i], w[1][i], 0x5410), __byte_perm(w[0][i], w[1][i], 0x7632),
                               __byte_perm(w[2][i], w[3][i], 0x5410), __byte_perm(w[2][i], w[3][i], 0x7632)};
        mma_16816(o[c][i], a, b0, b1);
      }
    }
    if (tile < end) load_v();
  }

  const Partials part = partials(shared, heads, hd);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int d = 4; d < 32; d *= 2) l[h] += __shfl_xor_sync(0xffffffffu, l[h], d);
    if (g == 0) {
      part.m[warp * kMaxHeads + 2 * t + h] = m[h];
      part.l[warp * kMaxHeads + 2 * t + h] = l[h];
    }
    if (2 * t + h < heads) {
      float* to = part.o + (warp * heads + 2 * t + h) * hd;
#pragma unroll
      for (int c = 0; c < kWide; ++c)
        if (64 * c + 8 * g < hd)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            to[64 * c + 8 * g + 2 * i] = o[c][i][h];
            to[64 * c + 8 * g + 2 * i + 1] = o[c][i][h + 2];
          }
    }
  }
  combine(part, p.y + (int64_t(token) * p.heads + head) * hd, heads, hd, rank, cluster);
}

__device__ float load(const void* cache, KvType type, int64_t i) {
  return type == KvType::kF32
             ? __ldcg(static_cast<const float*>(cache) + i)
             : __half2float(__ushort_as_half(__ldcg(static_cast<const uint16_t*>(cache) + i)));
}

// One head a block; a warp takes every fourth position, a lane every 32nd dim (head_dim <= 256).
__global__ void __launch_bounds__(kWarps * 32) attention_plain_kernel(const __grid_constant__ Params p) {
  constexpr int kDims = 8;
  extern __shared__ __align__(16) float shared[];
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
  for (int j = warp; j < length; j += kWarps) {
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
  const Partials part = partials(shared, 1, hd);
  if (lane == 0) {
    part.m[warp * kMaxHeads] = m;
    part.l[warp * kMaxHeads] = l;
  }
#pragma unroll
  for (int i = 0; i < kDims; ++i)
    if (32 * i + lane < hd) part.o[warp * hd + 32 * i + lane] = o[i];
  combine(part, p.y + row, 1, hd, 0, 1);
}

template <int kChunks>
void launch_mma(const Params& p, int cluster, int tokens, int heads, bool pdl, cudaStream_t stream) {
  launch("attention_decode", attention_mma_kernel<kChunks>,
         dim3(unsigned(cluster), unsigned(p.kv_heads * p.head_blocks), unsigned(tokens)), kWarps * 32,
         size_t(shared_bytes(heads, p.head_dim)), cluster, pdl, stream, p);
}

}  // namespace

int attention_decode_cluster(int64_t rows, int64_t longest, bool clusters) {
  int n = 1;
  while (clusters && n < kMaxCluster && rows * n < 96 && longest > n * kWarps * kTile) n *= 2;
  return n;
}

void attention_decode_cuda(const AttentionDecodeArgs& a, cudaStream_t stream, bool pdl) {
  Params p{a.q, a.y, a.at, a.kv, int(a.heads), int(a.kv_heads), int(a.head_dim), 1, 0};
  p.scale = kLog2e / std::sqrt(float(a.head_dim));
  if (a.kv.type == KvType::kF32 || a.head_dim % 8 != 0) {
    launch("attention_decode", attention_plain_kernel, dim3(1, unsigned(a.heads), unsigned(a.tokens)),
           kWarps * 32, size_t(shared_bytes(1, p.head_dim)), 1, pdl, stream, p);
    return;
  }
  const int group = p.heads / p.kv_heads, heads = std::min(group, kMaxHeads);
  p.head_blocks = (group + kMaxHeads - 1) / kMaxHeads;
  const int cluster =
      attention_decode_cluster(a.tokens * p.kv_heads * p.head_blocks, a.longest, device_facts().hopper);
  const auto run = [&](auto chunks) {
    launch_mma<decltype(chunks)::value>(p, cluster, int(a.tokens), heads, pdl, stream);
  };
  switch ((p.head_dim + 31) / 32) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 5:
    case 6:
      return run(std::integral_constant<int, 6>{});
    default:
      return run(std::integral_constant<int, 8>{});
  }
}

}  // namespace q4s
