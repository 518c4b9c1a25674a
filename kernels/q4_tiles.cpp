// Host packing into the tiles of q4_tiles.h: what the device packer is tested against.
#include "kernels/q4_tiles.h"

#include <cassert>

namespace q4s {

void q4_pack_cpu(const Q4Layout& l, const Q4Source& from, uint8_t* codes, uint16_t* scales) {
  assert(l.map != RowMap::kRope || (l.head_dim % 16 == 0 && l.rotated % l.head_dim == 0 && l.n % 16 == 0));
  assert(l.map != RowMap::kPairHalves || l.n % 2 == 0);
  const int64_t k_tiles = l.k_tiles(), groups = l.groups(), stride = (l.k + 1) / 2;
  const auto code = [&](int64_t packed_row, int64_t column) -> uint8_t {
    const int64_t row = l.file_row(packed_row);
    if (row < 0 || column >= l.k) return 8;
    const uint8_t byte = from.codes[row * stride + column / 2];
    return column % 2 ? byte >> 4 : byte & 15;
  };
  for (int64_t nt = 0; nt < l.n_tiles(); ++nt)
    for (int64_t kt = 0; kt < k_tiles; ++kt)
      for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < 4; ++j) {
          const int64_t row = nt * 16 + lane / 4, column = kt * 64 + j * 16 + lane % 4 * 2;
          uint8_t* word = codes + (((nt * k_tiles + kt) * 32 + lane) * 4 + j) * 4;
          // Nibbles 2b and 2b+1 share byte b: rows g and g+8; bytes 0, 2: columns 2t, 2t+1; bytes 1, 3: eight
          // on.
          for (int b = 0; b < 4; ++b) {
            const int64_t c = column + (b % 2 ? 8 : 0) + b / 2;
            word[b] = uint8_t(code(row, c) | code(row + 8, c) << 4);
          }
        }
  for (int64_t nt = 0; nt < l.n_tiles(); ++nt)
    for (int64_t g = 0; g < groups; ++g)
      for (int r = 0; r < 16; ++r) {
        const int64_t row = l.file_row(nt * 16 + r);
        scales[(nt * groups + g) * 16 + r] = row < 0 ? 0 : from.scales[row * groups + g];
      }
}

}  // namespace q4s
