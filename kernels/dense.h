// Dense row-major products in f32 and f64: OpenBLAS on one thread, or plain loops where it is left out.
// Callers split the work themselves into pieces whose borders do not depend on the thread count, so that
// results do not either.
#pragma once
#include <cstdint>

namespace q4s {

enum class Transpose : bool { kNo, kYes };

// C (m, n) = alpha * op(A) (m, k) * op(B) (k, n) + beta * C. Leading dimensions are those of the arrays as
// stored. With beta 0, C need not be initialised.
void dense_gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void dense_gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
                int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc);

}  // namespace q4s
