// What a block of linear_decode works on, and the ring of shared memory through which its weights come.
// Device code.
#pragma once
#include "kernels/linear_decode.h"
#include "kernels/linear_decode_config.h"
#include "kernels/linear_decode_packet.cuh"
#include "kernels/pdl.cuh"
#include "kernels/shared_halves.cuh"

namespace q4s {

// A barrier where the reducers say, before each phase of a product, that they have done with all before it;
// and the threads that meet there.
constexpr int kDecodeDone = 3, kDecodeReaders = (kDecodeWarps + kDecodeReducers) * 32;

// One product of a chain. The packets of product i bear `first` + i, where `first` is one more than the
// number of products that chains had before.
struct LinearDecodeProduct {
  const uint8_t* codes;
  const uint16_t* scales;
  const float* x;           // (T, K), or null where x is
  const Packet* x_packets;  // by linear_decode_packet_place; of product x_from, or the attention before this
  const float* gain;        // (K) or null
  const float* residual;    // (T, N) or null; where a product of the chain made it, each value is read by
                            // the thread that stored it
  float* y;
  Packet* y_packets;  // or null; of kRopeKv (T, N / 4), else by linear_decode_packet_place
  const float* table;
  const int32_t* position;
  const int32_t* sequence;
  KvLayer kv;
  float eps, inverse_k;
  int n, k, k_tiles, groups;
  int unit_groups, group_shift;  // group of unit u where a unit has one: u >> group_shift
  int factor, offset;            // a value is scale * (factor * code - offset) / factor
  int heads, kv_heads, head_dim;
  int x_from;
  Epilogue epilogue;
  bool attends;  // x is attention over what the product before it made
  LinearDecodePart part;
};

// The attention of all layers of a chain.
struct LinearDecodeAttention {
  const int32_t *position, *sequence;  // (tokens)
  int kv_heads, queries, head_dim;     // queries: heads of a kv head
  int pairs, sharers;                  // tokens times kv heads; blocks for each, or 0: one for each head
  int rounds;                          // pairs of a block, if it has more than one, not shared then
  int first_block;                     // the first to attend, others follow: those with less of q, k and v
  LinearDecodeBox box;
  LinearDecodeMeeting meeting;
  Packet* parts;  // (pairs, sharers, kLinearDecodeAttendPackets)

  // The how many-th of those that attend this block is.
  __device__ int block() const {
    const int i = int(blockIdx.x) - first_block;
    return i < 0 ? i + int(gridDim.x) : i;
  }
};

template <int kProducts>
struct LinearDecodeParams {
  LinearDecodeProduct product[kProducts];
  int count, tokens, inverse_tokens;  // linear_decode_inverse
  int ahead, ahead_next;  // stages on their way at a time; those of a product whose x may be on its way too
  uint32_t* done;         // (blocks) products of chains so far; null: no packets
  LinearDecodeAttention attention;
  LinearDecodeConfig config;
};

// Where in (T, 16) floats a warp's sum of a row is: eight rows of four tokens are in banks of their own.
__device__ inline int linear_decode_sum_at(int token, int row) {
  return token * kQ4TileRows + (row ^ (token & 2) * 4);
}

// A block's rank in its pair.
template <bool kPair>
__device__ inline int linear_decode_rank() {
  return kPair ? int(blockIdx.x) % kDecodePair : 0;
}

// A block's tile rows of a product: every gridDim.x-th, so that the first columns of the next x are there
// long before the last. Odd products deal them in reverse, so that the longer runs even out. For a pair two
// tile rows are one.
template <bool kPair>
struct LinearDecodeRows {
  static constexpr int kTogether = kPair ? kDecodePair : 1;
  int worker, rows;
  __device__ LinearDecodeRows(const LinearDecodePart& part, int product)
      : worker(int(product % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x) / kTogether),
        rows(part.rows + (worker < part.more_rows)) {}
  // The first of them.
  __device__ int tile_row(int row) const { return row * int(gridDim.x) + worker * kTogether; }
};

// The barriers of a block, and where a role is in the ring. A stage is full when its bytes have arrived and
// empty when every lane that multiplies has read of it.
class LinearDecodeRing {
 public:
  __device__ LinearDecodeRing(const LinearDecodeConfig& c, uint8_t* shared)
      : first_(held(shared_address(shared))),
        barriers_(held(shared_address(shared + c.barriers))),
        stage_(first_),
        full_(barriers_),
        stages_(c.stages),
        stage_bytes_(c.stage_bytes) {}

