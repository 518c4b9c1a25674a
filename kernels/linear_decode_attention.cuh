// Attention of a chain's tokens, between the product that makes q, k and v and the one that takes its result.
// Blocks share out the cache, which comes through their rings of weights, long before q is there. Device
// code.
//
// Warps take tiles of 16 positions in turn, each with an online softmax of its own (Milakov, Gimelshein
// 2018). Both products run on mma.m16n8k16, with four query heads of a kv head as columns twice: q and the
// weights P are sums of two fp16 numbers each.
//   S^T (16 positions, 8) = K (16, hd) Q^T       K by ldmatrix
//   O^T (hd, 8)           = V^T (hd, 16) P^T     V by a transposing ldmatrix, P^T by movmatrix from S^T
// The warps' sums meet in shared memory, those of blocks that share a cache as packets, of which each block
// adds some columns.
#pragma once
#include "kernels/linear_decode_ring.cuh"

namespace q4s {

// The warps that multiply, through the attention of a layer. Short code: it is cold each time.
template <class Params>
class DecodeAttention {
 public:
  // product: that takes the result; the one before it made q, k and v. shared: a LinearDecodeMeeting, free
  // once all warps are here. first: number of the chain's first product.
  __device__ DecodeAttention(const Params& params, int product, const DecodePlace& place, uint8_t* shared,
                             uint32_t first, int warp)
      : p(params),
        place_(place),
        shared_(shared),
        product_(product),
        warp_(warp),
        first_(first),
        dim_(params.attention.head_dim),
        queries_(params.attention.queries) {}

  __device__ void run(LinearDecodeRing& ring) const {
    warps_sync<1, kDecodeWarps * 32>();
    stage_queries();
    warps_sync<1, kDecodeWarps * 32>();
    attend(ring);
    warps_sync<1, kDecodeWarps * 32>();
    meet();
    if (place_.parts > 1) add_parts();
  }

 private:
  static constexpr int kSteps = 8;        // of 16 dims
  static constexpr float kNone = -1e30f;  // below all scores

  __device__ uint32_t number() const { return first_ + uint32_t(product_); }  // of the packets of the result
  // The first part has the token's own row as well.
  __device__ bool own() const { return place_.part == 0; }

  // What two halves lack of the values that they were rounded from.
  __device__ static uint32_t pack_rest(float low, float high, uint32_t halves) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    return pack_half2(low - f.x, high - f.y);
  }

  // q, scaled for exponentials that are powers of two, and the own row of K and V, from packets: one a lane.
  __device__ void stage_queries() const {
    const LinearDecodeMeeting& meeting = p.attention.meeting;
    const LinearDecodeProduct& from = p.product[product_ - 1];
    const int kv_heads = p.attention.kv_heads, shift = meeting.shift - 2;
    const int i = warp_ * 32 + lane_again(), h = i >> shift, d = (i & ((1 << shift) - 1)) * kPacketValues;
    const int of_own = h - queries_;  // 0: K, 1: V
    static_assert((kDecodeQueries + 2) * 128 / kPacketValues <= kDecodeWarps * 32, "all at once");
    if (h >= queries_ + (own() ? 2 : 0)) return;
    float4 f = make_float4(0, 0, 0, 0);
    if (d < dim_) {
      const int row =
          of_own < 0 ? place_.kv_head * queries_ + h : kv_heads * (queries_ + of_own) + place_.kv_head;
      const Packet* const at = from.y_packets + (place_.token * from.n + row * dim_ + d) / kPacketValues;
      Packet packet;
      do packet = load_packet(at);
      while (packet.w != number() - 1);
      const float by = of_own < 0 ? rsqrtf(float(dim_)) * 1.44269504f : 1.0f;
      f = packet_values(packet);
      f = make_float4(f.x * by, f.y * by, f.z * by, f.w * by);
    }
    const int row = (h & ~(kDecodeOperand - 1)) + h;
    uint8_t* const to =
        shared_ + d * 2 + (of_own < 0 ? row * meeting.pitch : meeting.own + of_own * meeting.pitch);
    const uint2 halves = make_uint2(pack_half2(f.x, f.y), pack_half2(f.z, f.w));
    *reinterpret_cast<uint2*>(to) = halves;
    if (of_own < 0)
      *reinterpret_cast<uint2*>(to + kDecodeOperand * meeting.pitch) =
          make_uint2(pack_rest(f.x, f.y, halves.x), pack_rest(f.z, f.w, halves.y));
  }

  // Which operand a warp has, and which warp with this operand it is.
  __device__ int operand() const { return warp_ & (p.attention.meeting.operands - 1); }
  __device__ int nth() const { return warp_ >> (p.attention.meeting.operands - 1); }

