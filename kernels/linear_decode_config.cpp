#include "kernels/linear_decode_config.h"

#include <algorithm>

#include "kernels/types.h"

namespace q4s {
namespace {

constexpr int kFewStages = 4;  // of a ring that hides the memory's latency
constexpr int kFewAttend = 8;  // warps that keep up with the memory in attention

// Lays out shared memory with at most `limit` units of a row at a time.
LinearDecodeCut place(const LinearDecodeShape* shapes, size_t count, int tokens, int multiprocessors,
                      int shared_bytes, int limit, bool pair) {
  LinearDecodeCut cut;
  LinearDecodeConfig& c = cut.config;
  const int together = pair ? kDecodePair : 1;
  c.tokens = tokens;
  c.blocks = multiprocessors;
  c.pair = pair;
  int attention = 0, attention_warp = 0, alone = 0, operands = 1;  // bytes; of one warp; of a head alone
  int x_units = 0, meta = 0, squares = 0, sums = 0, groups = 0, bits = 4;
  for (size_t i = 0; i < count; ++i) {
    const Q4Layout& l = shapes[i].layout;
    LinearDecodePart& part = cut.part.emplace_back();
    const int rows = int(ceil_div(l.n_tiles(), together)), workers = c.blocks / together;
    part.rows = rows / workers;
    part.more_rows = rows % workers;
    part.units = int(ceil_div(l.k_tiles(), kUnitTiles));
    part.phases = int(ceil_div(part.units, int64_t(limit) * together));
    part.pieces = part.phases * together;
    part.piece_units = int(ceil_div(part.units, part.pieces));
    const int unit_groups = linear_decode_unit_groups(l);
    x_units = std::max(x_units, part.piece_units);
    meta = std::max(meta, part.piece_units * linear_decode_meta(unit_groups));
    if (shapes[i].norm) squares = std::max(squares, part.units);
    if (part.phases > 1) sums = std::max(sums, together * (part.rows + (part.more_rows > 0)));
    if (shapes[i].head_dim) {
      const LinearDecodeMeeting meeting(shapes[i].queries, shapes[i].head_dim);
      attention = meeting.sums, operands = meeting.operands;
      attention_warp = meeting.heads * meeting.sums_pitch;
      alone = kDecodeWarps * (shapes[i].head_dim + 2) * int(sizeof(float));
    }
    groups = std::max(groups, unit_groups);
    bits = l.bits;
  }
  c.stride = x_units * kUnitColumns * 2 + 64;
  c.stage_scales = kDecodeWarps * kUnitTiles * kQ4TileBytes * (bits / 4);
  c.stage_bytes = c.stage_scales + kDecodeWarps * groups * kQ4TileRows * 2;
  int x_bytes = tokens * c.stride;
  if (attention) x_bytes = std::max({x_bytes, attention + kFewAttend * attention_warp, alone});
  const auto layout = [&](int stages) {
    c.stages = stages;
    c.x = stages * c.stage_bytes;
    c.meta = int(round_up(c.x + x_bytes, 16));
    c.squares = c.meta + meta * tokens * 4;
    c.partial = int(round_up(c.squares + squares * tokens * 4, 16));
    c.sums = c.partial + kDecodeMeetings * kDecodeWarps * tokens * kQ4TileRows * 4;
    c.norm = c.sums + sums * tokens * kQ4TileRows * 4;
    c.inbox = int(round_up(c.norm + kDecodeReducers * tokens * 4, 16));
    c.place = c.inbox + (pair ? kDecodeMeetings * linear_decode_inbox(tokens) * 4 : 0);
    c.barriers = int(round_up(c.place + 2 * kDecodeRounds * 9 * 4, 8));
    c.shared = c.barriers + (2 * kDecodeStages + 4 * kDecodeMeetings) * 8;
  };
  layout(0);
  const int stages = std::clamp((shared_bytes - c.shared) / c.stage_bytes, 2, kDecodeStages);
  if (attention) {  // what is left over gives room to more warps
    const int left = std::max(shared_bytes - c.shared - stages * c.stage_bytes, 0);
    c.attend_warps = std::min(kDecodeWarps, (x_bytes + left - attention) / attention_warp) / operands;
    x_bytes = std::max(x_bytes, attention + c.attend_warps * operands * attention_warp);
  }
  layout(stages);
  return cut;
}

}  // namespace

LinearDecodeCut linear_decode_cut(const LinearDecodeShape* shapes, size_t count, int tokens,
                                  int multiprocessors, int shared_bytes, bool pair) {
  const int together = pair ? kDecodePair : 1;
  int units = 1;
  if (shapes[0].layout.bits > 4) tokens = std::min(tokens, 8);
  for (size_t i = 0; i < count; ++i)
    units = std::max(units, int(ceil_div(shapes[i].layout.k_tiles(), kUnitTiles)));
  for (;; tokens = (tokens + 1) / 2) {
    LinearDecodeCut best;
    for (int parts = together; parts <= std::max(together, std::min(16, units)); ++parts) {
      LinearDecodeCut cut =
          place(shapes, count, tokens, multiprocessors, shared_bytes, int(ceil_div(units, parts)), pair);
      const LinearDecodeConfig &b = best.config, &c = cut.config;
      if (b.blocks == 0 || (b.shared > shared_bytes && c.shared <= shared_bytes) ||
          (b.stages < kFewStages && c.stages > b.stages && c.shared <= shared_bytes))
        best = std::move(cut);
    }
    if (best.config.shared <= shared_bytes || tokens == 1) return best;
  }
}

}  // namespace q4s
