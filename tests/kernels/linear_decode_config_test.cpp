// Every cut covers every row and column once, fits shared memory and leaves nothing misaligned, over real and
// odd shapes, alone and in chains.
#include "kernels/linear_decode_config.h"

#include <doctest/doctest.h>

#include <vector>

using namespace q4s;

namespace {

constexpr int kShared = 195 * 1024;

void check(const std::vector<LinearDecodeShape>& shapes, int tokens, int multiprocessors, bool pair = false) {
  CAPTURE(shapes[0].layout.n);
  CAPTURE(shapes[0].layout.k);
  CAPTURE(shapes[0].layout.group);
  CAPTURE(shapes[0].layout.bits);
  CAPTURE(shapes.size());
  CAPTURE(tokens);
  CAPTURE(pair);
  const LinearDecodeCut cut =
      linear_decode_cut(shapes.data(), shapes.size(), tokens, multiprocessors, kShared, pair);
  const int together = pair ? 2 : 1;
  const LinearDecodeConfig& c = cut.config;
  REQUIRE(cut.part.size() == shapes.size());
  REQUIRE(c.tokens >= 1);
  REQUIRE(c.tokens <= tokens);
  if (multiprocessors == 1 && c.shared > kShared) return;  // sums of all rows of a tall weight in one block
  REQUIRE(c.shared <= kShared);
  REQUIRE(c.blocks == multiprocessors);
  REQUIRE(c.pair == pair);
  REQUIRE(c.stages >= 2);
  REQUIRE(c.stages <= kDecodeStages);
  int most_units = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Q4Layout& l = shapes[i].layout;
    const LinearDecodePart& part = cut.part[i];
    const int workers = c.blocks / together;
    REQUIRE(int64_t(workers) * part.rows + part.more_rows == (l.n_tiles() + together - 1) / together);
    REQUIRE(part.more_rows < workers);
    REQUIRE(part.units == (l.k_tiles() + 1) / 2);
    REQUIRE(part.pieces == part.phases * together);
    REQUIRE(part.piece_begin(0) == 0);
    REQUIRE(part.piece_begin(part.pieces) == part.units);
    for (int p = 0; p < part.pieces; ++p) {
      const int size = part.piece_begin(p + 1) - part.piece_begin(p);
      REQUIRE(size >= std::min(1, part.units / part.pieces));
      REQUIRE(size <= part.piece_units);
    }
    most_units = std::max(most_units, part.piece_units);
    if (shapes[i].head_dim) {
      const LinearDecodeMeeting meeting(shapes[i].queries, shapes[i].head_dim);
      const int warps = c.attend_warps * meeting.operands;
      REQUIRE(warps >= 8);
      REQUIRE(warps <= kDecodeWarps);
      REQUIRE(c.meta - c.x >= meeting.sums + warps * meeting.heads * meeting.sums_pitch);
      REQUIRE(meeting.heads * meeting.operands >= shapes[i].queries);
      REQUIRE(c.stage_bytes >= LinearDecodeBox(shapes[i].head_dim).bytes());
    }
    // Places hold what they are for.
    REQUIRE(c.squares - c.meta >=
            part.piece_units * c.tokens * linear_decode_meta(linear_decode_unit_groups(l)) * 4);
    if (shapes[i].norm) REQUIRE(c.partial - c.squares >= part.units * c.tokens * 4);
    if (part.phases > 1)
      REQUIRE(c.norm - c.sums >= together * (part.rows + (part.more_rows > 0)) * c.tokens * 64);
    REQUIRE(c.stage_scales == kDecodeWarps * 2 * 512 * l.bits / 4);
    REQUIRE(c.stage_bytes - c.stage_scales >= kDecodeWarps * linear_decode_unit_groups(l) * 32);
  }
  REQUIRE(c.stride == most_units * 256 + 64);
  REQUIRE(c.x == c.stages * c.stage_bytes);
  REQUIRE(c.meta >= c.x + c.tokens * c.stride);
  REQUIRE(c.sums - c.partial >= kDecodeMeetings * kDecodeWarps * c.tokens * 64);
  REQUIRE(c.inbox - c.norm >= kDecodeReducers * c.tokens * 4);
  REQUIRE(c.place - c.inbox >= (pair ? kDecodeMeetings * 17 * c.tokens * 4 : 0));
  REQUIRE(c.barriers - c.place >= 2 * kDecodeRounds * 36);
  REQUIRE(c.place % 4 == 0);
  for (int at : {c.x, c.meta, c.partial, c.inbox, c.stage_bytes, c.stage_scales}) REQUIRE(at % 16 == 0);
  REQUIRE(c.barriers % 8 == 0);
  REQUIRE(c.shared - c.barriers >= (2 * kDecodeStages + 4 * kDecodeMeetings) * 8);
}

}  // namespace

