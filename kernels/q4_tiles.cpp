// Host packing into the tiles of q4_tiles.h: what the device packer is tested against.
#include "kernels/q4_tiles.h"

#include <cassert>

namespace q4s {
namespace {

void pack_nibbles(const Q4Layout& l, const uint8_t* from, uint8_t* to) {
  const int64_t k_tiles = l.k_tiles(), stride = (l.k + 1) / 2;
  const auto code = [&](int64_t packed_row, int64_t column) -> uint8_t {
    const int64_t row = l.file_row(packed_row);
    if (row < 0 || column >= l.k) return 8;
    const uint8_t byte = from[row * stride + column / 2];
    return column % 2 ? byte >> 4 : byte & 15;
  };
  for (int64_t nt = 0; nt < l.n_tiles(); ++nt)
    for (int64_t kt = 0; kt < k_tiles; ++kt)
      for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < 4; ++j) {
          const int64_t row = nt * 16 + lane / 4, column = kt * 64 + j * 16 + lane % 4 * 2;
          uint8_t* word = to + (((nt * k_tiles + kt) * 32 + lane) * 4 + j) * 4;
          // Nibbles 2b and 2b+1 share byte b: rows g and g+8; bytes 0, 2: columns 2t, 2t+1; bytes 1, 3: eight
          // on.
          for (int b = 0; b < 4; ++b) {
            const int64_t c = column + (b % 2 ? 8 : 0) + b / 2;
            word[b] = uint8_t(code(row, c) | code(row + 8, c) << 4);
          }
        }
}

void pack_wide(const Q4Layout& l, const uint8_t* from, uint8_t* to) {
  const int size = l.bits / 8;  // bytes of a value
  for (int64_t p = 0; p < l.n_tiles() * 16; ++p)
    for (int64_t c = 0; c < l.k_tiles() * 64; ++c) {
      const int64_t row = l.file_row(p), tile = p / 16 * l.k_tiles() + c / 64;
      const int step = int(c % 64 / 16), in_step = int(c % 16), high = p % 16 >= 8,
                lane = int(p % 8 * 4 + in_step % 8 / 2);
      const int value = in_step / 8 * 2 + in_step % 2;  // which of 2t, 2t+1, 2t+8, 2t+9
      const int64_t at =
          size == 1 ? ((tile * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + high * 4 + value
                    : ((tile * 4 + step) * 32 + lane) * 16 + value / 2 * 8 + high * 4 + value % 2 * 2;
      for (int b = 0; b < size; ++b) to[at + b] = row < 0 || c >= l.k ? 0 : from[(row * l.k + c) * size + b];
    }
}

}  // namespace

void q4_pack_cpu(const Q4Layout& l, const Q4Source& from, uint8_t* codes, uint16_t* scales) {
  assert(l.map != RowMap::kRope || (l.head_dim % 16 == 0 && l.rotated % l.head_dim == 0 && l.n % 16 == 0));
  assert(l.map != RowMap::kPairHalves || l.n % 2 == 0);
  if (l.bits == 4)
    pack_nibbles(l, from.codes, codes);
  else
    pack_wide(l, from.codes, codes);
  const int64_t groups = l.groups();
  for (int64_t nt = 0; nt < l.n_tiles(); ++nt)
    for (int64_t g = 0; g < groups; ++g)
      for (int r = 0; r < 16; ++r) {
        const int64_t row = l.file_row(nt * 16 + r);
        scales[(nt * groups + g) * 16 + r] = row < 0 ? 0 : from.scales[row * groups + g];
      }
}

}  // namespace q4s
