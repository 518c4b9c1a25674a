// Attention of a chain's tokens over short contexts, in kernels of its own: a block makes that of a token and
// head alone, past the ring, in fewer steps than linear_decode_attention.cuh takes. Device code.
#pragma once
#include "kernels/linear_decode_ring.cuh"

namespace q4s {

// kRows times eight neighbouring values of a lane, out of packets.
template <int kRows>
struct PacketRows {
  const Packet* from[kRows];
  Packet p[2 * kRows];

  __device__ void ask() {
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) p[i] = load_packet(from[i / 2] + i % 2);
  }
  // All are asked for again until all are there.
  __device__ void await(uint32_t number) {
    for (;;) {
      bool all = true;
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) all = all && p[i].w == number;
      if (__all_sync(0xffffffffu, all)) return;
      ask();
    }
  }
  __device__ void values(int row, float (&v)[8]) const {
    const float4 low = packet_values(p[2 * row]), high = packet_values(p[2 * row + 1]);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
};
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

// from: the product that made q, k and v, whose packets bear number - 1; out: packets of the result, to bear
// `number`. Rows of the cache older than a token's own are those of earlier launches; its own comes as
// packets too. meet: (kDecodeWarps, head_dim + 2) floats of shared memory, free once all warps are here.
// head_dim: a multiple of 8 up to 128.
//
// A run of 8 or 16 lanes has a position at a time, each lane eight columns of it. Short code on purpose: it
// is cold each time.
__device__ inline void linear_decode_attend_short(const LinearDecodeProduct& from, const DecodeHead& place,
                                                  Packet* out, uint32_t number, float* meet, int warp,
                                                  int lane) {
  constexpr int kTile = 2, kAhead = 2 * kTile;  // positions of a run at a time, and with those on their way
  const int dim = from.head_dim, shift = dim > 64 ? 4 : 3, lanes = 1 << shift;
  const int runs = kDecodeWarps * 32 >> shift;
  // Lanes beyond head_dim repeat the first columns, with a q of 0.
  const bool mine = (lane & (lanes - 1)) * 8 < dim;
  const int column = mine ? (lane & (lanes - 1)) * 8 : 0;
  const int first = warp * 32 >> shift, sub = lane >> shift;  // the warp's first run, this lane's among them
  const int position = place.position;
  const bool own = warp == kDecodeWarps - 1;  // has the token's own row
  const auto score = [&](const float(&query)[8], const float(&key)[8]) {
    float s = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) s += query[e] * key[e];
#pragma unroll
    for (int d = 8; d > 0; d /= 2)
      if (d < lanes) s += __shfl_xor_sync(0xffffffffu, s, d);
    return s;
  };
  const Packet* const made = from.y_packets + (place.token * from.n + column) / kPacketValues;
  PacketRows<1> query{{made + place.head * dim / kPacketValues}};
  query.ask();  // before rows of the cache: what comes back to a multiprocessor comes in order

  const int row = from.kv_heads * dim;  // halves from position to position
  const int64_t base = place.sequence * from.kv.ctx * row + place.kv_head * dim + column;
  uint4 keys[kAhead] = {}, values[kAhead] = {};
  const auto load = [&](int j, int at) {
    if (at >= position) return;  // for all of the warp
    const int64_t place = base + int64_t(min(at + sub, position - 1)) * row;
    keys[j] = __ldcg(reinterpret_cast<const uint4*>(static_cast<const __half*>(from.kv.k) + place));
    values[j] = __ldcg(reinterpret_cast<const uint4*>(static_cast<const __half*>(from.kv.v) + place));
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) load(j, first + j * runs);
  float q[8] = {};
  if (own || first < position) {
    query.await(number - 1);
    query.values(0, q);
    const float scale = mine ? rsqrtf(float(dim)) * 1.44269504f : 0.0f;  // exponentials are powers of two
#pragma unroll
    for (float& f : q) f *= scale;
  }
  warps_sync<1, kDecodeWarps * 32>();  // all have done with what was in `meet`

  DecodeSoftmax softmax;
#pragma unroll 1
  for (int at = first; at < position; at += kTile * runs) {
    float scores[kTile], most = softmax.most;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      float key[8];
      halves_to_floats(key, keys[j]);
      scores[j] = score(q, key);
      if (at + j * runs + sub < position) most = fmaxf(most, scores[j]);
    }
    softmax.rescale(most);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      float value[8];
      halves_to_floats(value, values[j]);
      if (at + j * runs + sub < position) softmax.add(scores[j], value);
    }
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      keys[j] = keys[kTile + j], values[j] = values[kTile + j];
      load(kTile + j, at + (kAhead + j) * runs);
    }
  }
  if (own) {
    const Packet* const k = made + (from.heads + place.kv_head) * dim / kPacketValues;
    PacketRows<2> rows{{k, k + row / kPacketValues}};
    rows.ask();
    rows.await(number - 1);
    float key[8], value[8];
    rows.values(0, key), rows.values(1, value);
    const float its = score(q, key);
    softmax.rescale(fmaxf(softmax.most, its));
    if (lane < lanes) softmax.add(its, value);
  }
  for (int apart = 16; apart >= lanes; apart /= 2) softmax.add_lanes(apart);
  const int pitch = dim + 2;  // of a warp: values, largest score, sum
  if (lane < lanes && mine) {
    float2* const to = reinterpret_cast<float2*>(meet + warp * pitch + column);
#pragma unroll
    for (int e = 0; e < 8; e += 2) to[e / 2] = make_float2(softmax.value[e], softmax.value[e + 1]);
    if (lane == 0)
      *reinterpret_cast<float2*>(meet + warp * pitch + dim) = make_float2(softmax.most, softmax.sum);
  }
  warps_sync<1, kDecodeWarps * 32>();

  // A warp adds up eight columns, each of them four lanes, which have four of the warps' sums each.
  if (warp * 8 >= dim) return;
  const int d = warp * 8 + lane / 4;
  const float* const of = meet + lane % 4 * 4 * pitch;
  float2 about[4];
  float most = -1e30f, sum = 0, value = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    about[j] = *reinterpret_cast<const float2*>(of + j * pitch + dim);
    most = fmaxf(most, about[j].x);
  }
#pragma unroll
  for (int x = 2; x > 0; x /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, x));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float weight = exp2f(about[j].x - most);
    sum += weight * about[j].y, value += weight * of[j * pitch + d];
  }
#pragma unroll
  for (int x = 2; x > 0; x /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, x);
    value += __shfl_xor_sync(0xffffffffu, value, x);
  }
  Packet* const to = out + linear_decode_packet_place(place.token, from.heads * dim, place.head * dim + d);
  store_packets<4>(to, __fdividef(value, sum), number, lane, lane % 4 == 0);
}

}  // namespace q4s
