// The warps of linear_decode that add up a tile row and make of the sums what the product's epilogue says:
// residual, silu(gate) * up, or rotation and cache. Device code.
#pragma once
#include "kernels/linear_decode_ring.cuh"
#include "kernels/pdl.cuh"

namespace q4s {

// Rows r and r + 8 of a tile row for one token. load() gets what the epilogue needs long before the sums are
// there: residual; or cos, sin and the place in the cache.
struct DecodeOutput {
  float low = 0, high = 0;
  int64_t cache = 0;

  __device__ void load(const LinearDecodeProduct& a, int tile_row, int r, int token) {
    const int row = tile_row * kQ4TileRows + r;
    if (a.epilogue == Epilogue::kNone && a.residual) {
      const float* from = a.residual + int64_t(token) * a.n;
      if (row < a.n) low = __ldcg(from + row);
      if (row + 8 < a.n) high = __ldcg(from + row + 8);
    } else if (a.epilogue == Epilogue::kRopeKv) {
      const int position = __ldcg(a.position + token);
      cache = __ldcg(a.sequence + token) * a.kv.ctx + position;
      if (row >= (a.heads + a.kv_heads) * a.head_dim) return;
      const int i = row % a.head_dim / 16 * 8 + r;
      const float2 turn = *reinterpret_cast<const float2*>(a.table + int64_t(position) * a.head_dim + 2 * i);
      low = turn.x;
      high = turn.y;
    }
  }

  // For all lanes of a warp, with the same sums and token in the four lanes of an r where `single`; `mine`:
  // this lane's are there, and its to store.
  __device__ void finish(const LinearDecodeProduct& a, int tile_row, int r, int token, float u, float v,
                         uint32_t number, bool mine) const {
    const int row = tile_row * kQ4TileRows + r, lane = int(threadIdx.x) % 32;
    // Value of row r of eight neighbours.
    const auto send = [&](int place, float value, bool is) {
      if (a.y_packets) store_packets<4>(a.y_packets + place, value, number, lane, is);
    };
    if (a.epilogue == Epilogue::kNone) {
      const bool first = mine && row < a.n, second = mine && row + 8 < a.n;
      const int64_t at = int64_t(token) * a.n + row;
      if (first) a.y[at] = u + low;
      if (second) a.y[at + 8] = v + high;
      send(linear_decode_packet_place(token, a.n, row), u + low, first);
      send(linear_decode_packet_place(token, a.n, row + 8), v + high, second);
    } else if (a.epilogue == Epilogue::kSwiglu) {
      const int hidden = a.n / 2, i = tile_row * 8 + r;
      const float product = __fdividef(u, 1 + __expf(-u)) * v;
      const bool is = mine && i < hidden;
      if (is) a.y[int64_t(token) * hidden + i] = product;
      send(linear_decode_packet_place(token, hidden, i), product, is);
    } else {
      const int q_rows = a.heads * a.head_dim, k_rows = a.kv_heads * a.head_dim;
      int at = row, step = 8;  // rows of the file: at, at + step
      float x = u, y = v;
      if (row < q_rows + k_rows) {
        step = a.head_dim / 2;
        at = row / a.head_dim * a.head_dim + row % a.head_dim / 16 * 8 + r;
        x = u * low - v * high;
        y = u * high + v * low;
      }
      if (row >= q_rows)
        store_row(a, at - q_rows, step, k_rows, mine, x, y);
      else if (mine) {
        a.y[int64_t(token) * q_rows + at] = x;
        a.y[int64_t(token) * q_rows + at + step] = y;
      }
      send((token * a.n + at) / kPacketValues, x, mine);
      send((token * a.n + at + step) / kPacketValues, y, mine);
    }
  }