  // By one thread, before any other uses them.
  __device__ void init() const {
    for (int i = 0; i < kDecodeStages; ++i) {
      mbarrier_init(barriers_ + i * 8, kFullArrivals);
      mbarrier_init(barriers_ + i * 8 + kEmpty, kDecodeWarps * 32);
    }
    for (int m = 0; m < kDecodeMeetings; ++m) {
      mbarrier_init(sums_full(m), kDecodeWarps * 32);
      mbarrier_init(sums_empty(m), 32);
      mbarrier_init(inbox_full(m), 1);
      mbarrier_init(sent_read(m), 1);
    }
    mbarrier_init_done();
  }
  // Addresses in shared memory: of a meeting's barriers, of the stage that the role is at, of its barriers.
  __device__ uint32_t sums_full(int meeting) const { return barriers_ + 2 * kEmpty + meeting * 8; }
  __device__ uint32_t sums_empty(int meeting) const { return sums_full(meeting) + kDecodeMeetings * 8; }
  // Of a pair: sums of the other block have come; the other has read those of this one.
  __device__ uint32_t inbox_full(int meeting) const { return sums_full(meeting) + 2 * kDecodeMeetings * 8; }
  __device__ uint32_t sent_read(int meeting) const { return sums_full(meeting) + 3 * kDecodeMeetings * 8; }
  __device__ uint32_t stage() const { return stage_; }
  __device__ uint32_t full() const { return full_; }
  __device__ uint32_t empty() const { return full_ + kEmpty; }

  __device__ void wait_full() const { mbarrier_wait(full_, parity_); }
  __device__ void wait_empty() const { mbarrier_wait(full_ + kEmpty, parity_ ^ 1); }
  // Whether the stage has been read since wait_empty().
  __device__ bool read() const { return mbarrier_done(full_ + kEmpty, parity_); }
  __device__ void next() {
    stage_ += stage_bytes_, full_ += 8;
    if (full_ == barriers_ + stages_ * 8) stage_ = first_, full_ = barriers_, parity_ ^= 1;
  }

 private:
  static constexpr int kEmpty = kDecodeStages * 8;  // from a stage's barrier for full to that for empty
  uint32_t first_, barriers_, stage_, full_;
  int stages_, stage_bytes_;
  uint32_t parity_ = 0;
};

// Whose attention a block makes, and which part of it: positions [begin, end) of the cache, all older than
// the token's own.
struct DecodePlace {
  int pair = 0, token = 0, kv_head = 0, sequence = 0;
  int part = 0, parts = -1;            // of so many; 0: none
  int begin = 0, end = 0, stages = 0;  // of the ring

