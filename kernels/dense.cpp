#include "kernels/dense.h"

#include "kernels/wide.h"

#ifdef Q4S_BLAS
#include <cblas.h>
#else
#include <algorithm>
#include <vector>
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

constexpr int64_t kTileRows = 4, kVectors = 4;  // of C, held in registers

template <class T>
constexpr int64_t tile_columns() {
  return kVectors * 64 / int64_t(sizeof(T));
}

// acc (4, columns) = a (4 rows of length k, stride lda) b (k, columns).
template <class T>
[[gnu::always_inline]] inline void tile_product(const T* a, const T* b, int64_t k, T* acc) {
  typedef T V __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  V sum[kTileRows][kVectors] = {};
  for (int64_t l = 0; l < k; ++l) {
    const V* row = reinterpret_cast<const V*>(b + l * tile_columns<T>());
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] += a[l * kTileRows + r] * row[v];
  }
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) reinterpret_cast<V*>(acc + r * tile_columns<T>())[v] = sum[r][v];
}
Q4S_WIDE void tile(const float* a, const float* b, int64_t k, float* acc) { tile_product(a, b, k, acc); }
Q4S_WIDE void tile(const double* a, const double* b, int64_t k, double* acc) { tile_product(a, b, k, acc); }

// Tiles of C; rows of A and columns of B are copied together first, ends filled with zeros. Sums over k
// ascending.
template <class T>
void loops(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t lda,
           const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  constexpr int64_t kCols = tile_columns<T>();
  const int64_t strips = (m + kTileRows - 1) / kTileRows;
  std::vector<T> rows(strips * kTileRows * k), columns(kCols * k), acc(kTileRows * kCols);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l)
      rows[i / kTileRows * kTileRows * k + l * kTileRows + i % kTileRows] =
          ta == Transpose::kYes ? a[l * lda + i] : a[i * lda + l];
  for (int64_t j = 0; j < n; j += kCols) {
    const int64_t width = std::min(kCols, n - j);
    for (int64_t l = 0; l < k; ++l)
      for (int64_t i = 0; i < width; ++i)
        columns[l * kCols + i] = tb == Transpose::kYes ? b[(j + i) * ldb + l] : b[l * ldb + j + i];
    for (int64_t s = 0; s < strips; ++s) {
      tile(&rows[s * kTileRows * k], columns.data(), k, acc.data());
      for (int64_t r = 0; r < std::min(kTileRows, m - s * kTileRows); ++r) {
        T* out = c + (s * kTileRows + r) * ldc + j;
        for (int64_t i = 0; i < width; ++i)
          out[i] = alpha * acc[r * kCols + i] + (beta == T(0) ? T(0) : beta * out[i]);
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
  cblas_sgemm(CblasRowMajor, flag(ta), flag(tb), blasint(m), blasint(n), blasint(k), alpha, a, blasint(lda),
              b, blasint(ldb), beta, c, blasint(ldc));
#else
  loops(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
}

void dense_gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
                int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
#ifdef Q4S_BLAS
  one_thread();
  cblas_dgemm(CblasRowMajor, flag(ta), flag(tb), blasint(m), blasint(n), blasint(k), alpha, a, blasint(lda),
              b, blasint(ldb), beta, c, blasint(ldc));
#else
  loops(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
}

}  // namespace q4s
