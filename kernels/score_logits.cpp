#include "kernels/score_logits.h"

#include <cstring>
#include <limits>

#include "kernels/compare_logits.h"
#include "kernels/wide.h"

namespace q4s {
namespace {

Q4S_WIDE bool finite(const float* x, int64_t n) {
  uint32_t largest = 0;  // of |x| as integers: infinities and NaN are above all others
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest < 0x7f800000;
}

}  // namespace

void score_logits(const ScoreLogitsArgs& a, Part part) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const auto [begin, end] = part.of(a.rows);
  for (int64_t r = begin; r < end; ++r) {
    const float* q = a.logits + r * a.vocab;
    const float* p = a.reference ? a.reference + r * a.vocab : q;
    if (!finite(q, a.vocab) || (a.reference && !finite(p, a.vocab))) {
      a.score[r] = {kNaN, kNaN, kNaN, 0};
      continue;
    }
    const LogitComparison c = compare_logits(p, q, a.vocab);
    const int32_t target = a.target[r];
    a.score[r] = {c.lse_q - q[target], 0, 0, 0};
    if (a.reference) a.score[r] = {c.lse_q - q[target], c.lse_p - p[target], c.kl, c.top_p == c.top_q};
  }
}

}  // namespace q4s
