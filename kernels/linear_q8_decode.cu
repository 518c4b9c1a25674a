// linear_decode.h for int8 and fp16 weights: the head, as a rule.
#include "kernels/linear_decode.cuh"

namespace q4s {

void launch_linear_decode_wide(int bits, const LinearDecodeLaunch& l,
                               const std::vector<LinearDecodeProduct>& products, cudaStream_t stream,
                               bool pdl) {
  bits == 8 ? launch_linear_decode<Int8Tile>(l, products, stream, pdl)
            : launch_linear_decode<HalfTile>(l, products, stream, pdl);
}

}  // namespace q4s
