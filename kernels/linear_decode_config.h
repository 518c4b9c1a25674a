// How linear_decode cuts its work: a pure function of the shapes, so that it is testable without a device.
//
// A block owns every so many-th tile row of each product. Rows are cut in units of 128 columns, and the units
// of a block's rows, one row after another, are the stream that it reads: kDecodeWarps of them a stage, one
// for each warp. Where x of all columns does not fit shared memory, columns are taken in phases, over all of
// the block's rows each.
//
// For many tokens, whose x takes long to stage and much memory, blocks work in pairs: each stages half of the
// columns, takes two tile rows at a time, half of its warps each, and gives the other the sums of one of
// them.
#pragma once
#include <vector>

#include "kernels/q4_tiles.h"

namespace q4s {

constexpr int kDecodeWarps = 16;     // that multiply
constexpr int kDecodePairWarps = 8;  // of them, in a pair, for each of its two tile rows
constexpr int kDecodePair = 2;       // blocks of a pair, and tile rows that it takes at a time
constexpr int kDecodeReducers = 2;   // warps that add up rows, in turn
constexpr int kDecodeMeetings = 2;   // rows whose sums meet at a time
constexpr int kDecodeStages = 16;    // most stages of the ring
constexpr int kDecodeQueries = 8;    // most query heads of a kv head, for attention
constexpr int kDecodeOperand = 4;    // of them in one operand
constexpr int kDecodeSharers = 16;   // most blocks that share the cache of a token and kv head
constexpr int kDecodeRounds = 3;     // most kv heads of tokens that a block attends to, one after another
constexpr int kPacketValues = 4;     // of a packet of linear_decode_packet.cuh
constexpr int kUnitTiles = 2, kUnitColumns = kUnitTiles * kQ4TileCols;

struct LinearDecodePart {
  // Tile rows of a block, or two at a time of a pair; the first `more_rows` have one more.
  int rows = 0, more_rows = 0;
  // Of a row: units, pieces that they are cut into: `phases` of the first block of a pair, then of the
  // second; the most units of a piece.
  int units = 0, pieces = 1, phases = 1, piece_units = 0;
  // Piece i is units [piece_begin(i), piece_begin(i + 1)), the same number but for one.
  Q4S_HOST_DEVICE int piece_begin(int piece) const {
    return piece * (units / pieces) + (piece < units % pieces ? piece : units % pieces);
  }
};

struct LinearDecodeConfig {
  int tokens = 0;  // of one launch
  int blocks = 0;
  bool pair = false;
  int stages = 0, stage_bytes = 0, stage_scales = 0;  // of the ring; where in a stage its scales are
  int stride = 0;                                     // bytes of a token's x in shared memory
  // Bytes: where a block's shared memory has what, and its size. At 0 the ring, each stage kDecodeWarps units
  // of codes, then of scales; or a LinearDecodeBox of the cache; x: (T) of `stride`, or attention: a
  // LinearDecodeMeeting, or (kDecodeWarps, head_dim + 2) f32; meta: (piece_units, T, linear_decode_meta())
  // words; squares: (units, T) f32; partial sums: (kDecodeMeetings, kDecodeWarps, T, 16) f32, of a pair
  // (kDecodeMeetings, kDecodePairWarps, 2, T, 16); sums of earlier phases: (rows, T, 16) f32, of a pair
  // (rows, 2, T, 16); norm: (kDecodeReducers, T) f32; inbox: what the other block of a pair sends,
  // kDecodeMeetings times linear_decode_inbox(T) f32; place: whose attention the block makes, 9 words for
  // each of kDecodeRounds, twice; barriers of 8 bytes: 2 a stage, 4 a meeting.
  int x = 0, meta = 0, squares = 0, partial = 0, sums = 0, norm = 0, inbox = 0, place = 0, barriers = 0,
      shared = 0;
  int attend_warps = 0;  // those that share the tiles of a block's attention with one operand
};

// A stage of the cache of one kv head: `tiles` times 16 positions that follow each other, in eight regions of
// 2 * tiles, whose rows are first half of K, second, first half of V, second. Tile t has row t of each half:
// its matrices of eight rows meet eight regions, which stand 16 bytes further in the banks each.
struct LinearDecodeBox {
  int tiles, half, region;  // tiles; bytes of half of K or V of a region, at most 512; of a region
  LinearDecodeBox() = default;
  explicit LinearDecodeBox(int head_dim)
      : tiles(256 / head_dim), half(tiles * head_dim * 2), region(4 * half + 16) {}
  int bytes() const { return 8 * region; }
  Q4S_HOST_DEVICE int positions() const { return 16 * tiles; }
};

// Where the warps of a block meet for attention: q as sums of two fp16 numbers, in rows of 64 or 128 dims,
// zero from head_dim on, that stand 16 bytes further in the banks each: four heads' larger numbers, the same
// heads' smaller ones, the next heads; the token's own rows of K and V likewise; sums of each warp for
// `heads` heads, f32: head_dim values, largest score, sum of weights.
struct LinearDecodeMeeting {
  int heads, operands;                      // of an operand; operands
  int shift, pitch, own, sums, sums_pitch;  // log2 of the dims; bytes
  LinearDecodeMeeting() = default;
  LinearDecodeMeeting(int queries, int head_dim)
      : heads(queries < kDecodeOperand ? queries : kDecodeOperand),
        operands((queries + kDecodeOperand - 1) / kDecodeOperand),
        shift(head_dim > 64 ? 7 : 6),
        pitch((2 << shift) + 16),
        own(operands * 2 * kDecodeOperand * pitch),
        sums(own + 2 * pitch),
        sums_pitch((head_dim + 4) * 4) {}
};

// Blocks that share `old` positions of a cache, at most `most`: what meeting costs is worth a few hundred.
Q4S_HOST_DEVICE inline int linear_decode_parts(int old, int most) {
  constexpr int kLeast = 256;
  return old < 2 * kLeast ? 1 : old / kLeast < most ? old / kLeast : most;
}
// Where part `part` of so many begins, which is where the one before it ends.
Q4S_HOST_DEVICE inline int linear_decode_part_begin(int old, int part, int parts) {
  return part == parts ? old : int(int64_t((old + 15) / 16) * part / parts) * 16;
}

// What makes i / tokens of i up to kDecodeWarps: i * it >> 8.
Q4S_HOST_DEVICE constexpr int linear_decode_inverse(int tokens) { return (255 + tokens) / tokens; }

// Which packet of x, (T, width), stands where: of a unit first those of the even runs of eight columns, then
// those of the odd. A lane that stages x has columns 8 apart; so half a warp loads whole lines, of which half
// as many are on their way as of halves of lines. Rows are padded to whole units.
Q4S_HOST_DEVICE constexpr int linear_decode_packet_place(int token, int width, int column) {
  const int packet = column / kPacketValues, row = (width + kUnitColumns - 1) / kUnitColumns;
  return (token * row + column / kUnitColumns) * (kUnitColumns / kPacketValues) + packet % 4 / 2 * 16 +
         packet / 4 % 8 * 2 + packet % 2;
}

// Floats from one meeting's inbox to the next: sums of a tile row, and of the squares of x.
Q4S_HOST_DEVICE constexpr int linear_decode_inbox(int tokens) { return (17 * tokens + 3) / 4 * 4; }

// Groups of scales in a unit.
constexpr int linear_decode_unit_groups(const Q4Layout& l) {
  return l.bits == 16 ? 0 : l.group >= l.k || l.group >= kUnitColumns ? 1 : int(kUnitColumns / l.group);
}
// Words about one token of a staged unit: the biases of its groups and its scale, rounded up.
constexpr int linear_decode_meta(int unit_groups) { return unit_groups <= 1 ? 2 : 2 * unit_groups; }

struct LinearDecodeShape {
  Q4Layout layout;
  bool norm = false;
  int head_dim = 0, queries = 0;  // of the attention that makes x: query heads of a kv head
};
struct LinearDecodeCut {
  LinearDecodeConfig config;
  std::vector<LinearDecodePart> part;  // of each product
};

// As many of `tokens` at once as fit `shared_bytes` a block, of a wide format at most eight, since more leave
// too little of it to the ring; `shared` is more than that where not even one does. pair: for blocks in
// pairs, of an even number of multiprocessors.
LinearDecodeCut linear_decode_cut(const LinearDecodeShape*, size_t count, int tokens, int multiprocessors,
                                  int shared_bytes, bool pair = false);

}  // namespace q4s
