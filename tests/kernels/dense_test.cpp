#include "kernels/dense.h"

#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

using namespace q4s;

namespace {

template <class T>
void check(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, T alpha, T beta, double bound) {
  std::mt19937 rng(uint32_t(m * 7 + n * 5 + k));
  std::normal_distribution<double> normal;
  const int64_t lda = (ta == Transpose::kYes ? m : k) + 3, ldb = (tb == Transpose::kYes ? k : n) + 1,
                ldc = n + 2;
  std::vector<T> a((ta == Transpose::kYes ? k : m) * lda), b((tb == Transpose::kYes ? n : k) * ldb),
      c(m * ldc);
  for (auto* v : {&a, &b, &c})
    for (T& x : *v) x = T(normal(rng));
  std::vector<T> out = c;
  if (beta == T(0)) out.assign(out.size(), T(NAN));
  for (int64_t i = 0; i < m; ++i)
    out[i * ldc + n] = out[i * ldc + n + 1] = T(7);  // between rows: not to be touched
  dense_gemm(ta, tb, m, n, k, alpha, a.data(), lda, b.data(), ldb, beta, out.data(), ldc);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += double(ta == Transpose::kYes ? a[l * lda + i] : a[i * lda + l]) *
               double(tb == Transpose::kYes ? b[j * ldb + l] : b[l * ldb + j]);
      const double expected =
          double(alpha) * sum + (beta == T(0) ? 0.0 : double(beta) * double(c[i * ldc + j]));
      CHECK(std::fabs(double(out[i * ldc + j]) - expected) <= bound * std::sqrt(double(k) + 1));
    }
    CHECK(out[i * ldc + n] == T(7));
  }
}

}  // namespace

TEST_CASE("dense products against f64, all transposes, odd sizes, strides") {
  for (Transpose ta : {Transpose::kNo, Transpose::kYes}) {
    for (Transpose tb : {Transpose::kNo, Transpose::kYes}) {
      const int64_t sizes[][3] = {{1, 1, 1}, {5, 67, 33}, {4, 64, 8}, {97, 130, 71}, {3, 2, 0}};
      for (const auto& [m, n, k] : sizes) {
        check<float>(ta, tb, m, n, k, 1.0f, 0.0f, 4e-6);
        check<float>(ta, tb, m, n, k, -0.5f, 1.0f, 4e-6);
        check<double>(ta, tb, m, n, k, 1.0, 0.0, 1e-14);
        check<double>(ta, tb, m, n, k, 2.0, -1.0, 1e-14);
      }
    }
  }
}
