// y[t,:] = x[t,:] R or x[t,:] R^T, the orthogonal transform folded into a rotated model's residual stream.
//   R = diag(signs) * (H_p (x) M),  D = p * m, p the largest power of two dividing D, M an orthogonal (m, m)
//   matrix, H_p the Sylvester-Hadamard matrix over sqrt(p). Column index of x is i*m + j, i < p, j < m.
#pragma once
#include "kernels/cuda_stream.h"
#include "kernels/types.h"

namespace q4s {

struct RotateArgs {
  const float* x;       // (T, D)
  const float* signs;   // (D) +1 or -1
  const float* factor;  // (m, m) row-major M
  float* y;             // (T, D), may be x
  int64_t tokens, dim, m;
  bool inverse;  // R^T
};
void rotate_cpu(const RotateArgs&, Part = {});      // the definition, in double
void rotate(const RotateArgs&, Part = {});          // vectorised
void rotate_cuda(const RotateArgs&, cudaStream_t);  // a row in shared memory: D <= 49152

}  // namespace q4s
