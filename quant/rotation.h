// The rotation that makes weights easier to quantise (QuaRot, arXiv 2404.00456): the residual stream x
// becomes x R1 and every head's values become v R2, both folded into the weights on either side, norm gains
// first folded into the linears that follow. The function of the model is unchanged. What runs a rotated
// model is kernels/rotate.h.
#pragma once
#include <cstdint>
#include <vector>

#include "models/config.h"
#include "quant/block.h"

namespace q4s {

// R of kernels/rotate.h: signs * (Hadamard (x) M). M is the (m, m) Hartley matrix (cos + sin) / sqrt(m):
// orthogonal and flat for every odd m, so that no direction keeps its outliers.
struct Rotation {
  int64_t dim = 0, m = 1;
  std::vector<float> signs;   // (dim)
  std::vector<float> factor;  // (m, m)
};
Rotation make_rotation(int64_t dim, uint64_t seed);

// w (rows, dim) = w R: a table of rows that are residual-stream vectors, or a linear that reads them.
void rotate_rows(const Rotation&, float* w, int64_t rows, const Team&);
// w (dim, k) = R^T w: a linear that writes them. dim rows at `w`, stride k.
void rotate_outputs(const Rotation&, float* w, int64_t k, const Team&);
// w (n, k): column j times gain[j].
void fold_gain(const std::vector<float>& gain, float* w, int64_t n);

}  // namespace q4s
