// Rows of any storage format as f32.
#include "kernels/cpu_kernels.h"

namespace q4s {

void dequantize_rows(const WeightView& w, int64_t begin, int64_t end, float* out) {
  for (int64_t n = begin; n < end; ++n, out += w.k) cpu_kernels().decode_row(w, n, out);
}

}  // namespace q4s