  // This warp's tiles, and its sums to where all meet.
  __device__ void attend(LinearDecodeRing& ring) const {
    const LinearDecodeBox& box = p.attention.box;
    const int warps = p.config.attend_warps;
    // Of the columns 2t and 2t + 1; of values dims 16c + g and that + 8.
    float most[2] = {kNone, kNone}, sum[2] = {}, value[kSteps][4] = {};
    // The own row is tile -1, of a warp with few others: all rows of its matrices are the same, of which one
    // counts.
    int mine = nth();
    if (own() && mine == min(place_.stages * box.tiles, warps - 1))
      mine = -1;
    else if (mine >= warps)
      mine = 1 << 30;
#pragma unroll 1
    for (int s = mine < 0 ? -1 : 0; s < *const_cast<const volatile int*>(&place_.stages); ++s) {
      if (s >= 0) ring.wait_full();
#pragma unroll 1
      while (mine < (s + 1) * box.tiles) {
        add_tile(s, mine - s * box.tiles, ring.stage(), most, sum, value);
        mine = mine < 0 ? nth() : mine + warps;
      }
      if (s < 0) continue;
      mbarrier_arrive(ring.empty());
      ring.next();
    }
    hand_in(most, sum, value);
  }

  // Tile `row` of the part's stage `nth`, which is at `stage`; nth < 0: the own row. Matrices go beyond
  // head_dim, to other rows of this cache, or sums that nobody takes: q is 0 there, and no value is stored.
  __device__ void add_tile(int nth, int row, uint32_t stage, float (&most)[2], float (&sum)[2],
                           float (&value)[kSteps][4]) const {
    const LinearDecodeMeeting& meeting = p.attention.meeting;
    const LinearDecodeBox& box = p.attention.box;
    const int lane = lane_again();
    // Addresses that this lane gives for the first matrices; whether its positions count.
    const int head = min(lane & 3, min(queries_ - operand() * kDecodeOperand, kDecodeOperand) - 1);
    const uint32_t q = shared_address(shared_) +
                       (operand() * 2 * kDecodeOperand + (lane & 4) + head) * meeting.pitch +
                       (lane >> 3) * 16;
    uint32_t k = shared_address(shared_ + meeting.own), v = k + meeting.pitch;
    bool low = lane < 4, high = false;
    if (nth >= 0) {
      const int first = place_.begin + nth * box.positions() + row;
      if (first >= place_.end) return;
      const int position = first + (lane >> 2) * 2 * box.tiles;
      low = position < place_.end, high = position + box.tiles < place_.end;
      stage += row * 2 * dim_ + (lane & 7) * box.region;
      k = stage + (lane >> 3 & 1) * box.half, v = stage + (2 + (lane >> 4)) * box.half;
    }
    k += (lane >> 4) * 16, v += (lane >> 3 & 1) * 16;
    float s[2][4] = {};  // two chains, for latency
#pragma unroll
    for (int c = 0; c < kSteps; c += 2) {
      if (c == kSteps / 2 && dim_ <= kSteps / 2 * 16) break;
      uint32_t a[2][4], b[4];
      load_matrices<false>(b, q + 32 * c);
      load_matrices<false>(a[0], k + 32 * c);
      load_matrices<false>(a[1], k + 32 * c + 32);
      mma_16816(s[0], a[0], b[0], b[1]);
      mma_16816(s[1], a[1], b[2], b[3]);
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = s[0][h] + s[1][h], y = s[0][h + 2] + s[1][h + 2];
      x += __shfl_xor_sync(0xffffffffu, x, 2);  // the other part of q
      y += __shfl_xor_sync(0xffffffffu, y, 2);
      x = low ? x : -INFINITY, y = high ? y : -INFINITY;
      float top = fmaxf(x, y);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
      top = fmaxf(top, most[h]);
      shrink[h] = exp2f(most[h] - top);
      most[h] = top;
      s[0][h] = exp2f(x - top), s[0][h + 2] = exp2f(y - top);
      sum[h] = sum[h] * shrink[h] + (s[0][h] + s[0][h + 2]);
    }
    uint32_t weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weights[i] = pack_half2(s[0][2 * i], s[0][2 * i + 1]);
      const uint32_t rest = pack_rest(s[0][2 * i], s[0][2 * i + 1], weights[i]);
      weights[i] = transpose_8x8(lane_again() & 2 ? rest : weights[i]);
    }
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      if (c == kSteps / 2 && dim_ <= kSteps / 2 * 16) break;
      uint32_t a[4];
      load_matrices<true>(a, v + 32 * c);
      value[c][0] *= shrink[0], value[c][1] *= shrink[1], value[c][2] *= shrink[0], value[c][3] *= shrink[1];
      mma_16816(value[c], a, weights[0], weights[1]);
    }
    bulk_fence();
  }

  // Of a warp and head: head_dim values, largest score, sum of weights.
  __device__ float* sums(int warp, int head) const {
    const LinearDecodeMeeting& meeting = p.attention.meeting;
    return reinterpret_cast<float*>(shared_ + meeting.sums +
                                    (warp * meeting.heads + head) * meeting.sums_pitch);
  }
  __device__ void hand_in(const float (&most)[2], float (&sum)[2], float (&value)[kSteps][4]) const {
    const int lane = lane_again(), g = lane >> 2, t = lane & 3;
    const bool there = nth() < p.config.attend_warps;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h >= queries_) break;
      float* const to = sums(warp_, 2 * t + h) + g;
      const bool mine = there && 2 * t + h < p.attention.meeting.heads;
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], d);
      if (mine && g == 0) to[dim_] = most[h], to[dim_ + 1] = sum[h];
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
        if (c * 16 >= dim_) break;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          value[c][h + i] +=
              __shfl_xor_sync(0xffffffffu, value[c][h + i], 2);  // the other part of the weights
          if (mine) to[16 * c + 4 * i] = value[c][h + i];
        }
      }
    }
  }

  // Packets of a part for each query head: head_dim values; largest score and sum of weights.
  __device__ Packet* part_packets(int part, int head) const {
    return p.attention.parts + (place_.pair * p.attention.sharers + part) * kLinearDecodeAttendPackets +
           head * (dim_ / kPacketValues + 1);
  }
  __device__ Packet* result(int head, int d) const {
    const LinearDecodeProduct& to = p.product[product_];
    return const_cast<Packet*>(to.x_packets) +
           linear_decode_packet_place(place_.token, to.k, (place_.kv_head * queries_ + head) * dim_ + d);
  }

  // Adds what the warps found that had tiles, a warp 32 columns at a time.
  __device__ void meet() const {
    const LinearDecodeMeeting& meeting = p.attention.meeting;
    const int lane = lane_again(), shift = meeting.shift - 5, nth = lane & (kDecodeWarps - 1);
    const int found = min(p.config.attend_warps, place_.stages * p.attention.box.tiles + own());
#pragma unroll 1
    for (int task = warp_; task < queries_ << shift; task += kDecodeWarps) {
      const int h = task >> shift, d = (task & ((1 << shift) - 1)) * 32 + lane;
      const int step = meeting.operands * meeting.heads * meeting.sums_pitch / 4;
      const float* const of = sums(h / kDecodeOperand, h % kDecodeOperand);
      const bool one = nth < found;
      const float* const about = of + nth * step + dim_;
      const float its = one ? about[0] : kNone;
      float most = its;
#pragma unroll
      for (int x = 8; x > 0; x /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, x));
      most = packet_round(most);
      const float weight = exp2f(its - most);
      float sum = one ? weight * about[1] : 0, value = 0;
#pragma unroll
      for (int x = 8; x > 0; x /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, x);
#pragma unroll 4
      for (int w = 0; w < found; ++w)
        value += __shfl_sync(0xffffffffu, weight, w) * of[w * step + min(d, dim_ - 1)];
      const bool alone = place_.parts == 1;
      Packet* const part = part_packets(place_.part, h);
      store_packets<1>(alone ? result(h, d) : part + d / kPacketValues,
                       alone ? __fdividef(value, sum) : value, number(), lane, d < dim_);
      if (!alone && d == 0) store_packet(part + dim_ / kPacketValues, {most, sum, 0, 0}, number());
    }
  }

  // Adds what the blocks found that share this cache: of every so many-th eight columns. Lanes i and 16 + i
  // have four columns each of part i.
  __device__ void add_parts() const {
    const int lane = lane_again(), parts = place_.parts, shift = p.attention.meeting.shift - 3;
    const int part = min(lane & 15, parts - 1);
    static_assert(kDecodeSharers == 16, "lanes for the parts");
#pragma unroll 1
    for (int block = place_.part + warp_ * parts; block < queries_ << shift; block += kDecodeWarps * parts) {
      const int h = block >> shift, first = (block & ((1 << shift) - 1)) * 8;
      // A condition without the lane in it: else the compiler loses sight of the warp's being together, here
      // and in all that follows, and the loops of the products take an eighth more instructions.
      if (first >= dim_) continue;
      const int d = first + (lane >> 4) * kPacketValues;
      const Packet* const from = part_packets(part, h);
      Packet about, values;
      do about = load_packet(from + dim_ / kPacketValues), values = load_packet(from + d / kPacketValues);
      while (!__all_sync(0xffffffffu, about.w == number() && values.w == number()));
      const float4 its = packet_values(about), v = packet_values(values);
      const float top = (lane & 15) < parts ? its.x : kNone;
      float most = top;
#pragma unroll
      for (int x = 8; x > 0; x /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, x));
      const float weight = exp2f(top - most);  // parts that do not exist weigh nothing
      float sums[5] = {v.x * weight, v.y * weight, v.z * weight, v.w * weight, its.y * weight};
#pragma unroll
      for (float& sum : sums)
#pragma unroll
        for (int x = 8; x > 0; x /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, x);
      const float by = __fdividef(1.0f, sums[4]);
      if ((lane & 15) == 0)
        store_packet(result(h, d), {sums[0] * by, sums[1] * by, sums[2] * by, sums[3] * by}, number());
    }
  }

  const Params& p;
  const DecodePlace& place_;
  uint8_t* shared_;
  int product_, warp_;
  uint32_t first_;
  int dim_, queries_;
};

}  // namespace q4s
