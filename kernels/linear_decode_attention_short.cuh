// Attention of a chain's tokens over short contexts, in kernels of its own: a block makes that of a token and
// head alone, past the ring, in fewer steps than linear_decode_attention.cuh takes. Device code.
#pragma once
#include "kernels/linear_decode_ring.cuh"

namespace q4s {

// kRows times eight neighbouring values out of packets, all asked for again until all are there.
template <int kRows>
__device__ inline void wait_packets(float (&v)[kRows][8], const Packet* const (&from)[kRows],
                                    uint32_t number) {
  Packet p[2 * kRows];
  bool all;
  do {
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) p[i] = load_packet(from[i / 2] + i % 2);
    all = true;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) all = all && p[i].w == number;
  } while (!all);
#pragma unroll
  for (int i = 0; i < 2 * kRows; ++i) {
    const float4 four = packet_values(p[i]);
    float* const to = &v[i / 2][i % 2 * 4];
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}
__device__ inline void halves_to_floats(float (&v)[8], const uint4& h) {
  const __half2* two = reinterpret_cast<const __half2*>(&h);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __half22float2(two[i]);
    v[2 * i] = f.x, v[2 * i + 1] = f.y;
  }
}

// Softmax on the way (Milakov, Gimelshein 2018) of the positions that some lanes have seen: the largest
// score, the sum of exponentials below it, and the sum of their values' eight columns of this lane.
struct DecodeSoftmax {
  float most = -1e30f, sum = 0, value[8] = {};

  __device__ void rescale(float to) {
    const float by = exp2f(most - to);
    most = to, sum *= by;
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] *= by;
  }
  __device__ void add(float score, const float (&v)[8]) {  // score no larger than `most`
    const float weight = exp2f(score - most);
    sum += weight;
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += weight * v[e];
  }
  __device__ void add_lanes(int apart) {
    rescale(fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart)));
    sum += __shfl_xor_sync(0xffffffffu, sum, apart);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] += __shfl_xor_sync(0xffffffffu, value[e], apart);
  }
};

// Whose attention a block makes.
struct DecodeHead {
  int token, head, kv_head;
  int position, sequence;  // of the token

  // A block has one alone: its round, as DecodePlace takes it, is 0.
  __device__ DecodeHead(const LinearDecodeAttention& a, int)
      : token(a.block() / (a.kv_heads * a.queries)),
        head(a.block() % (a.kv_heads * a.queries)),
        kv_head(head / a.queries),
        position(__ldcg(a.position + token)),
        sequence(__ldcg(a.sequence + token)) {}
};

// Where a lane finds the cache. A run of 8 or 16 lanes has a position at a time, each lane eight columns of
// it; warp 0 has none of the cache.
struct DecodeCache {
  const __half *k, *v;  // row 0, this lane's columns
  int lanes, runs;      // of a run; runs in a block
  int first, sub;       // the warp's first run, this lane's among its runs
  int column, row;      // halves from position to position
  bool mine;            // this lane has columns

  __device__ DecodeCache(const LinearDecodeProduct& from, const DecodeHead& place, int warp, int lane) {
    const int dim = from.head_dim, shift = dim > 64 ? 4 : 3;
    lanes = 1 << shift, runs = (kDecodeWarps - 1) * 32 >> shift;
    first = (warp - 1) * 32 >> shift, sub = lane >> shift;
    column = (lane & (lanes - 1)) * 8, row = from.kv_heads * dim, mine = column < dim;
    const int64_t at = place.sequence * from.kv.ctx * row + place.kv_head * dim + (mine ? column : 0);
    k = static_cast<const __half*>(from.kv.k) + at, v = static_cast<const __half*>(from.kv.v) + at;
  }
};

// Rows of the cache on their way to L2, long before they are asked for.
__device__ inline void linear_decode_prefetch_short(const LinearDecodeProduct& from, const DecodeHead& place,
                                                    int warp, int lane) {
  const DecodeCache c(from, place, warp, lane);
  if (warp == 0 || c.column % 64 != 0 || !c.mine) return;
#pragma unroll 1
  for (int at = c.first + c.sub; at < place.position; at += c.runs) {
    prefetch_l2(c.k + int64_t(at) * c.row);
    prefetch_l2(c.v + int64_t(at) * c.row);
  }
}