 private:
  // Rows `at` and at + step of k and v to the cache; x, y: what is read there.
  __device__ void store_row(const LinearDecodeProduct& a, int at, int step, int k_rows, bool mine, float& x,
                            float& y) const {
    const bool is_k = at < k_rows;
    void* const to = is_k ? a.kv.k : a.kv.v;
    const int64_t place = cache * k_rows + at - (is_k ? 0 : k_rows);
    if (a.kv.type == KvType::kF16) {
      const __half stored = __float2half_rn(x), second = __float2half_rn(y);
      x = __half2float(stored), y = __half2float(second);
      if (!mine) return;
      static_cast<__half*>(to)[place] = stored;
      static_cast<__half*>(to)[place + step] = second;
    } else if (mine) {
      static_cast<float*>(to)[place] = x;
      static_cast<float*>(to)[place + step] = y;
    }
  }
};

// Where in shared memory the sums meet.
struct DecodeSumPlaces {
  float *partial, *sums,
      *norm;             // (kDecodeMeetings, kDecodeWarps, T, 16); (rows, T, 16); (T) of a reducer
  const float* squares;  // (units, T)
};

// Sum of squares of x of token lane % kTokens, over units [begin, end), for all lanes of a warp.
template <int kTokens>
__device__ inline float linear_decode_squares(const float* squares, int begin, int end, int tokens,
                                              int lane) {
  const int token = min(lane % kTokens, tokens - 1);
  float sum = 0;
  for (int u = begin + lane / kTokens; u < end; u += 32 / kTokens) sum += squares[u * tokens + token];
#pragma unroll
  for (int d = kTokens; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  return sum;
}

// Warp `j` of the reducers: rows j, j + kDecodeReducers ... of a block's tile rows. A lane adds the sums of
// one token, four lanes those of the only one; in the same order.
template <int kTokens, class Params>
__device__ void linear_decode_reduce(const Params& p, const LinearDecodeRing& ring, const DecodeSumPlaces& at,
                                     uint32_t first, int j, int lane) {
  const int r = lane / 4, part = lane % 4, tokens = p.tokens;
  const bool single = tokens == 1;
  const int mine = single ? 0 : part;  // first token of this lane
  static_assert(kDecodeMeetings == kDecodeReducers, "reducer j has the rows of meeting j");
  uint32_t parity = 0;  // of the meeting
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const LinearDecodeProduct& a = p.product[i];
    const LinearDecodePart& cut = a.part;
    const LinearDecodeRows<false> rows(cut, i);
#pragma unroll 1
    for (int phase = 0; phase < cut.phases; ++phase) {
      const bool last = phase == cut.phases - 1;
      const int slots = min(kDecodeWarps, cut.piece_begin(phase + 1) - cut.piece_begin(phase));
      bool norm = a.gain && last;  // still to be made
      if (rows.rows > 0) {
        // One that has no row must not be ahead of the others, and arrive twice.
        warps_sync<4, kDecodeReducers * 32>();
        warps_arrive<kDecodeDone, kDecodeReaders>();
      }
#pragma unroll 1
      for (int row = j; row < rows.rows; row += kDecodeReducers) {
        const float* partial = at.partial + j * kDecodeWarps * tokens * kQ4TileRows;
        DecodeOutput output[kTokens / 4];
        if (last)
#pragma unroll
          for (int t = 0; t < kTokens / 4; ++t)
            if (mine + 4 * t < tokens && !(single && part))
              output[t].load(a, rows.tile_row(row), r, mine + 4 * t);
        __syncwarp();
        mbarrier_wait(ring.sums_full(j), parity);
        parity ^= 1;
        if (norm) {
          norm = false;
          const float square = linear_decode_squares<kTokens>(at.squares, 0, cut.units, tokens, lane);
          if (lane < tokens) at.norm[lane] = rsqrtf(square * a.inverse_k + a.eps);
          __syncwarp();
        }
#pragma unroll
        for (int t = 0; t < kTokens / 4; ++t) {
          const int token = mine + 4 * t;
          float low = 0, high = 0;
          if (single) {
            for (int s = part; s < slots; s += 4) {
              low += partial[s * kQ4TileRows + r];
              high += partial[s * kQ4TileRows + r + 8];
            }
#pragma unroll
            for (int d = 1; d < 4; d *= 2) {
              low += __shfl_xor_sync(0xffffffffu, low, d);
              high += __shfl_xor_sync(0xffffffffu, high, d);
            }
          } else if (token < tokens) {
            float lows[4] = {}, highs[4] = {};
#pragma unroll
            for (int s = 0; s < kDecodeWarps; ++s)
              if (s < slots) {
                lows[s % 4] += partial[s * tokens * kQ4TileRows + linear_decode_sum_at(token, r)];
                highs[s % 4] += partial[s * tokens * kQ4TileRows + linear_decode_sum_at(token, r + 8)];
              }
            low = (lows[0] + lows[1]) + (lows[2] + lows[3]);
            high = (highs[0] + highs[1]) + (highs[2] + highs[3]);
          }
          const bool is = token < tokens && !(single && part);
          if (is && phase > 0) {
            const float* earlier = at.sums + (row * tokens + token) * kQ4TileRows + r;
            low += earlier[0], high += earlier[8];
          }
          if (!last) {
            float* sums = at.sums + (row * tokens + token) * kQ4TileRows + r;
            if (is) sums[0] = low, sums[8] = high;
            continue;
          }
          const float scale = a.gain ? at.norm[min(token, tokens - 1)] : 1.0f;
          output[t].finish(a, rows.tile_row(row), r, token, low * scale, high * scale, first + uint32_t(i),
                           is);
        }
        mbarrier_arrive(ring.sums_empty(j));
      }
    }
    if (i + 2 == p.count) pdl_trigger();
  }
}

}  // namespace q4s
