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

  __device__ void load(const LinearDecodeProduct& a, int tile_row, int r, int token, uint32_t first) {
    const int row = tile_row * kQ4TileRows + r;
    if (a.epilogue == Epilogue::kNone && a.residual_packets) {
      const uint64_t* from = a.residual_packets + int64_t(token) * a.n;
      const uint32_t number = first + uint32_t(a.residual_from);
      if (row < a.n) low = wait_packet(from + row, number);
      if (row + 8 < a.n) high = wait_packet(from + row + 8, number);
    } else if (a.epilogue == Epilogue::kNone && a.residual) {
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

  __device__ void finish(const LinearDecodeProduct& a, int tile_row, int r, int token, float u, float v,
                         uint32_t number) const {
    const int row = tile_row * kQ4TileRows + r;
    const auto put = [&](int64_t at, float value) {
      a.y[at] = value;
      if (a.y_packets) store_packet(a.y_packets + at, value, number);
    };
    if (a.epilogue == Epilogue::kNone) {
      const int64_t at = int64_t(token) * a.n + row;
      if (row < a.n) put(at, u + low);
      if (row + 8 < a.n) put(at + 8, v + high);
    } else if (a.epilogue == Epilogue::kSwiglu) {
      const int hidden = a.n / 2, i = tile_row * 8 + r;
      const float product = __fdividef(u, 1 + __expf(-u)) * v;
      if (i < hidden) put(int64_t(token) * hidden + i, product);
    } else {
      rotate_and_store(a, row, r, token, u, v, number);
    }
  }

 private:
  __device__ void rotate_and_store(const LinearDecodeProduct& a, int row, int r, int token, float u, float v,
                                   uint32_t number) const {
    const int q_rows = a.heads * a.head_dim, k_rows = a.kv_heads * a.head_dim;
    int first = row, step = 8;  // rows of the file: first, first + step
    float x = u, y = v;
    if (row < q_rows + k_rows) {
      step = a.head_dim / 2;
      first = row / a.head_dim * a.head_dim + row % a.head_dim / 16 * 8 + r;
      x = u * low - v * high;
      y = u * high + v * low;
    }
    const auto put = [&](float at_first, float at_second) {
      if (!a.y_packets) return;
      uint64_t* const to = a.y_packets + token * a.n + first;  // q, k and v of a token
      store_packet(to, at_first, number);
      store_packet(to + step, at_second, number);
    };
    if (row < q_rows) {
      put(x, y);
      a.y[int64_t(token) * q_rows + first] = x;
      a.y[int64_t(token) * q_rows + first + step] = y;
      return;
    }
    const bool is_k = row < q_rows + k_rows;
    void* to = is_k ? a.kv.k : a.kv.v;
    const int64_t at = cache * k_rows + first - q_rows - (is_k ? 0 : k_rows);
    if (a.kv.type == KvType::kF16) {
      const __half stored = __float2half_rn(x), second = __float2half_rn(y);
      put(__half2float(stored), __half2float(second));
      static_cast<__half*>(to)[at] = stored;
      static_cast<__half*>(to)[at + step] = second;
    } else {
      static_cast<float*>(to)[at] = x;
      static_cast<float*>(to)[at + step] = y;
    }
  }
};

// Where in shared memory the sums meet.
struct DecodeSumPlaces {
  float *partial, *sums,
      *norm;             // (kDecodeMeetings, kDecodeWarps, T, 16); (rows, T, 16); (T) of a reducer
  const float* squares;  // (units, T)
};

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
    const LinearDecodeRows rows(cut, i);
#pragma unroll 1
    for (int phase = 0; phase < cut.phases; ++phase) {
      const bool last = phase == cut.phases - 1;
      const int slots = min(kDecodeWarps, cut.phase_begin(phase + 1) - cut.phase_begin(phase));
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
              output[t].load(a, rows.tile_row(row), r, mine + 4 * t, first);
        __syncwarp();
        mbarrier_wait(ring.sums_full(j), parity);
        parity ^= 1;
        if (norm) {
          norm = false;
#pragma unroll 1
          for (int t = 0; t < tokens; ++t) {
            float square = 0;
            for (int u = lane; u < cut.units; u += 32) square += at.squares[u * tokens + t];
            for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
            if (lane == 0) at.norm[t] = rsqrtf(square * a.inverse_k + a.eps);
          }
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
                lows[s % 4] += partial[(s * tokens + token) * kQ4TileRows + r];
                highs[s % 4] += partial[(s * tokens + token) * kQ4TileRows + r + 8];
              }
            low = (lows[0] + lows[1]) + (lows[2] + lows[3]);
            high = (highs[0] + highs[1]) + (highs[2] + highs[3]);
          }
          if (token >= tokens || (single && part)) continue;
          float* earlier = at.sums + (row * tokens + token) * kQ4TileRows + r;
          if (phase > 0) low += earlier[0], high += earlier[8];
          if (!last) {
            earlier[0] = low, earlier[8] = high;
            continue;
          }
          const float scale = a.gain ? at.norm[token] : 1.0f;
          output[t].finish(a, rows.tile_row(row), r, token, low * scale, high * scale, first + uint32_t(i));
        }
        mbarrier_arrive(ring.sums_empty(j));
      }
    }
    if (i + 2 == p.count) pdl_trigger();
  }
}

}  // namespace q4s
