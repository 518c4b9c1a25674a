// linear_decode.h: which kernel serves a weight, and the int4 kernels.
#include "kernels/linear_decode.cuh"

namespace q4s {

bool linear_decode_supported(const Q4Layout& l) {
  if (l.k > 32768) return false;
  if (l.bits == 16 || l.group >= l.k) return true;
  int64_t g = 32;
  while (g < l.group) g *= 2;
  return g == l.group;
}

void linear_decode_wide(const LinearDecodeArgs&, cudaStream_t,
                        bool pdl);  // int8 and fp16: linear_q8_decode.cu

void linear_decode_cuda(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl) {
  const auto run = [&](auto tile) {
    using Tile = decltype(tile);
    launch_tile<Tile, WeightStream<Tile, 3, 4, true>>(a, stream, pdl, {});
  };
  const Q4Layout& l = a.w.layout;
  if (l.bits != 4) return linear_decode_wide(a, stream, pdl);
  const bool halves = l.group == 32 && l.k > 32;
  if (a.w.grid == Grid::kInt)
    halves ? run(Int4Tile<Grid::kInt, true>{}) : run(Int4Tile<Grid::kInt, false>{});
  else
    halves ? run(Int4Tile<Grid::kHalf, true>{}) : run(Int4Tile<Grid::kHalf, false>{});
}

}  // namespace q4s