  DecodePlace() = default;
  __device__ DecodePlace(const LinearDecodeAttention& a, int round)
      : pair((a.block() + round * int(gridDim.x)) / a.sharers), part(a.block() % a.sharers), parts(0) {
    if (pair >= a.pairs) return;
    token = pair / a.kv_heads, kv_head = pair % a.kv_heads;
    const int old = __ldcg(a.position + token), most = linear_decode_parts(old, a.sharers);
    sequence = __ldcg(a.sequence + token);
    if (part >= most) return;
    parts = most;
    begin = linear_decode_part_begin(old, part, parts), end = linear_decode_part_begin(old, part + 1, parts);
    stages = (end - begin + a.box.positions() - 1) / a.box.positions();
  }
};
static_assert(sizeof(DecodePlace) == 9 * sizeof(int), "the room for it in LinearDecodeConfig");

// A lane's part of the copies that fill boxes of the cache: 16 bytes of a row in each half of each region.
class DecodeCacheCopy {
 public:
  __device__ DecodeCacheCopy(const LinearDecodeProduct& from, const DecodePlace& place,
                             const LinearDecodeBox& box, int lane)
      : box_(box), lane_(lane), row_(from.kv_heads * from.head_dim) {
    const int pieces = from.head_dim / 8;
    sub_ = lane / pieces;
    const int64_t at =
        place.sequence * from.kv.ctx * row_ + place.kv_head * from.head_dim + lane % pieces * 8;
    k_ = static_cast<const __half*>(from.kv.k) + at, v_ = static_cast<const __half*>(from.kv.v) + at;
  }
  // Positions from `first` on, zeros from `end` on; completes a phase of `full`. By all lanes.
  __device__ void run(int first, int end, uint32_t to, uint32_t full) const {
    if (sub_ < box_.tiles) {
      int position = first + sub_;
      const __half *k = k_ + int64_t(position) * row_, *v = v_ + int64_t(position) * row_;
      const int64_t half = int64_t(box_.tiles) * row_;
      to += lane_ * 16;
#pragma unroll 2
      for (int region = 0; region < 8; ++region) {
        const bool low = position < end, high = position + box_.tiles < end;
        copy_or_zero(to, k, low);
        copy_or_zero(to + box_.half, k + half, high);
        copy_or_zero(to + 2 * box_.half, v, low);
        copy_or_zero(to + 3 * box_.half, v + half, high);
        to += box_.region, position += 2 * box_.tiles, k += 2 * half, v += 2 * half;
      }
    }
    copies_arrive(full);
  }

 private:
  LinearDecodeBox box_;
  int lane_, sub_, row_;
  const __half *k_, *v_;  // row 0, this lane's piece
};

// A block's share of the rows of short caches, on their way to L2 before they are asked for: lane 2t has K of
// token t's sequence, lane 2t + 1 V.
struct DecodeOldRows {
  int64_t begin = 0;  // bytes, of the layer's cache
  uint32_t bytes = 0;