TEST_CASE("linear_decode_config: odd and real shapes") {
  for (int64_t n : {1, 17, 576, 4096, 22016, 57344, 128256})
    for (int64_t k : {1, 64, 65, 172, 576, 1536, 4096, 11008, 14336, 28672})
      for (int bits : {4, 8, 16})
        for (int64_t group : {int64_t(32), int64_t(64), int64_t(128), k})
          for (int tokens : {1, 3, 8, 16})
            for (bool norm : {false, k <= 8192})  // as wide as a residual stream
              for (int multiprocessors : {1, 132})
                for (bool pair : {false, multiprocessors > 1 && bits == 4 && tokens <= 8})
                  check({{{.n = n, .k = k, .group = group, .bits = bits}, norm}}, tokens, multiprocessors,
                        pair);
}

TEST_CASE("linear_decode_config: chains of a layer's products") {
  for (auto [hidden, ffn] : {std::pair<int64_t, int64_t>{64, 172}, {576, 1536}, {4096, 11008}, {8192, 28672}})
    for (int tokens : {1, 2, 8, 16})
      for (bool pair : {false, tokens == 8})
        check({{{.n = hidden, .k = hidden, .group = 128}, false, 128, 8},
               {{.n = 2 * ffn, .k = hidden, .group = 32}, true},
               {{.n = hidden, .k = ffn, .group = 64}, false},
               {{.n = 3 * hidden, .k = hidden, .group = 128}, true}},
              tokens, 132, pair);
}

TEST_CASE("linear_decode_config: eight tokens read the weights of every model once") {
  for (int64_t k : {4096, 5120, 8192, 11008, 13824, 14336, 28672}) {
    const LinearDecodeShape shape{{.n = 8192, .k = k, .group = 128}};
    CHECK(linear_decode_cut(&shape, 1, 8, 132, kShared).config.tokens == 8);
    const LinearDecodeShape wide{{.n = 8192, .k = k, .group = 128, .bits = 8}};
    CHECK(linear_decode_cut(&wide, 1, 16, 132, kShared).config.tokens <= 8);
  }
}

TEST_CASE("linear_decode_config: attention is dealt out evenly") {
  for (int most : {1, 3, 4, 16})
    for (int old : {0, 1, 15, 16, 17, 255, 511, 512, 513, 1000, 4096, 5001, 131071}) {
      const int parts = linear_decode_parts(old, most);
      REQUIRE(parts >= 1);
      REQUIRE(parts <= most);
      REQUIRE(linear_decode_part_begin(old, 0, parts) == 0);
      REQUIRE(linear_decode_part_begin(old, parts, parts) == old);
      for (int part = 0; part < parts; ++part) {
        const int begin = linear_decode_part_begin(old, part, parts);
        const int size = linear_decode_part_begin(old, part + 1, parts) - begin;
        REQUIRE(begin % 16 == 0);
        REQUIRE(size <= old / parts + 16);
        if (parts > 1) REQUIRE(size >= 240);
      }
    }
}

TEST_CASE("linear_decode_config: packets of x stand so that half a warp loads whole lines") {
  for (const int width : {4, 64, 172, 4096}) {
    const int units = (width + kUnitColumns - 1) / kUnitColumns;
    for (int token = 0; token < 3; ++token)
      for (int column = 0; column < width; column += kPacketValues) {
        const int place = linear_decode_packet_place(token, width, column) - token * units * 32;
        const int unit = place / 32, second = place % 32 / 16, lane = place % 16;
        REQUIRE(column == unit * kUnitColumns + lane / 2 * 16 + lane % 2 * 4 + second * 8);
      }
  }
  for (int tokens = 1; tokens <= 16; ++tokens)
    for (int i = 0; i <= kDecodeWarps; ++i) REQUIRE((i * linear_decode_inverse(tokens) >> 8) == i / tokens);
}

TEST_CASE("linear_decode_config: eight rows of a tile of the cache meet eight groups of banks") {
  for (int head_dim = 16; head_dim <= 128; head_dim += 16) {
    const LinearDecodeBox box(head_dim);
    REQUIRE(box.tiles >= 2);
    REQUIRE(box.half % 16 == 0);
    REQUIRE(box.half <= 512);
    REQUIRE(box.region >= 2 * box.half + 2 * box.tiles * 2 * head_dim / 2);
    REQUIRE(box.region % 128 == 16);
  }
}
