// attention_prefill.h for any device of compute capability 8.0 and up, after FlashAttention-2 (Dao, 2023). A
// block takes 64 queries of one head, a warp 16 of them; all walk the cache in tiles of 64 positions, copied
// asynchronously one tile ahead into swizzled shared memory.
//   S (16, 64) = Q K^T     Q in registers, K rows by ldmatrix
//   O (16, hd) = P V       P is S's own registers, V rows by a transposing ldmatrix
// Sums are f32; the order depends on the shapes alone.
#include <cuda_fp16.h>

#include "kernels/attention_prefill.h"
#include "kernels/attention_prefill_sm90.cuh"
#include "kernels/pdl.cuh"
#include "kernels/shared_halves.cuh"

namespace q4s {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kQueries = kWarps * 16, kKeys = 64;
constexpr float kLog2e = 1.4426950408889634f;

// A tile (kKeys, kHd) of halves: 16-byte pieces of a row are permuted by its number, so that eight rows read
// at one column meet eight different banks.
template <int kHd>
struct Tile {
  __half data[kKeys * kHd];
  __device__ __half* piece(int row, int p) { return data + row * kHd + (p ^ (row & 7)) * 8; }
};

template <int kHd>
struct Stage {
  Tile<kHd> k, v;
};

template <int kHd>
__device__ void fetch(Stage<kHd>& to, const __half* k, const __half* v, int64_t width, int first, int end,
                      int hd) {
  constexpr int kPieces = kHd / 8;
  for (int i = int(threadIdx.x); i < kKeys * kPieces; i += kThreads) {
    const int row = i / kPieces, p = i % kPieces;
    const bool there = first + row < end && p * 8 < hd;
    const int64_t at = there ? (first + row) * width + p * 8 : 0;
    copy_or_zero(shared_address(to.k.piece(row, p)), k + at, there);
    copy_or_zero(shared_address(to.v.piece(row, p)), v + at, there);
  }
  copy_commit();
}

template <int kHd>
__global__ void __launch_bounds__(kThreads, 2) attention_prefill_kernel(AttentionPrefillArgs a, float scale) {
  extern __shared__ __align__(128) uint8_t storage[];
  Stage<kHd>* stages = reinterpret_cast<Stage<kHd>*>(storage);
  __shared__ int position[kQueries], sequence[kQueries];
  pdl_trigger();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int hd = int(a.head_dim), head = int(blockIdx.y);
  const int64_t tile = int64_t(gridDim.x) - 1 - blockIdx.x;  // the longest first
  const int64_t first_query = tile * kQueries, width = a.kv_heads * hd, q_width = a.heads * hd;
  const int queries = int(min(a.tokens - first_query, int64_t(kQueries)));
  pdl_wait();
  if (int(threadIdx.x) < kQueries) {
    const bool there = int(threadIdx.x) < queries;
    position[threadIdx.x] = there ? a.at.position[first_query + threadIdx.x] : -1;
    sequence[threadIdx.x] = there ? a.at.sequence[first_query + threadIdx.x] : -1;
  }

  // A fragments of this warp's 16 queries.
  uint32_t q[kHd / 16][4];
  const int rows[2] = {warp * 16 + g, warp * 16 + g + 8};
#pragma unroll
  for (int c = 0; c < kHd / 16; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = rows[i % 2], column = c * 16 + i / 2 * 8 + t * 2;
      const int64_t at = (first_query + row) * q_width + head * hd + column;
      q[c][i] = 0;
      if (row < queries && column < hd) {
        if (a.q_half) {
          q[c][i] = *reinterpret_cast<const uint32_t*>(static_cast<const __half*>(a.q) + at);
        } else {
          const float2 v = *reinterpret_cast<const float2*>(static_cast<const float*>(a.q) + at);
          q[c][i] = pack_half2(v.x, v.y);
        }
      }
    }
  __syncthreads();

  float o[kHd / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const int mine[2] = {position[rows[0]], position[rows[1]]},
            my_sequence[2] = {sequence[rows[0]], sequence[rows[1]]};
  const int64_t head_offset = int64_t(head) / (a.heads / a.kv_heads) * hd;

  // One pass for each sequence of the tile: for a prompt there is one.
  for (int query = 0; query < queries;) {
    const int s = sequence[query];
    int next = queries, end = 0, least = INT_MAX;
    for (int i = 0; i < queries; ++i) {
      if (sequence[i] == s) {
        end = max(end, position[i] + 1);
        least = min(least, position[i]);
      } else {
        least = -1;  // rows of others are masked
        bool done = false;
        for (int j = 0; j < i && !done; ++j) done = sequence[j] == sequence[i];
        if (!done && i > query && i < next) next = i;
      }
    }
    const __half* k = static_cast<const __half*>(a.kv.k) + s * a.kv.ctx * width + head_offset;
    const __half* v = static_cast<const __half*>(a.kv.v) + s * a.kv.ctx * width + head_offset;
    const int tiles = (end + kKeys - 1) / kKeys;
    __syncthreads();  // the stages are free
    fetch(stages[0], k, v, width, 0, end, hd);
    for (int i = 0; i < tiles; ++i) {
      copy_wait<0>();
      __syncthreads();
      if (i + 1 < tiles) fetch(stages[(i + 1) % 2], k, v, width, (i + 1) * kKeys, end, hd);
      Stage<kHd>& stage = stages[i % 2];

      float p[kKeys / 8][4] = {};
#pragma unroll
      for (int c = 0; c < kHd / 16; ++c)
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          load_matrices<false>(
              b, shared_address(stage.k.piece(n * 16 + lane / 16 * 8 + lane % 8, c * 2 + lane / 8 % 2)));
          mma_16816(p[2 * n], q[c], b[0], b[1]);
          mma_16816(p[2 * n + 1], q[c], b[2], b[3]);
        }

      if ((i + 1) * kKeys > least + 1)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = i * kKeys + n * 8 + t * 2 + e % 2;
            if (column > mine[e / 2] || my_sequence[e / 2] != s) p[n][e] = -INFINITY;
          }

      float shrink[2], base[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = top[r];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) high = fmaxf(high, fmaxf(p[n][2 * r], p[n][2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        base[r] = (high == -INFINITY ? 0 : high) * scale;  // nothing seen yet
        shrink[r] = exp2f(top[r] * scale - base[r]);
        top[r] = high;
        total[r] *= shrink[r];
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[n][e] = exp2f(p[n][e] * scale - base[e / 2]);
          total[e / 2] += p[n][e];
        }
#pragma unroll
      for (int d = 0; d < kHd / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[d][e] *= shrink[e / 2];

#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        const uint32_t w[4] = {pack_half2(p[2 * n][0], p[2 * n][1]), pack_half2(p[2 * n][2], p[2 * n][3]),
                               pack_half2(p[2 * n + 1][0], p[2 * n + 1][1]),
                               pack_half2(p[2 * n + 1][2], p[2 * n + 1][3])};
#pragma unroll
        for (int d = 0; d < kHd / 16; ++d) {
          uint32_t b[4];
          load_matrices<true>(
              b, shared_address(stage.v.piece(n * 16 + lane / 8 % 2 * 8 + lane % 8, d * 2 + lane / 16)));
          mma_16816(o[2 * d], w, b[0], b[1]);
          mma_16816(o[2 * d + 1], w, b[2], b[3]);
        }
      }
    }
    query = next;
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    if (rows[r] >= queries) continue;
    const int64_t at = (first_query + rows[r]) * q_width + head * hd + t * 2;
    const float inverse = 1 / total[r];
#pragma unroll
    for (int d = 0; d < kHd / 8; ++d) {
      if (d * 8 >= hd) break;
      const float x = o[d][2 * r] * inverse, y = o[d][2 * r + 1] * inverse;
      if (a.y_half)
        *reinterpret_cast<uint32_t*>(static_cast<__half*>(a.y) + at + d * 8) = pack_half2(x, y);
      else
        *reinterpret_cast<float2*>(static_cast<float*>(a.y) + at + d * 8) = make_float2(x, y);
    }
  }
}

}  // namespace

