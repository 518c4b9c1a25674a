#include "kernels/compare_logits.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/wide.h"

namespace q4s {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kPiece = 1024;

struct Sums {
  double p = 0, q = 0, dot = 0;  // exp(p - top_p), exp(q - top_q), exp(p - top_p) (p - q)
};

Q4S_WIDE void add_sums(const float* p, const float* q, int64_t n, float top_p, float top_q, Sums& sums) {
  typedef float F __attribute__((vector_size(4 * kLanes)));
  typedef int32_t I __attribute__((vector_size(4 * kLanes)));
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    F sum[2] = {}, dot = {};
    for (int64_t i = begin; i < std::min(n, begin + kPiece); i += kLanes) {
      F x[2], e[2];
      std::memcpy(&x[0], p + i, sizeof(F));
      std::memcpy(&x[1], q + i, sizeof(F));
      const F difference = x[0] - x[1];
      x[0] -= top_p;
      x[1] -= top_q;
      for (int s = 0; s < 2; ++s) {  // exp(x) = 2^k exp(r), |r| <= ln 2 / 2: Cephes' polynomial
        const F v = x[s] < -87.0f ? F{} - 87.0f : x[s];
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
        const F k = (v * 1.44269504f + kRound) - kRound;
        const F r = (v - k * 0.693145752f) - k * 1.42860677e-6f;
        F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
        y = y * r + 8.3334519073e-3f;
        y = y * r + 4.1665795894e-2f;
        y = y * r + 1.6666665459e-1f;
        y = y * r + 5.0000001201e-1f;
        y = y * r * r + r + 1.0f;
        const I power = (__builtin_convertvector(k, I) + 127) << 23;
        F scale;
        std::memcpy(&scale, &power, sizeof(F));
        e[s] = y * scale;
        sum[s] += e[s];
      }
      dot += e[0] * difference;
    }
    for (int l = 0; l < kLanes; ++l) sums.p += sum[0][l], sums.q += sum[1][l], sums.dot += dot[l];
  }
}

Q4S_WIDE float largest(const float* x, int64_t n) {
  float top[kLanes];
  for (int l = 0; l < kLanes; ++l) top[l] = x[0];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
  for (; i < n; ++i) top[0] = std::max(top[0], x[i]);
  return *std::max_element(top, top + kLanes);
}

}  // namespace

LogitComparison compare_logits(const float* p, const float* q, int64_t n) {
  const float top_p = largest(p, n), top_q = largest(q, n);
  const int64_t whole = n / kLanes * kLanes;
  Sums sums;
  add_sums(p, q, whole, top_p, top_q, sums);
  for (int64_t i = whole; i < n; ++i) {
    const double e = std::exp(double(p[i]) - top_p);
    sums.p += e;
    sums.q += std::exp(double(q[i]) - top_q);
    sums.dot += e * (double(p[i]) - q[i]);
  }
  LogitComparison c;
  c.lse_p = top_p + std::log(sums.p);
  c.lse_q = top_q + std::log(sums.q);
  c.kl = sums.dot / sums.p - c.lse_p + c.lse_q;
  c.top_p = std::find(p, p + n, top_p) - p;
  c.top_q = std::find(q, q + n, top_q) - q;
  return c;
}

}  // namespace q4s
