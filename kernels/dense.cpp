#include "kernels/dense.h"

#ifdef Q4S_BLAS
#include <cblas.h>
#endif

namespace q4s {
namespace {

#ifdef Q4S_BLAS

CBLAS_TRANSPOSE flag(Transpose t) { return t == Transpose::kYes ? CblasTrans : CblasNoTrans; }

// Once per process: our own threads call the library side by side, so it must not start any.
void one_thread() {
  static const bool done = (openblas_set_num_threads(1), true);
  (void)done;
}

#else

template <class T>
void loops(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t lda,
           const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = c + i * ldc;
    for (int64_t j = 0; j < n; ++j) row[j] = beta == T(0) ? T(0) : beta * row[j];
    for (int64_t l = 0; l < k; ++l) {
      const T f = alpha * (ta == Transpose::kYes ? a[l * lda + i] : a[i * lda + l]);
      if (tb == Transpose::kNo) {
        for (int64_t j = 0; j < n; ++j) row[j] += f * b[l * ldb + j];
      } else {
        for (int64_t j = 0; j < n; ++j) row[j] += f * b[j * ldb + l];
      }
    }
  }
}

#endif

}  // namespace

void dense_gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
#ifdef Q4S_BLAS
  one_thread();
  cblas_sgemm(CblasRowMajor, flag(ta), flag(tb), blasint(m), blasint(n), blasint(k), alpha, a, blasint(lda), b,
              blasint(ldb), beta, c, blasint(ldc));
#else
  loops(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
}

void dense_gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
                int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
#ifdef Q4S_BLAS
  one_thread();
  cblas_dgemm(CblasRowMajor, flag(ta), flag(tb), blasint(m), blasint(n), blasint(k), alpha, a, blasint(lda), b,
              blasint(ldb), beta, c, blasint(ldc));
#else
  loops(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
}

}  // namespace q4s