// from: the product that made q, k and v, whose packets bear number - 1; out: packets of the result, to bear
// `number`. Rows of the cache older than a token's own are those of earlier launches; its own comes as
// packets too. meet: (kDecodeWarps, head_dim + 2) floats of shared memory, free once all warps are here.
// head_dim: a multiple of 8 up to 128.
//
// Short code on purpose: it is cold each time.
__device__ inline void linear_decode_attend_short(const LinearDecodeProduct& from, const DecodeHead& place,
                                                  Packet* out, uint32_t number, float* meet, int warp,
                                                  int lane) {
  constexpr int kTile = 2, kAhead = 2 * kTile;  // positions of a run at a time, and with those on their way
  const DecodeCache c(from, place, warp, lane);
  const int dim = from.head_dim, position = place.position;
  const bool mine = c.mine;
  const float scale = rsqrtf(float(dim)) * 1.44269504f;  // exponentials are powers of two
  const auto score = [&](const float(&query)[8], const float(&key)[8]) {
    float s = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) s += query[e] * key[e];
#pragma unroll
    for (int d = 8; d > 0; d /= 2)
      if (d < c.lanes) s += __shfl_xor_sync(0xffffffffu, s, d);
    return s * scale;
  };
  const Packet* const made = from.y_packets + (place.token * from.n + c.column) / kPacketValues;
  const Packet* const q_from = made + place.head * dim / kPacketValues;

  DecodeSoftmax softmax;
  if (warp == 0) {  // the token's own row
    float rows[3][8] = {};
    const Packet* const own = made + (from.heads + place.kv_head) * dim / kPacketValues;
    if (mine) wait_packets(rows, {q_from, own, own + c.row / kPacketValues}, number - 1);
    softmax.most = score(rows[0], rows[1]);
    softmax.add(softmax.most, rows[2]);
  } else if (c.first < position) {
    uint4 keys[kAhead] = {}, values[kAhead] = {};
    const auto load = [&](int j, int at) {
      if (at >= position) return;  // for all of the warp
      const int64_t row = int64_t(min(at + c.sub, position - 1)) * c.row;
      keys[j] = __ldcg(reinterpret_cast<const uint4*>(c.k + row));
      values[j] = __ldcg(reinterpret_cast<const uint4*>(c.v + row));
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load(j, c.first + j * c.runs);
    float q[1][8] = {};
    if (mine) wait_packets(q, {q_from}, number - 1);
    __syncwarp();
#pragma unroll 1
    for (int at = c.first; at < position; at += kTile * c.runs) {
      float scores[kTile], most = softmax.most;
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        float key[8];
        halves_to_floats(key, keys[j]);
        scores[j] = score(q[0], key);
        if (at + j * c.runs + c.sub < position) most = fmaxf(most, scores[j]);
      }
      softmax.rescale(most);
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        float value[8];
        halves_to_floats(value, values[j]);
        if (at + j * c.runs + c.sub < position) softmax.add(scores[j], value);
      }
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        keys[j] = keys[kTile + j], values[j] = values[kTile + j];
        load(kTile + j, at + (kAhead + j) * c.runs);
      }
    }
    for (int apart = 16; apart >= c.lanes; apart /= 2) softmax.add_lanes(apart);
  }

  warps_sync<1, kDecodeWarps * 32>();  // all have done with what was in this memory
  const int pitch = dim + 2;
  if (lane < c.lanes && mine) {
#pragma unroll
    for (int e = 0; e < 8; ++e) meet[warp * pitch + c.column + e] = softmax.value[e];
    if (lane == 0) meet[warp * pitch + dim] = softmax.most, meet[warp * pitch + dim + 1] = softmax.sum;
  }
  warps_sync<1, kDecodeWarps * 32>();
  if (warp * 32 >= dim) return;
  // Lanes w and w + 16 weigh what warp w found.
  const float found = meet[lane % kDecodeWarps * pitch + dim];
  float most = found;
  for (int d = 8; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, d));
  const float weight = exp2f(found - most);
  float sum = weight * meet[lane % kDecodeWarps * pitch + dim + 1];
  for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  const int d = warp * 32 + lane;
  float value = 0;
#pragma unroll 4
  for (int w = 0; w < kDecodeWarps; ++w)
    value += __shfl_sync(0xffffffffu, weight, w) * meet[w * pitch + min(d, dim - 1)];
  Packet* const to = out + linear_decode_packet_place(place.token, from.heads * dim, place.head * dim + d);
  store_packets<1>(to, value / sum, number, lane, d < dim);
}

}  // namespace q4s
