// linear_decode.h: which kernel serves a weight, and the int4 kernels.
#include "kernels/linear_decode.cuh"

namespace q4s {

bool linear_decode_supported(const Q4Layout& l) {
  if (linear_decode_config(l, 1, l.k <= 8192, device_facts().multiprocessors, device_facts().shared_bytes)
          .shared > device_facts().shared_bytes)
    return false;
  if (l.bits == 16 || l.group >= l.k) return true;
  int64_t g = 32;
  while (g < l.group) g *= 2;
  return g == l.group;
}

void linear_decode_wide(const LinearDecodeArgs&, cudaStream_t,
                        bool pdl);  // int8 and fp16: linear_q8_decode.cu

namespace {

template <Grid kGrid>
void run(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl) {
  const Q4Layout& l = a.w.layout;
  if (l.group >= l.k || l.group >= 128) return launch_linear_decode<Int4Tile<kGrid>, 1>(a, stream, pdl);
  if (l.group == 64) return launch_linear_decode<Int4Tile<kGrid>, 2>(a, stream, pdl);
  launch_linear_decode<Int4Tile<kGrid>, 4>(a, stream, pdl);
}

}  // namespace

void linear_decode_cuda(const LinearDecodeArgs& a, cudaStream_t stream, bool pdl) {
  if (a.w.layout.bits != 4) return linear_decode_wide(a, stream, pdl);
  a.w.grid == Grid::kInt ? run<Grid::kInt>(a, stream, pdl) : run<Grid::kHalf>(a, stream, pdl);
}

}  // namespace q4s
