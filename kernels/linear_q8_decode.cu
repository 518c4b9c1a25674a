// linear_decode.h for int8 and fp16 weights: the head, as a rule.
#include "kernels/linear_decode.cuh"

namespace q4s {

void launch_linear_decode_wide(LinearDecodeParams& p, int bits, cudaStream_t stream, bool pdl) {
  bits == 8 ? launch_linear_decode<Int8Tile>(p, stream, pdl) : launch_linear_decode<HalfTile>(p, stream, pdl);
}

}  // namespace q4s
