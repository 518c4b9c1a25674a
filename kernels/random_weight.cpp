// Rows of random weights on the host. The CUDA backend makes the same values in its own layout.
#include "kernels/random_weight.h"

#include <bit>
#include <cassert>
#include <cstring>

#include "kernels/half.h"

namespace q4s {

void random_row(uint64_t seed, const WeightView& w, int64_t n, uint8_t* row, uint16_t* scales) {
  const int64_t k = w.k;
  if (w.format == Format::kQ4 || w.format == Format::kQ8)
    for (int64_t g = 0; g < w.groups(); ++g)
      scales[g] = float_to_half(random_scale(seed, w.format, k, w.groups(), n, g));
  switch (w.format) {
    case Format::kQ4:
      for (int64_t j = 0; j < k; j += 2) {
        const uint64_t codes = random_q4(seed, k, n, j / 16) >> (j % 16 * 4);
        row[j / 2] = uint8_t(j + 1 < k ? codes & 255 : codes & 15);
      }
      break;
    case Format::kQ8:
      for (int64_t j = 0; j < k; ++j) row[j] = uint8_t(random_q8(seed, k, n, j));
      break;
    default:
      for (int64_t j = 0; j < k; ++j) {
        const float v = random_dense(seed, k, n, j);
        if (w.format == Format::kF32) {
          std::memcpy(row + 4 * j, &v, 4);
        } else {
          assert(w.format == Format::kF16 || w.format == Format::kBF16);
          const uint16_t h = w.format == Format::kF16
                                 ? float_to_half(v)
                                 : uint16_t(std::bit_cast<uint32_t>(v) >> 16);  // truncated
          std::memcpy(row + 2 * j, &h, 2);
        }
      }
  }
}

}  // namespace q4s
