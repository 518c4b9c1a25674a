// linear_decode.h for int8 and fp16 weights: the head, as a rule.
#include "kernels/linear_decode.cuh"

namespace q4s {

void linear_decode_wide(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl) {
  const Q4Layout& l = a.w.layout;
  if (l.bits == 16)
    launch_tile<HalfTile, WeightStream<HalfTile, 3, 1, true>>(a, stream, pdl, {});
  else if (l.group == 32 && l.k > 32)
    launch_tile<Int8Tile<true>, WeightStream<Int8Tile<true>, 3, 2, true>>(a, stream, pdl, {});
  else
    launch_tile<Int8Tile<false>, WeightStream<Int8Tile<false>, 3, 2, true>>(a, stream, pdl, {});
}

}  // namespace q4s