  DecodeOldRows() = default;
  __device__ DecodeOldRows(const LinearDecodeProduct& from, int tokens, int lane) {
    if (lane / 2 >= tokens) return;
    const int64_t row = from.kv_heads * from.head_dim * 2, all = __ldcg(from.position + lane / 2) * row;
    const int64_t share = (all / gridDim.x / 128 + 1) * 128, first = blockIdx.x * share;
    begin = __ldcg(from.sequence + lane / 2) * from.kv.ctx * row + first;
    bytes = uint32_t(max(min(share, all - first), int64_t(0)));
  }
  __device__ void prefetch(const LinearDecodeProduct& from, int lane) const {
    const void* const of = lane % 2 ? from.kv.v : from.kv.k;
    if (bytes > 0) prefetch_l2(static_cast<const char*>(of) + begin, bytes);
  }
};

// The warp that asks for the weights of all products, far ahead of their use but never for more than a few
// stages at once: what other warps load would wait behind them.
//
// places: room for kDecodeRounds.
template <class Tile, bool kShared, bool kPair, class Params>
__device__ void linear_decode_produce(const Params& p, LinearDecodeRing ring, DecodePlace* places, int lane) {
  constexpr int kTileBytes = kQ4TileBytes * Tile::kBits / 4, kUnitBytes = kTileBytes * kUnitTiles;
  constexpr int kUnits = kPair ? kDecodePairWarps : kDecodeWarps;  // of a tile row in a stage
  LinearDecodeRing arriving = ring, first = ring;
  int asked = 0;
  bool begun = false;  // stages from `first` on are being read: nobody here waits for x
  const auto begin = [&] { first = ring, begun = false; };
  // A stage to ask for, with at most so many on their way, this one included.
  const auto admit = [&] {
    ring.wait_empty();
    if (!begun) begun = __any_sync(0xffffffffu, first.read());
    const int most = begun ? p.ahead : p.ahead_next;
    while (asked >= most) arriving.wait_full(), arriving.next(), --asked;
    ++asked;
  };
  const uint64_t policy = read_once();
  bool placed = false;
  DecodeOldRows old;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const LinearDecodeProduct& a = p.product[i];
    const LinearDecodePart& part = a.part;
    const LinearDecodeRows<kPair> rows(part, i);
    const bool scaled = a.unit_groups > 0, shared_scales = a.group_shift > 0;
    const int scale_bytes = max(1, a.unit_groups) * (kQ4TileRows * 2);  // of a unit
    if constexpr (kShared) {
      if (a.attends) {
        if (!placed) {
          pdl_wait();
          if (lane < p.attention.rounds) places[lane] = DecodePlace(p.attention, lane);
          __syncwarp();
          placed = true;
        }
        begin();
#pragma unroll 1
        for (int round = 0; round < p.attention.rounds; ++round) {
          const DecodePlace place = places[round];
          const DecodeCacheCopy copy(p.product[i - 1], place, p.attention.box, lane);
#pragma unroll 1
          for (int s = 0; s < place.stages; ++s) {
            admit();
            copy.run(place.begin + s * p.attention.box.positions(), place.end, ring.stage(), ring.full());
            ring.next();
          }
        }
      }
    } else if (a.attends) {
      const LinearDecodeProduct& from = p.product[i - 1];
      if (!placed) {
        pdl_wait();
        old = DecodeOldRows(from, p.tokens, lane);
        placed = true;
      }
      old.prefetch(from, lane);
      __syncwarp();
    }
#pragma unroll 1
    for (int phase = 0; phase < part.phases; ++phase) {
      const int piece = linear_decode_rank<kPair>() * part.phases + phase;
      const int first = part.piece_begin(piece), units = part.piece_begin(piece + 1) - first;
      const int total = rows.rows * units, nth = kPair ? lane % kUnits : lane;  // unit of a stage
      if (total == 0) continue;
      begin();
      int row = nth / units, col = nth % units;
#pragma unroll 1
      for (int at = 0; at < total; at += kUnits) {
        admit();
        // Each lane has a unit; the first of a run of neighbours in a row asks for all of it.
        const int64_t tile_row = rows.tile_row(row) + (kPair ? lane / kUnits : 0);
        const int count = min(kUnits, total - at);
        const bool one =
            nth < count && (!kPair || (lane < kDecodePair * kUnits && tile_row * kQ4TileRows < a.n));
        const bool leads = one && (nth == 0 || col == 0);
        const int unit = first + col, run = min(count - nth, units - col);
        const int tiles = min(run * kUnitTiles, a.k_tiles - unit * kUnitTiles);
        const int group = shared_scales ? unit >> a.group_shift : unit * a.unit_groups;
        const int groups = shared_scales ? 1 : min(run * a.unit_groups, a.groups - group);
        const DecodeCopy copies[2] = {
            {ring.stage() + lane * kUnitBytes,
             a.codes + (tile_row * a.k_tiles + unit * kUnitTiles) * kTileBytes,
             leads ? uint32_t(tiles * kTileBytes) : 0},
            {ring.stage() + p.config.stage_scales + lane * scale_bytes,
             reinterpret_cast<const uint8_t*>(a.scales + (tile_row * a.groups + group) * kQ4TileRows),
             scaled && (shared_scales ? one : leads) ? uint32_t(groups * kQ4TileRows * 2) : 0}};
        decode_copies(copies, ring.full(), lane, policy);
        ring.next();
        for (col += kUnits; col >= units; col -= units) ++row;
      }
    }
  }
}

}  // namespace q4s
