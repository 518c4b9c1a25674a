// linear_decode.h for int8 and fp16 weights: the head, as a rule.
#include "kernels/linear_decode.cuh"

namespace q4s {

void linear_decode_wide(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl) {
  const Q4Layout& l = a.w.layout;
  if (l.bits == 16) return launch_linear_decode<HalfTile, 0>(a, stream, pdl);
  if (l.group >= l.k || l.group >= 128) return launch_linear_decode<Int8Tile, 1>(a, stream, pdl);
  if (l.group == 64) return launch_linear_decode<Int8Tile, 2>(a, stream, pdl);
  launch_linear_decode<Int8Tile, 4>(a, stream, pdl);
}

}  // namespace q4s