bool attention_prefill_supported(const KvLayer& kv, int64_t head_dim) {
  return kv.type == KvType::kF16 && head_dim <= 128 && head_dim % 8 == 0;
}

void attention_prefill_cuda(const AttentionPrefillArgs& a, cudaStream_t stream) {
  // Its tile is 128 queries: of fewer than 64 half would be idle.
  if (attention_prefill_sm90_supported() && (a.head_dim == 64 || a.head_dim == 128) && a.tokens > 64)
    attention_prefill_sm90_cuda(a, stream);
  else
    attention_prefill_portable_cuda(a, stream);
}

void attention_prefill_portable_cuda(const AttentionPrefillArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return;
  const dim3 grid(unsigned(ceil_div(a.tokens, kQueries)), unsigned(a.heads));
  const float scale = kLog2e / sqrtf(float(a.head_dim));  // the softmax works in base 2
  if (a.head_dim <= 64)
    launch("attention_prefill", attention_prefill_kernel<64>, grid, kThreads, 2 * sizeof(Stage<64>), 1, true,
           stream, a, scale);
  else
    launch("attention_prefill", attention_prefill_kernel<128>, grid, kThreads, 2 * sizeof(Stage<128>), 1,
           true, stream, a, scale);
}

}  // namespace q4s
